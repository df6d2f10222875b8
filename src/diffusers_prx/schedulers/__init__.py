from .fast import fast_scheduler, fast_sigmas
from .scheduling_prx import PRXFlowMatchScheduler, PRXSchedulerOutput, PRXXPredictionScheduler

__all__ = ["PRXFlowMatchScheduler", "PRXSchedulerOutput", "PRXXPredictionScheduler", "fast_scheduler", "fast_sigmas"]
