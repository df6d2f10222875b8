"""Text to image with PRX in pixel space."""

import torch
from diffusers import SchedulerMixin
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.transformer_prx import PRXTransformer2DModel
from ..schedulers.scheduling_prx import check_count
from .pipeline_base import PRXPipelineBase


class PRXPixelPipeline(PRXPipelineBase):
    """Text to image with PRX in pixel space: no VAE, the transformer predicts the clean image (arXiv 2511.13720).

    It loads pipelines that this package or stock diffusers saved, and the published checkpoints. `PRXPipeline` lists
    three ways to sample: exact, fast and fastest.

    Args:
        transformer: PRX transformer with three input channels.
        scheduler: `PRXXPredictionScheduler`, `PRXFlowMatchScheduler` (by `prediction_type`), or diffusers'
            FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler or UniPCMultistepScheduler with flow sigmas.
        text_encoder: Qwen3VLTextModel, or another transformers model with a `last_hidden_state`.
        tokenizer: tokenizer of the text encoder.
        default_sample_size: side of the images in pixels if the call gives no size; 1024 when None.
        prompt_max_tokens: number of text tokens.
        noise_scale: factor on the initial noise.
        prediction_type: prediction of the transformer, "x_prediction" or "velocity"; None: that of our scheduler, and
            x_prediction with one of diffusers' own.
        token_route: (start, stop, ratio) if the transformer was trained with tokens led around blocks (TREAD, SPRINT):
            half-open range of blocks and fraction of the tokens. `self_guidance_scale` of the call needs it.
        caption_cleaning: cleaning of prompts, that of the captions in training: "full", "full_v1" or "light" (see
            `prompt_cleaning`). None: "light", as in diffusers' pipeline of this name.
        preset_steps: numbers of steps of some of the presets "exact", "fast" and "fastest" (see `apply_preset`). The
            others take 28, 14 and 7 steps if the network predicts velocity, 28, 9 and 7 if it predicts the image.
        preset_guidance_scale: `guidance_scale` of all presets, 1 for a network that was distilled; None: that of the
            call.

    Raises:
        ValueError: if an argument is not as described, or the scheduler is for another prediction.

    Example:
        >>> from diffusers_prx import PRXPixelPipeline
        >>> pipe = PRXPixelPipeline.from_pretrained("Photoroom/prxpixel-t2i", dtype=torch.bfloat16).to("cuda")
        >>> image = pipe("A portrait of a lion in the golden savanna at sunset").images[0]
    """

    model_cpu_offload_seq = "text_encoder->transformer"
    default_prediction_type = "x_prediction"
    default_resolution = 1024
    default_caption_cleaning = "light"

    def __init__(
        self,
        transformer: PRXTransformer2DModel,
        scheduler: SchedulerMixin,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        default_sample_size: int | None = 1024,
        prompt_max_tokens: int = 256,
        noise_scale: float = 2.0,
        prediction_type: str | None = None,
        token_route: tuple[int, int, float] | None = None,
        caption_cleaning: str | None = None,
        preset_steps: dict[str, int] | None = None,
        preset_guidance_scale: float | None = None,
    ):
        super().__init__()
        prompt_max_tokens = check_count("prompt_max_tokens", prompt_max_tokens)
        self.register_modules(
            transformer=transformer, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(prompt_max_tokens=prompt_max_tokens)
        self._setup(default_sample_size, noise_scale, prediction_type, token_route, caption_cleaning)
        self._set_presets(preset_steps, preset_guidance_scale)
        if transformer is not None and transformer.config["in_channels"] != 3:
            raise ValueError(
                f"`transformer` takes {transformer.config['in_channels']} channels (`in_channels`); pixels have 3. Use"
                " PRXPipeline, with a `vae`, for a transformer of latents."
            )

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along one side: 1, latents are pixels."""
        return 1

    @property
    def is_stock_compatible(self) -> bool:
        """True if stock diffusers' PRXPixelPipeline draws the same with this configuration."""
        return self.config["prediction_type"] == "x_prediction"

    @property
    def max_tokens(self) -> int:
        """Number of text tokens: `prompt_max_tokens`."""
        return self.config["prompt_max_tokens"]

    def _encode(self, pixels_pm1: torch.Tensor) -> torch.Tensor:
        return pixels_pm1

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents
