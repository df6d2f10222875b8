import torch
from diffusers import SchedulerMixin
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.transformer_prx import PRXTransformer2DModel
from ..schedulers.scheduling_prx import check_count
from .pipeline_base import PRXPipelineBase


class PRXPixelPipeline(PRXPipelineBase):
    """Text to image with PRX in pixel space: no VAE, the network predicts the clean image (JiT, arXiv 2511.13720).

    >>> from diffusers_prx import PRXPixelPipeline
    >>> pipe = PRXPixelPipeline.from_pretrained("Photoroom/prxpixel-t2i", dtype=torch.bfloat16).to("cuda")
    >>> image = pipe("A portrait of a lion in the golden savanna at sunset").images[0]

    Three ways to sample, exact, fast and fastest: see `PRXPipeline`.

    Loads what this package saved, what stock diffusers saved, and the published checkpoints.

    Args:
        transformer: the network, with three input channels.
        scheduler: `PRXXPredictionScheduler`, `PRXFlowMatchScheduler` (by `prediction_type`), or diffusers'
            FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler or UniPCMultistepScheduler with flow sigmas.
        text_encoder: Qwen3VLTextModel, or another transformers model with a `last_hidden_state`.
        tokenizer: the text encoder's.
        default_sample_size: side in pixels of what is drawn when the call gives no size; 1024 when None.
        prompt_max_tokens: number of text tokens.
        noise_scale: what the first noise is multiplied by.
        prediction_type: what the network predicts, "x_prediction" or "velocity"; None for what our scheduler says, and
            x_prediction with one of diffusers' own.
        token_route: (start, stop, ratio) if the network was trained with tokens led around blocks (TREAD, SPRINT): the
            half-open range of blocks and the share of tokens. What the call's `self_guidance_scale` needs.
        caption_cleaning: how captions were cleaned in training, and so how prompts are: "full", "full_v1" or "light"
            (see `prompt_cleaning`). None: "light", as in diffusers' pipeline of this name.

    Raises:
        ValueError: an argument that is not as described, or a scheduler for another prediction.
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
    ):
        super().__init__()
        prompt_max_tokens = check_count("prompt_max_tokens", prompt_max_tokens)
        self.register_modules(
            transformer=transformer, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(prompt_max_tokens=prompt_max_tokens)
        self._setup(default_sample_size, noise_scale, prediction_type, token_route, caption_cleaning)
        if transformer is not None and transformer.config["in_channels"] != 3:
            raise ValueError(
                f"`transformer` was made for {transformer.config['in_channels']} channels (`in_channels`); pixels have"
                " 3. One for latents belongs in a PRXPipeline, with its `vae`."
            )

    @property
    def vae_scale_factor(self) -> int:
        return 1

    @property
    def stock_can_express(self) -> bool:
        return self.config["prediction_type"] == "x_prediction"

    @property
    def max_tokens(self) -> int:
        return self.config["prompt_max_tokens"]

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents
