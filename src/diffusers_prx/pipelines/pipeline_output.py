from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image


@dataclass
class PRXPipelineOutput(BaseOutput):
    """What both PRX pipelines return.

    Args:
        images: by `output_type`: "pil", a list of B images; "np", a float array (B, H, W, 3) in [0, 1]; "pt", a tensor
            (B, 3, H, W) in [0, 1]; "latent", the final latents (B, C, h, w), for pixel space (B, 3, H, W) in [-1, 1].
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
