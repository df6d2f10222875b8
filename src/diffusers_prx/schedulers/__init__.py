from .scheduling_prx import PRXFlowMatchScheduler, PRXSchedulerOutput, PRXXPredictionScheduler

__all__ = ["PRXFlowMatchScheduler", "PRXSchedulerOutput", "PRXXPredictionScheduler"]
