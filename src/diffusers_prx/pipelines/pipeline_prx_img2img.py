"""Image to image with PRX: a new version of an image, from as much noise as `strength` says."""

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


class PRXImg2ImgBase(PRXPipelineBase):
    """The call of both pipelines for image to image."""

    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        image: ImageInput | None = None,
        strength: float = 0.8,
        negative_prompt: str | list[str] | None = "",
        height: int | None = None,
        width: int | None = None,
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
        """Draw new versions of images.

        Arguments that are not listed here are those of the call of `PRXPipeline`.

        Args:
            prompt: one prompt or a list of P prompts; or pass `prompt_embeds`.
            image: image to start from: one for all prompts, or P. PIL images, float arrays (H, W, 3) or (N, H, W, 3)
                and tensors (3, H, W) or (N, 3, H, W) in [0, 1], lists of these, or latents (N, C, h, w) of a VAE with
                C other than 3 channels. Images of one call have one size; an alpha channel is dropped.
            strength: noise level in [0, 1] to start at, on the scheduler's own axis, `scheduler.sigmas`: the call
                starts from (1 - strength) image + strength noise, and takes the steps of the schedule below this
                level. 1 ignores the image: it equals text to image bit by bit. 0 takes no step and returns the image,
                through the VAE if there is one. diffusers' other pipelines count steps: there, a strength u starts at
                the noise level s u / (1 + (s - 1) u), with the `shift` s of the scheduler.
            height: height to draw at, in pixels; the image is resized to it, and the ratio of its sides may change.
                The image's own when None. It must be a multiple of `vae_scale_factor` times the transformer's patch
                size.
            width: width to draw at, likewise.
            num_inference_steps: number of steps from noise level 1; a call takes about `strength` times as many with a
                shift of 1.
            latents: noise (B, C, h, w) to mix the image with, already scaled by `noise_scale`.

        Returns:
            `PRXPipelineOutput`, or a tuple of its images.

        Raises:
            ValueError: as in the call of `PRXPipeline`, or if `image` or `strength` is not as described.

        Example:
            >>> image = pipe("a red cat on a beach", image=sketch, strength=0.7).images[0]
        """
        edit = self._make_edit(image, strength, height, width)
        call = CallArguments.collect(locals(), height=edit.size[0], width=edit.size[1], use_resolution_binning=False)
        return self._draw(call, edit)


class PRXImg2ImgPipeline(PRXImg2ImgBase, PRXPipeline):
    """Image to image with PRX in the latents of a VAE. Arguments and components: as in `PRXPipeline`.

    Example:
        >>> from diffusers_prx import PRXImg2ImgPipeline
        >>> pipe = PRXImg2ImgPipeline.from_pretrained("Photoroom/prx-512-t2i-sft").to("cuda")
        >>> image = pipe("a rusty tram on a beach", image=sketch, strength=0.7).images[0]
    """


class PRXPixelImg2ImgPipeline(PRXImg2ImgBase, PRXPixelPipeline):
    """Image to image with PRX in pixel space. Arguments and components: as in `PRXPixelPipeline`.

    Example:
        >>> from diffusers_prx import PRXPixelImg2ImgPipeline
        >>> pipe = PRXPixelImg2ImgPipeline.from_pretrained("Photoroom/prxpixel-t2i").to("cuda")
        >>> image = pipe("a rusty tram on a beach", image=sketch, strength=0.7).images[0]
    """
