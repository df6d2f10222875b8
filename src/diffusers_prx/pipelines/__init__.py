from .pipeline_output import PRXPipelineOutput
from .pipeline_prx import PRXPipeline
from .pipeline_prx_img2img import PRXImg2ImgPipeline, PRXPixelImg2ImgPipeline
from .pipeline_prx_inpaint import PRXInpaintPipeline, PRXPixelInpaintPipeline
from .pipeline_prx_pixel import PRXPixelPipeline

__all__ = [
    "PRXImg2ImgPipeline",
    "PRXInpaintPipeline",
    "PRXPipeline",
    "PRXPipelineOutput",
    "PRXPixelImg2ImgPipeline",
    "PRXPixelInpaintPipeline",
    "PRXPixelPipeline",
]
