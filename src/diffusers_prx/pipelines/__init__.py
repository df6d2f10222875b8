from .pipeline_output import PRXPipelineOutput
from .pipeline_prx import PRXPipeline
from .pipeline_prx_pixel import PRXPixelPipeline

__all__ = ["PRXPipeline", "PRXPipelineOutput", "PRXPixelPipeline"]
