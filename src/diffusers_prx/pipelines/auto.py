"""diffusers' Auto classes: make them find the pipelines of this package."""

from ..compat import auto_pipeline_mappings
from .pipeline_prx import PRXPipeline
from .pipeline_prx_img2img import PRXImg2ImgPipeline, PRXPixelImg2ImgPipeline
from .pipeline_prx_inpaint import PRXInpaintPipeline, PRXPixelInpaintPipeline
from .pipeline_prx_pixel import PRXPixelPipeline

LATENTS = (PRXPipeline, PRXImg2ImgPipeline, PRXInpaintPipeline)
PIXELS = (PRXPixelPipeline, PRXPixelImg2ImgPipeline, PRXPixelInpaintPipeline)


def register() -> None:
    """Make diffusers' Auto classes find the pipelines of this package, in this process.

    It sets the entries "prx" and "prx-pixel" of the tables that AutoPipelineForText2Image, AutoPipelineForImage2Image
    and AutoPipelineForInpainting look up. One of these entries replaces diffusers' own PRXPipeline for text to image.
    All PRX folders and Hub ids then load with our classes, also those that stock diffusers rejects, and `from_pipe` of
    the Auto classes takes any PRX pipeline. `DiffusionPipeline.from_pretrained` has no such table: it loads diffusers'
    own classes, or its error names this package.

    Example:
        >>> import diffusers_prx
        >>> from diffusers import AutoPipelineForInpainting
        >>> diffusers_prx.register()
        >>> pipe = AutoPipelineForInpainting.from_pretrained("Photoroom/prx-512-t2i-sft")
        >>> type(pipe).__module__
        'diffusers_prx.pipelines.pipeline_prx_inpaint'
    """
    for mapping, latents, pixels in zip(auto_pipeline_mappings(), LATENTS, PIXELS):
        mapping["prx"] = latents
        mapping["prx-pixel"] = pixels
