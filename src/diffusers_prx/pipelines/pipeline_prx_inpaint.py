"""Inpainting and outpainting with PRX: draw where a mask is white, and leave the rest as it is."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.guiders import BaseGuidance
from torch.distributed import ProcessGroup

from .call_arguments import CallArguments
from .check_inputs import DEFAULT_GUIDANCE_SCALE
from .editing import ImageInput
from .pipeline_base import PRXPipelineBase
from .pipeline_output import PRXPipelineOutput
from .pipeline_prx import PRXPipeline
from .pipeline_prx_pixel import PRXPixelPipeline
from .words import LongPrompts, PromptEnhancer, Regions


class PRXInpaintBase(PRXPipelineBase):
    """The call of both pipelines for inpainting."""

    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 1.0,
        negative_prompt: str | list[str] | None = "",
        num_inference_steps: int = 28,
        timesteps: Sequence[float] | None = None,
        guidance_scale: float = DEFAULT_GUIDANCE_SCALE,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        tokenizer_max_length: int | None = None,
        skip_text_cleaning: bool | None = None,
        sigmas: Sequence[float] | None = None,
        self_guidance_scale: float = 1.0,
        guider: BaseGuidance | None = None,
        guidance_group: ProcessGroup | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        guide_transformer: Any = None,
        long_prompts: LongPrompts = "cut",
        prompt_weights: bool = False,
        regions: Regions | None = None,
        prompt_enhancer: PromptEnhancer | None = None,
        settings_in_image: bool = True,
    ) -> PRXPipelineOutput | tuple[Any]:
        """Draw into images where a mask is white.

        Arguments that are not listed here are those of the call of `PRXPipeline`.

        Args:
            prompt: one prompt or a list of P prompts, of the whole picture; or pass `prompt_embeds`.
            image: image to draw into, as in the call of `PRXImg2ImgPipeline`. Its pixels outside the mask come back
                unchanged (unless `image` holds latents).
            mask_image: mask of the image's size, white (1) where to draw: one for all images, or one for each. PIL
                images, bool or float arrays and tensors (H, W), (N, H, W) or (N, 1, H, W) in [0, 1]. Denoising
                redraws a latent if a pixel of it is at least 0.5. Values between 0 and 1 mix the drawn picture with
                the image at the end: blur a mask for a soft edge. Leave a pipeline's VAE a few pixels of room around
                what is to go.
            height: height to draw at, in pixels; image and mask are resized to it, and the ratio of their sides may
                change. The image's own when None. It must be a multiple of `vae_scale_factor` times the transformer's
                patch size.
            width: width to draw at, likewise.
            padding_mask_crop: pixels around the mask. The smallest box around the mask, so much wider on each side and
                grown to the ratio of `width` and `height`, is cut out, drawn at `height` and `width`, and put back
                into the image, which keeps its size. The prompt then describes this region. None: the whole image.
            strength: noise level in [0, 1] to start at, as in the call of `PRXImg2ImgPipeline`. 1 draws the masked
                region anew. Below 1, some of what the image shows there stays.
            num_inference_steps: number of steps from noise level 1.
            latents: noise (B, C, h, w) to mix the image with, already scaled by `noise_scale`.

        Returns:
            `PRXPipelineOutput`, or a tuple of its images.

        Raises:
            ValueError: as in the call of `PRXPipeline`, or if `image`, `mask_image`, `strength` or `padding_mask_crop`
                is not as described.

        Example:
            >>> image = pipe("a blue cat on a beach", image=photo, mask_image=mask).images[0]
        """
        edit = self._make_edit(image, strength, height, width, mask_image, padding_mask_crop)
        call = CallArguments.collect(locals(), height=edit.size[0], width=edit.size[1], use_resolution_binning=False)
        return self._draw(call, edit)


class PRXInpaintPipeline(PRXInpaintBase, PRXPipeline):
    """Inpainting and outpainting with PRX in the latents of a VAE. Arguments and components: as in `PRXPipeline`.

    Example:
        >>> from diffusers_prx import PRXInpaintPipeline
        >>> pipe = PRXInpaintPipeline.from_pretrained("Photoroom/prx-512-t2i-sft").to("cuda")
        >>> image = pipe("a tram on a beach", image=photo, mask_image=mask).images[0]
    """


class PRXPixelInpaintPipeline(PRXInpaintBase, PRXPixelPipeline):
    """Inpainting and outpainting with PRX in pixel space. Arguments and components: as in `PRXPixelPipeline`.

    Example:
        >>> from diffusers_prx import PRXPixelInpaintPipeline
        >>> pipe = PRXPixelInpaintPipeline.from_pretrained("Photoroom/prxpixel-t2i").to("cuda")
        >>> image = pipe("a tram on a beach", image=photo, mask_image=mask).images[0]
    """
