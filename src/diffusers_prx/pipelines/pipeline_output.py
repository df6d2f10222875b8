"""Return value of all PRX pipelines."""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image


@dataclass
class PRXPipelineOutput(BaseOutput):
    """Images of a pipeline call.

    Args:
        images: list of B PIL images; or, by `output_type`, "np": float array (B, H, W, 3) in [0, 1]; "pt": tensor
            (B, 3, H, W) in [0, 1]; "latent": final latents (B, C, h, w), in pixel space (B, 3, H, W) in [-1, 1].

    Example:
        >>> output = pipe("a red cat")
        >>> output.images[0].save("cat.png")
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
