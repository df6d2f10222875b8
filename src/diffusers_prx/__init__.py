"""PRX, Photoroom's text-to-image flow-matching transformer, as a model package for the Hugging Face ecosystem.

`import diffusers_prx` loads no other library; each public name is imported when it is first used.

Example:
    >>> from diffusers_prx import PRXPipeline
    >>> pipe = PRXPipeline.from_pretrained("Photoroom/prx-512-t2i-sft").to("cuda")
    >>> image = pipe("A rusty, vintage tram on a sandy beach").images[0]
"""

import re
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .models.transformer_prx import PRXTransformer2DModel
    from .pipelines.auto import register
    from .pipelines.picture_settings import read_settings, save_with_settings
    from .pipelines.pipeline_output import PRXPipelineOutput
    from .pipelines.pipeline_prx import PRXPipeline
    from .pipelines.pipeline_prx_img2img import PRXImg2ImgPipeline, PRXPixelImg2ImgPipeline
    from .pipelines.pipeline_prx_inpaint import PRXInpaintPipeline, PRXPixelInpaintPipeline
    from .pipelines.pipeline_prx_pixel import PRXPixelPipeline
    from .pipelines.presets import apply_preset
    from .pipelines.prompt_enhancer import PromptEnhancer
    from .schedulers.fast import fast_scheduler, fast_sigmas
    from .schedulers.scheduling_prx import PRXFlowMatchScheduler, PRXSchedulerOutput, PRXXPredictionScheduler

# public name -> the module of this package that defines it
_MODULES = {
    "PRXFlowMatchScheduler": "schedulers.scheduling_prx",
    "PRXImg2ImgPipeline": "pipelines.pipeline_prx_img2img",
    "PRXInpaintPipeline": "pipelines.pipeline_prx_inpaint",
    "PRXPipeline": "pipelines.pipeline_prx",
    "PRXPipelineOutput": "pipelines.pipeline_output",
    "PRXPixelImg2ImgPipeline": "pipelines.pipeline_prx_img2img",
    "PRXPixelInpaintPipeline": "pipelines.pipeline_prx_inpaint",
    "PRXPixelPipeline": "pipelines.pipeline_prx_pixel",
    "PRXSchedulerOutput": "schedulers.scheduling_prx",
    "PRXTransformer2DModel": "models.transformer_prx",
    "PRXXPredictionScheduler": "schedulers.scheduling_prx",
    "PromptEnhancer": "pipelines.prompt_enhancer",
    "apply_preset": "pipelines.presets",
    "fast_scheduler": "schedulers.fast",
    "fast_sigmas": "schedulers.fast",
    "read_settings": "pipelines.picture_settings",
    "register": "pipelines.auto",
    "save_with_settings": "pipelines.picture_settings",
}

__all__ = [
    "PRXFlowMatchScheduler",
    "PRXImg2ImgPipeline",
    "PRXInpaintPipeline",
    "PRXPipeline",
    "PRXPipelineOutput",
    "PRXPixelImg2ImgPipeline",
    "PRXPixelInpaintPipeline",
    "PRXPixelPipeline",
    "PRXSchedulerOutput",
    "PRXTransformer2DModel",
    "PRXXPredictionScheduler",
    "PromptEnhancer",
    "__version__",
    "apply_preset",
    "fast_scheduler",
    "fast_sigmas",
    "read_settings",
    "register",
    "save_with_settings",
]


def _installed(distribution: str) -> tuple[int, ...] | None:
    """Return major and minor version of a distribution, or None if it is not installed."""
    try:
        return tuple(map(int, re.findall(r"\d+", version(distribution))[:2]))
    except PackageNotFoundError:
        return None


def _check_optional_libraries() -> None:
    """Check the versions of optional libraries that diffusers and transformers import if they are installed.

    Raises:
        ImportError: if a version does not work; the message has the command that fixes the installation.
    """
    peft, torchao, torch = map(_installed, ("peft", "torchao", "torch"))
    if peft is not None and peft < (0, 18):
        raise ImportError(
            f"peft {version('peft')} is installed, which does not work with transformers 5; diffusers imports it if "
            "it is installed. Run `pip install --upgrade 'peft>=0.18'`, or `pip uninstall peft`."
        )
    if torchao is not None and torch is not None and torchao >= (0, 18) and torch < (2, 10):
        raise ImportError(
            f"torchao {version('torchao')} is installed, which does not work with torch {version('torch')}; "
            "diffusers and transformers import it if it is installed. Run `pip install --upgrade 'torch>=2.11'` "
            "or `pip uninstall torchao`."
        )


_check_optional_libraries()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value  # later look-ups find it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
