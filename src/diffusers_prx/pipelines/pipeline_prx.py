"""Text to image with PRX in the latents of a VAE."""

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderRAE,
    AutoencoderTiny,
    SchedulerMixin,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import latents as vae_latents
from ..models.transformer_prx import PRXTransformer2DModel
from .check_finite import check_finite_output
from .pipeline_base import PRXPipelineBase


class PRXPipeline(PRXPipelineBase):
    """Text to image with PRX in the latents of a VAE.

    It loads pipelines that this package or stock diffusers saved, and the published checkpoints.

    Three ways to sample, which `apply_preset` sets up. Errors are those of the latents to 200 Euler steps, on the
    small network of the quickstart; the speed is over diffusers' pipeline at 256 pixels on two CPU cores;
    docs/draw/speed.md says how both were measured.

    - exact, the default: 28 Euler steps; the text's keys and values and the modulation are computed once per call.
      Error 0.025, 1.2 to 1.45 times as fast.
    - fast, about the same picture: `pipe.scheduler = fast_scheduler()` and `pipe(prompt, sigmas=fast_sigmas(9))`.
      Error 0.020, 3.5 to 4.1 times as fast. If the network predicts velocity, use `fast_sigmas(14)`: nine steps had
      up to 1.9 times the error of 28 Euler steps, and 14 steps had less than those.
    - fastest, a preview: `pipe(prompt, num_inference_steps=7)`. Error 0.067, 4.4 to 5.0 times as fast.

    Args:
        transformer: PRX transformer.
        scheduler: `PRXFlowMatchScheduler`, `PRXXPredictionScheduler` (by `prediction_type`), or diffusers'
            FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler or UniPCMultistepScheduler with flow sigmas.
        text_encoder: T5GemmaEncoderModel, Qwen3VLTextModel, T5EncoderModel, CLIPTextModel, or another transformers
            model with a `last_hidden_state`.
        tokenizer: tokenizer of the text encoder. Its `model_max_length` is the number of text tokens.
        vae: AutoencoderKL, AutoencoderKLFlux2, AutoencoderDC, AutoencoderTiny or AutoencoderRAE, which has one image
            size. Without a VAE the only `output_type` is "latent".
        default_sample_size: side of the images in pixels if the call gives no size; 512 when None.
        noise_scale: factor on the initial noise.
        prediction_type: prediction of the transformer, "velocity" or "x_prediction"; None: that of our scheduler, and
            velocity with one of diffusers' own.
        token_route: (start, stop, ratio) if the transformer was trained with tokens led around blocks (TREAD, SPRINT):
            half-open range of blocks and fraction of the tokens. `self_guidance_scale` of the call needs it.
        caption_cleaning: cleaning of prompts, that of the captions in training: "full", "full_v1" or "light" (see
            `prompt_cleaning`). None: "full_v1", as in diffusers' pipeline of this name.
        preset_steps: numbers of steps of some of the presets "exact", "fast" and "fastest" (see `apply_preset`). The
            others take 28, 14 and 7 steps if the network predicts velocity, 28, 9 and 7 if it predicts the image.
        preset_guidance_scale: `guidance_scale` of all presets, 1 for a network that was distilled; None: that of the
            call.

    Raises:
        ValueError: if an argument is not as described, or the scheduler is for another prediction.

    Example:
        >>> from diffusers_prx import PRXPipeline
        >>> pipe = PRXPipeline.from_pretrained("Photoroom/prx-512-t2i-sft").to("cuda")
        >>> image = pipe("A rusty, vintage tram on a sandy beach", guidance_scale=5.0).images[0]
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012
    default_prediction_type = "velocity"
    default_resolution = 512
    default_caption_cleaning = "full_v1"

    vae: Any

    def __init__(
        self,
        transformer: PRXTransformer2DModel,
        scheduler: SchedulerMixin,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        vae: AutoencoderKL | AutoencoderKLFlux2 | AutoencoderDC | AutoencoderTiny | AutoencoderRAE | None = None,
        default_sample_size: int | None = 512,
        noise_scale: float = 1.0,
        prediction_type: str | None = None,
        token_route: tuple[int, int, float] | None = None,
        caption_cleaning: str | None = None,
        preset_steps: dict[str, int] | None = None,
        preset_guidance_scale: float | None = None,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer, vae=vae
        )
        self._setup(default_sample_size, noise_scale, prediction_type, token_route, caption_cleaning)
        self._set_presets(preset_steps, preset_guidance_scale)
        if vae is not None and transformer is not None:
            channels = vae_latents.latent_channels(vae)
            if channels != transformer.config["in_channels"]:
                raise ValueError(
                    f"`vae` has latents of {channels} channels; `transformer` takes"
                    f" {transformer.config['in_channels']} (`in_channels`)."
                )

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along one side."""
        return 8 if self.vae is None else vae_latents.vae_scale_factor(self.vae)

    @property
    def is_stock_compatible(self) -> bool:
        """True if stock diffusers' PRXPipeline draws the same with this configuration."""
        same_noise = self.config["prediction_type"] == "velocity" and self.config["noise_scale"] == 1.0
        return same_noise and vae_latents.has_one_scale(self.vae)

    @property
    def max_tokens(self) -> int:
        """Number of text tokens: `model_max_length` of the tokenizer."""
        return self.tokenizer.model_max_length

    def _image_sizes(
        self, height: int | None, width: int | None, use_resolution_binning: bool | None
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        image_size, render_size = super()._image_sizes(height, width, use_resolution_binning)
        size = vae_latents.fixed_image_size(self.vae)
        if size is not None and render_size != (size, size):
            raise ValueError(
                f"`height` and `width` are {image_size[0]} and {image_size[1]}, but the `vae`"
                f" ({type(self.vae).__name__}) makes only images of {size} x {size}: pass `height={size}` and"
                f" `width={size}`."
            )
        return image_size, render_size

    def _check_output_type(self, output_type: str) -> None:
        super()._check_output_type(output_type)
        if self.vae is None and output_type != "latent":
            raise ValueError(f"`output_type` is {output_type!r}, but the pipeline has no `vae`; accepted is 'latent'.")

    def _encode(self, pixels_pm1: torch.Tensor) -> torch.Tensor:
        if self.vae is None:
            raise ValueError("`image` holds pixels, but the pipeline has no `vae`: pass latents (B, C, h, w).")
        latents = vae_latents.encode(self.vae, pixels_pm1).mean
        check_finite_output("vae", self.vae, latents, pixels_pm1)
        return latents

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        images = vae_latents.decode(self.vae, latents)
        check_finite_output("vae", self.vae, images, latents)
        return images
