"""PRX, Photoroom's text-to-image flow-matching transformer, as a model package for the Hugging Face ecosystem.

The public names are imported when they are first asked for: `import diffusers_prx` by itself loads no other library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .models.transformer_prx import PRXTransformer2DModel
    from .pipelines.pipeline_output import PRXPipelineOutput
    from .pipelines.pipeline_prx import PRXPipeline
    from .pipelines.pipeline_prx_pixel import PRXPixelPipeline
    from .schedulers.fast import fast_scheduler, fast_sigmas
    from .schedulers.scheduling_prx import PRXFlowMatchScheduler, PRXSchedulerOutput, PRXXPredictionScheduler

# public name -> the module of this package that defines it
_MODULES = {
    "PRXFlowMatchScheduler": "schedulers.scheduling_prx",
    "PRXPipeline": "pipelines.pipeline_prx",
    "PRXPipelineOutput": "pipelines.pipeline_output",
    "PRXPixelPipeline": "pipelines.pipeline_prx_pixel",
    "PRXSchedulerOutput": "schedulers.scheduling_prx",
    "PRXTransformer2DModel": "models.transformer_prx",
    "PRXXPredictionScheduler": "schedulers.scheduling_prx",
    "fast_scheduler": "schedulers.fast",
    "fast_sigmas": "schedulers.fast",
}

__all__ = [
    "PRXFlowMatchScheduler",
    "PRXPipeline",
    "PRXPipelineOutput",
    "PRXPixelPipeline",
    "PRXSchedulerOutput",
    "PRXTransformer2DModel",
    "PRXXPredictionScheduler",
    "__version__",
    "fast_scheduler",
    "fast_sigmas",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
