"""The shared part of all PRX pipelines: the call with its denoising loop, saving and loading."""

import copy
import dataclasses
import inspect
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.guiders import BaseGuidance
from diffusers.image_processor import PixArtImageProcessor
from diffusers.utils import logging
from torch.distributed import ProcessGroup

from ..compat import has_cache, randn_tensor, unwrap_compiled
from ..models.token_routing import TokenRoute, sample_route
from ..models.transformer_prx import check_saving
from ..prompt_cleaning import CAPTION_CLEANINGS
from ..resolution_bins import RESOLUTION_BINS
from ..schedulers.diffusers_compat import PREDICTION_TYPES, check_scheduler, cut_schedule, is_stock, set_schedule
from ..schedulers.scheduling_prx import check_count, check_number
from .call_arguments import CallArguments
from .check_finite import FiniteCheck
from .check_inputs import (
    DEFAULT_GUIDANCE_SCALE,
    check_cached_steps,
    check_callback,
    check_callback_result,
    check_embeds,
    check_flag,
    check_generator,
    check_guidance,
    check_guidance_change,
    check_guidance_group,
    check_guider,
    check_latents,
    check_prompts,
    check_self_guidance,
    check_token_route,
)
from .conditioning import (
    Conditioning,
    PromptEmbeddings,
    embeds_guidance,
    encode_conditioning,
    encode_timesteps,
)
from .editing import Edit, KnownLatents, make_edit
from .guidance import check_guide_transformer, check_network_changes, network_changes
from .loading import check_same_kind, resolve_components, storable_copy
from .lora import PRXLoraLoaderMixin, check_adapters, scale_adapters
from .parallel import gather_branches, share_noise
from .picture_settings import attach_settings, find_seeds
from .pipeline_output import PRXPipelineOutput
from .presets import check_preset_steps, complete_preset_steps
from .prompt_encoding import PRXPromptMixin
from .single_file import PRXSingleFileLoaderMixin
from .words import (
    LongPrompts,
    PromptEnhancer,
    Regions,
    check_regions,
    enhance_prompts,
    region_tokens,
)

logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class _CallState(threading.local):
    """State of the call that runs, or ran last, in this thread; each thread that shares a pipeline has its own."""

    guidance_scale: float = 1.0
    num_timesteps: int = 0
    current_timestep: torch.Tensor | None = None
    interrupt: bool = False

    def __init__(self) -> None:
        self.finite_check = FiniteCheck()

    def begin(self, guidance_scale: float, num_timesteps: int) -> None:
        self.guidance_scale = guidance_scale
        self.num_timesteps = num_timesteps
        self.interrupt = False
        self.finite_check = FiniteCheck(num_timesteps)

    def begin_step(self, index: int, timestep: torch.Tensor) -> None:
        self.current_timestep = timestep
        self.finite_check.step = index + 1

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # a copied or unpickled pipeline starts with a fresh state


@dataclasses.dataclass(frozen=True)
class _Guidance:
    """Guidance settings of one call. `guidance_scale` is part of `_CallState`: a callback may change it.

    Args:
        self_guidance_scale: weight of TREAD's self-guidance; 1 is off.
        guider: guider of diffusers in place of `guidance_scale`, or None. A copy: it keeps state.
        process_group: two processes that share the two branches, or None.
        generator: source of the routes of self-guidance.
        guide_transformer: weaker network that predicts in place of the negative prompt, or None.
        start_scale: `guidance_scale` of the first step, or the guider's.
    """

    self_guidance_scale: float
    guider: BaseGuidance | None
    process_group: ProcessGroup | None
    generator: torch.Generator | list[torch.Generator] | None
    guide_transformer: Any
    start_scale: float

    @classmethod
    def of(cls, call: CallArguments) -> "_Guidance":
        scale = float(call.guidance_scale)
        if call.guider is not None:  # one that has several scales keeps them to itself
            scale = float(call.guider.config.get("guidance_scale", scale))
        return cls(
            float(call.self_guidance_scale),
            copy.deepcopy(call.guider),
            call.guidance_group,
            call.generator,
            call.guide_transformer,
            scale,
        )

    def describe(self, guidance_scale: float) -> str:
        """Return the setting that guided, for error messages."""
        if self.self_guidance_scale > 1:
            return f"`self_guidance_scale` {self.self_guidance_scale:g}"
        return f"`guidance_scale` {guidance_scale:g}" if self.guider is None else type(self.guider).__name__


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What follows from the arguments of a call.

    Args:
        do_guidance: True if the call needs negative prompts.
        batch_size: B, prompts times images per prompt.
        image_size: (height, width) of the result, in pixels.
        render_size: (height, width) to draw at, in pixels.
        lora_scale: factor of the adapters' weights.
        callback_inputs: names of the tensors that the step callback receives.
    """

    do_guidance: bool
    batch_size: int
    image_size: tuple[int, int]
    render_size: tuple[int, int]
    lora_scale: float
    callback_inputs: list[str]


class PRXPipelineBase(DiffusionPipeline, PRXPromptMixin, PRXLoraLoaderMixin, PRXSingleFileLoaderMixin):
    """The shared part of `PRXPipeline`, `PRXPixelPipeline` and their editing pipelines; use one of these."""

    # diffusers looks for these names, in this order
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]  # noqa: RUF012
    default_prediction_type: ClassVar[str]
    default_resolution: ClassVar[int]

    model_cpu_offload_seq: Any
    transformer: Any
    scheduler: Any
    text_encoder: Any
    tokenizer: Any

    def _setup(
        self,
        default_sample_size: int | None,
        noise_scale: float,
        prediction_type: str | None,
        token_route: tuple[int, int, float] | None,
        caption_cleaning: str | None,
    ) -> None:
        """Check and register the settings that are not components. Call it after `register_modules`."""
        if prediction_type is None:
            # diffusers' own schedulers have a setting of this name with another meaning
            stock = is_stock(self.scheduler)
            prediction_type = self.default_prediction_type if stock else self.scheduler.prediction_type
        if not isinstance(prediction_type, str) or prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"`prediction_type` is {prediction_type!r}; accepted are {list(PREDICTION_TYPES)} and None."
            )
        if self.scheduler is not None:
            check_scheduler(self.scheduler, prediction_type)
        noise_scale = float(check_number("noise_scale", noise_scale, 0, math.inf))
        if default_sample_size is not None:
            default_sample_size = check_count("default_sample_size", default_sample_size)
        self.register_to_config(
            default_sample_size=default_sample_size, noise_scale=noise_scale, prediction_type=prediction_type
        )
        # diffusers warns of these entries, which its own pipelines lack: register them only where they are needed
        if token_route is not None:
            self.register_to_config(token_route=check_token_route(token_route, self.transformer))
        if caption_cleaning not in (None, *CAPTION_CLEANINGS):
            raise ValueError(
                f"`caption_cleaning` is {caption_cleaning!r}; accepted are {list(CAPTION_CLEANINGS)} and None."
            )
        if caption_cleaning not in (None, self.default_caption_cleaning):
            self.register_to_config(caption_cleaning=caption_cleaning)
        self.image_processor = PixArtImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._call = _CallState()

    def _set_presets(self, steps: dict[str, int] | None, guidance_scale: float | None) -> None:
        """Check and register what `apply_preset` reads, as far as it is not None."""
        if steps is not None:
            self.register_to_config(preset_steps=check_preset_steps(steps))
        if guidance_scale is not None:
            self.register_to_config(preset_guidance_scale=check_guidance(guidance_scale, "preset_guidance_scale"))

    # --- what each pipeline defines

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along one side."""
        raise NotImplementedError

    @property
    def is_stock_compatible(self) -> bool:
        """True if stock diffusers' pipeline of this name draws the same with this configuration."""
        raise NotImplementedError

    @property
    def preset_steps(self) -> dict[str, int]:
        """Number of steps of each preset of `apply_preset`: those of the configuration, or of the prediction type."""
        return complete_preset_steps(self.config.get("preset_steps"), self.config["prediction_type"])

    def _check_output_type(self, output_type: str) -> None:
        if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` is {output_type!r}; accepted are {list(OUTPUT_TYPES)}.")

    def _encode(self, pixels_pm1: torch.Tensor) -> torch.Tensor:
        """Encode images (N, 3, H, W) in [-1, 1] to latents (N, C, h, w), float32: the mean of the VAE's codes."""
        raise NotImplementedError

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents (B, C, h, w) to images (B, 3, H, W), float32, about in [-1, 1]."""
        raise NotImplementedError

    # --- state of the call that runs, or ran last, in this thread

    @property
    def guidance_scale(self) -> float:
        """Weight of classifier-free guidance at the current step."""
        return self._call.guidance_scale

    @property
    def _guidance_scale(self) -> float:
        return self._call.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:  # callbacks of diffusers set this name
        self._call.guidance_scale = check_guidance(value)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """True if `guidance_scale` is above 1."""
        return self._call.guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the call."""
        return self._call.num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """Timestep of the current step; None between calls."""
        return self._call.current_timestep

    @property
    def interrupt(self) -> bool:
        """True if a callback has asked to end the call after the current step."""
        return self._call.interrupt

    @property
    def _interrupt(self) -> bool:
        return self._call.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self._call.interrupt = bool(value)

    # --- saving and loading

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """Make a pipeline from the components of another one, as `DiffusionPipeline.from_pipe` does.

        Both pipelines share the networks, which stay as they are (diffusers casts them to float32 by default); `dtype`
        casts them for both pipelines.

        Args:
            pipeline: pipeline of the same kind, ours or diffusers'; for text to image or for editing.
            kwargs: components and settings to replace.

        Raises:
            ValueError: if one of the pipelines draws in latents and the other in pixels.

        Example:
            >>> fast = PRXPipeline.from_pipe(pipe, scheduler=fast_scheduler())
        """
        check_same_kind(cls, pipeline)
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        # diffusers keeps settings that a pipeline does not have under a name with an underscore
        stored = {name.removeprefix("_"): value for name, value in pipeline.config.items()}
        given = stored | dict(pipeline.config) | pipeline.components
        names = inspect.signature(cls.__init__).parameters.keys()
        new = cls(**{name: given[name] for name in names if name in given} | kwargs)
        if "name_or_path" in stored:
            new.register_to_config(_name_or_path=stored["name_or_path"])
        return new if dtype is None else new.to(dtype=dtype)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Load a configuration as `ConfigMixin.load_config` does, and resolve our own classes (see `loading`)."""
        loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        path = str(pretrained_model_name_or_path)
        folder = path if os.path.isdir(path) else os.path.dirname(path) if os.path.isfile(path) else None
        if isinstance(loaded, tuple):
            return (resolve_components(cls, loaded[0], folder), *loaded[1:])
        return resolve_components(cls, loaded, folder)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save the pipeline as `DiffusionPipeline.save_pretrained` does.

        Stock diffusers loads the folder without this package if `is_stock_compatible`.

        Args:
            save_directory: folder to write.
            args, kwargs: other arguments of `DiffusionPipeline.save_pretrained`.

        Raises:
            ValueError: if the transformer has adapters, or a component was quantized after loading or is offloaded to
                disk. Nothing is written.

        Example:
            >>> pipe.save_pretrained("my-prx")
            >>> pipe = PRXPipeline.from_pretrained("my-prx")
        """
        for name, component in self.components.items():
            if isinstance(component, torch.nn.Module):
                check_saving(name, unwrap_compiled(component))
        DiffusionPipeline.save_pretrained(storable_copy(self), str(save_directory), *args, **kwargs)

    # --- latents

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Draw the initial latents: noise times `noise_scale`, or the `latents` given.

        Args:
            batch_size: B.
            num_channels_latents: C.
            height, width: size of the images in pixels.
            dtype: dtype of the draw; the result is float32.
            device: device of the result.
            generator: one torch generator, or one per image.
            latents: (B, C, h, w) to use instead, already scaled by `noise_scale`.

        Returns:
            (B, C, h, w), float32.

        Raises:
            ValueError: if `latents` have another shape, hold integers or are not finite.

        Example:
            >>> latents = pipe.prepare_latents(1, 16, 512, 512, torch.bfloat16, pipe.device)
            >>> image = pipe("a red cat", height=512, width=512, latents=latents).images[0]
        """
        shape = (batch_size, num_channels_latents, height // self.vae_scale_factor, width // self.vae_scale_factor)
        if latents is None:
            noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
            return noise.float() * self.config["noise_scale"]
        check_latents(latents, shape)
        return latents.to(device, torch.float32)

    def _image_sizes(
        self, height: int | None, width: int | None, use_resolution_binning: bool | None
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the size of the result and the size to draw at, each (height, width) in pixels."""
        default = self.config["default_sample_size"] or self.default_resolution
        height = default if height is None else height
        width = default if width is None else width
        height, width = check_count("height", height), check_count("width", width)
        bins = RESOLUTION_BINS.get(default)
        if use_resolution_binning and bins is None:
            raise ValueError(
                f"`use_resolution_binning` is True, but a `default_sample_size` of {default} has no bins; accepted are"
                f" {list(RESOLUTION_BINS)}. Leave it out or set it to False."
            )
        if bins is not None and use_resolution_binning is not False:
            return (height, width), self.image_processor.classify_height_width_bin(height, width, ratios=bins)
        multiple = self.vae_scale_factor * self.transformer.config["patch_size"]
        if height % multiple or width % multiple:
            raise ValueError(
                f"`height` and `width` (without them: the size of `image`, if there is one) are {height} and {width};"
                f" both have to be multiples of {multiple} (`vae_scale_factor` x the transformer's patch size)."
            )
        return (height, width), (height, width)

    # --- the call

    def __call__(
        self,
        prompt: str | list[str] | None = None,
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
        use_resolution_binning: bool | None = None,
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
        """Draw images. Several threads may call one pipeline at the same time.

        Args:
            prompt: one prompt or a list of P prompts; or pass `prompt_embeds`.
            negative_prompt: text that guidance leads away from: one for all prompts, or a list of P. Unused without
                guidance.
            height: height in pixels; `default_sample_size` when None. Without resolution bins it must be a multiple of
                `vae_scale_factor` times the transformer's patch size.
            width: width in pixels, likewise.
            num_inference_steps: number of denoising steps, at least 1. Unused with `timesteps` or `sigmas`.
            timesteps: custom timesteps, 1000 * noise level, strictly decreasing.
            guidance_scale: weight w of classifier-free guidance (arXiv 2207.12598), negative + w (positive -
                negative). 1 and 0 switch it off, and the transformer runs on half the batch. Other values below 1 are
                an error, as in diffusers' PRX. A transformer with `guidance_embeds` takes w as an input and needs no
                negative prompt.
            num_images_per_prompt: images per prompt, in the order p0, p0, p1, p1.
            generator: one torch generator, or one per image, in that order.
            latents: initial noise (B, C, h, w), already scaled by `noise_scale`.
            prompt_embeds: (P, L, D), encoded prompts in place of `prompt`, with `prompt_attention_mask`.
            negative_prompt_embeds: (P, L', D), in place of `negative_prompt`.
            prompt_attention_mask: (P, L), true where a token counts; None: all count.
            negative_prompt_attention_mask: (P, L').
            output_type: "pil", "np" (B, H, W, 3) or "pt" (B, 3, H, W), both in [0, 1], or "latent".
            return_dict: False to return a plain tuple.
            use_resolution_binning: draw at the trained size of the nearest aspect ratio, then resize and crop to
                `height` and `width`. None: True if `default_sample_size` has such sizes (256, 512, 1024).
            callback_on_step_end: function f(pipeline, step, timestep, tensors), called after each step. Tensors in the
                dict that it returns replace ours. `pipeline._interrupt = True` ends the call after this step.
                `pipeline._guidance_scale = 2.0` changes the guidance of later steps; 0 or 1 ends it, as diffusers'
                SDCFGCutoffCallback does (the call must have started with guidance). Do not change weights or adapters:
                the text is projected before the first step.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback receives, out of "latents",
                "prompt_embeds" and "negative_prompt_embeds"; ["latents"] when None.
            tokenizer_max_length: number of text tokens; the pipeline's own when None.
            skip_text_cleaning: True: only repair Unicode and HTML in the prompts. False: clean them fully. None: clean
                them as the captions in training (`caption_cleaning` of the pipeline).
            sigmas: custom noise levels, strictly decreasing, in (0, 1]. Our schedulers use them as they are;
                diffusers' own apply their shift to them.
            self_guidance_scale: weight s >= 1 of TREAD's self-guidance (arXiv 2501.04765), routed + s (full - routed),
                both with the prompt; 1 is off. `routed` is the prediction with some tokens led around the blocks of
                `token_route`, drawn anew at each step from `generator`. It replaces classifier-free guidance (set
                `guidance_scale=1`) and costs as much.
            guider: guider of diffusers with its own scale, in place of `guidance_scale` (leave that out):
                ClassifierFreeGuidance with `start` and `stop`, the fractions of the steps between which it guides
                (arXiv 2404.07724; at other steps the transformer runs on half the batch),
                ClassifierFreeZeroStarGuidance (arXiv 2503.18886), AdaptiveProjectedGuidance (arXiv 2410.02416), or
                another that combines a prediction with the prompt and one with the negative prompt; or one that
                changes the network: SkipLayerGuidance, PerturbedAttentionGuidance (arXiv 2403.17377), or AutoGuidance
                with a dropout of 1. It receives velocities, whatever the transformer predicts. The call uses a copy.
            guidance_group: group of two `torch.distributed` processes that make this call together, with the same
                arguments. The first predicts with the negative prompt, the second with the prompt, and both return the
                images. Make one call at a time. The initial noise is the first process's.
            attention_kwargs: `{"scale": s}` multiplies the weights of all LoRA adapters by s in this call. With an s
                other than 1, make one call at a time: the adapters belong to the transformer.
            guide_transformer: weaker PRX transformer, such as an earlier checkpoint of the same run or a smaller one,
                on the same device (AutoGuidance, arXiv 2406.02507). It predicts with the prompt, and
                `guidance_scale` or `guider` lead away from it in place of the negative prompt, which is unused.
            long_prompts: what to do with prompts of more than the model's number of text tokens: "cut" them with a
                warning, or encode them in "windows" of this length, whose tokens stand side by side.
            prompt_weights: True to read `(words:1.3)` in prompts: the values of these tokens are multiplied by the
                number, between 0 and 10, and nothing else changes. False: parentheses are text.
            regions: prompts for parts of the picture: [("a red cat", area), ...]. An area is a box (left, top, right,
                bottom) in fractions of the picture, or a mask: PIL image, array or tensor (height, width), at least
                0.5 (128 of 255) where the region is. Image tokens in a region read its prompt in place of `prompt`;
                in several regions, the prompts of all of them. The same for all prompts of the call.
            prompt_enhancer: function from a list of prompts to a list of longer ones, such as `PromptEnhancer`; the
                call draws these. Not used for negative prompts and regions.
            settings_in_image: True to put the settings of this call into `info["prx"]` of PIL images, see
                `save_with_settings` and `read_settings`.

        Returns:
            `PRXPipelineOutput`, or a tuple of its images.

        Raises:
            ValueError: if an argument is not as described, or a component returns NaN or infinite values. The message
                names the argument and what is accepted, or the component.

        Example:
            >>> image = pipe("A rusty, vintage tram on a sandy beach", guidance_scale=5.0).images[0]
            >>> images = pipe(["a cat", "a dog"], num_images_per_prompt=2, height=512, width=704).images
        """
        return self._draw(CallArguments.collect(locals()))

    @torch.no_grad()
    def _draw(self, call: CallArguments, edit: Edit | None = None) -> PRXPipelineOutput | tuple[Any]:
        """Run one call: of text to image, or of an editing pipeline with its `edit`."""
        # 1. Check the arguments.
        plan = self._check_call(call, edit)

        # 2. Prepare the state of this call. Copies, so that calls in several threads do not touch each other.
        strength = 1.0 if edit is None else edit.strength
        scheduler = self._copy_scheduler(call.num_inference_steps, call.timesteps, call.sigmas, strength)
        num_steps = len(scheduler.timesteps)
        guidance = _Guidance.of(call)
        self._call.begin(guidance.start_scale, num_steps)
        finite_check = self._call.finite_check
        seeds = find_seeds(call.generator, plan.batch_size)

        # 3. Encode the prompts.
        call = dataclasses.replace(call, prompt=enhance_prompts(call.prompt, call.prompt_enhancer))
        embeddings = self._encode_call(call, plan)

        # 4. Draw the noise. An edit mixes it with its images.
        noise = self._draw_noise(call, plan, embeddings.prompt_embeds.dtype)  # (B, C, h, w), float32
        known = None if edit is None else self._encode_edit(edit, noise)
        latents = noise if known is None else known.at(strength)  # (B, C, h, w)

        # 5. Denoise.
        if has_cache(self.transformer):
            self.transformer._reset_stateful_cache()  # the call before may have ended in an error
        finite_check.record("latents", latents)
        with scale_adapters(self.transformer, plan.lora_scale), self.progress_bar(total=num_steps) as progress_bar:
            conditioning = self._encode_conditioning(embeddings, latents, guidance)
            times = self._encode_times(scheduler, latents)
            for i, t in enumerate(scheduler.timesteps):
                self._call.begin_step(i, t)
                prediction = self._predict_guided(i, latents, scheduler, times[i], conditioning, guidance)
                latents = scheduler.step(prediction, t, latents, return_dict=False)[0]  # (B, C, h, w)
                if known is not None:
                    latents = known.restore(latents, scheduler.sigmas[i + 1])  # (B, C, h, w)
                finite_check.record("latents", latents)
                if call.callback_on_step_end is not None:
                    old_scale = self.guidance_scale
                    latents, changed = self._run_callback(call, plan, i, t, latents, embeddings, guidance)
                    if self.guidance_scale != old_scale and embeds_guidance(self.transformer):
                        times = self._encode_times(scheduler, latents)
                    if changed is not embeddings:
                        embeddings = changed
                        conditioning = self._encode_conditioning(embeddings, latents, guidance)
                progress_bar.update()
                if self.interrupt:
                    break
        self._call.current_timestep = None
        finite_check.check(self.transformer, scheduler, guidance.describe(self._call.guidance_scale))

        # 6. Decode.
        images: Any = latents
        if call.output_type != "latent":
            images = self._decode_images(latents, call.output_type, plan, edit)
        if call.output_type == "pil" and call.settings_in_image is not False:
            height, width = plan.image_size
            settings = call.describe() | {"guidance_scale": guidance.start_scale, "height": height, "width": width}
            settings["strength"] = None if edit is None else strength
            negative_prompt = call.negative_prompt if plan.do_guidance else None
            attach_settings(self, images, call.prompt, negative_prompt, seeds, **settings)
        self.maybe_free_model_hooks()
        return PRXPipelineOutput(images=images) if call.return_dict else (images,)

    # --- parts of the call

    def _check_call(self, call: CallArguments, edit: Edit | None) -> _Plan:
        """Check the arguments of a call; return what follows from them."""
        self._check_components()
        do_guidance = self._check_guidance(
            call.guidance_scale, call.guider, call.guidance_group, call.self_guidance_scale, call.guide_transformer
        )
        callback_inputs = self._check_callback(call.callback_on_step_end, call.callback_on_step_end_tensor_inputs)
        self._check_output_type(call.output_type)
        lora_scale = check_adapters(self.transformer, call.attention_kwargs)
        check_count("num_inference_steps", call.num_inference_steps)
        num_images_per_prompt = check_count("num_images_per_prompt", call.num_images_per_prompt)
        for name in ("return_dict", "use_resolution_binning", "settings_in_image"):
            check_flag(name, getattr(call, name))
        call.text_settings.check()
        check_regions(call.regions)
        if call.prompt_weights and call.prompt is None:
            raise ValueError("`prompt_weights` needs `prompt`: leave it out with `prompt_embeds`.")
        embeds, mask, negative_embeds, negative_mask = call.given_embeddings
        text_width = self.transformer.config["context_in_dim"]
        check_embeds("prompt", embeds, mask, text_width)
        check_embeds("negative_prompt", negative_embeds, negative_mask, text_width)
        num_prompts = check_prompts(do_guidance, call.prompt, call.negative_prompt, embeds, negative_embeds)
        batch_size = num_prompts * num_images_per_prompt
        check_generator(call.generator, batch_size, self._execution_device)
        image_size, render_size = self._image_sizes(call.height, call.width, call.use_resolution_binning)
        if edit is not None:
            edit.check_count(num_prompts)
        return _Plan(do_guidance, batch_size, image_size, render_size, lora_scale, callback_inputs)

    def _check_components(self) -> None:
        for name in ("transformer", "scheduler"):
            if getattr(self, name) is None:
                raise ValueError(f"The pipeline has no `{name}`, which a call needs: load or make it with one.")

    def _make_edit(
        self,
        image: Any,
        strength: float,
        height: int | None,
        width: int | None,
        mask_image: Any = None,
        padding_mask_crop: int | None = None,
    ) -> Edit:
        """Read the arguments of an editing call."""
        self._check_components()
        channels = self.transformer.config["in_channels"]
        return make_edit(
            image, strength, height, width, mask_image, padding_mask_crop, channels, self.vae_scale_factor
        )

    def _check_guidance(
        self,
        guidance_scale: float,
        guider: BaseGuidance | None,
        guidance_group: ProcessGroup | None,
        self_guidance_scale: float,
        guide_transformer: Any,
    ) -> bool:
        """Check the arguments of guidance; return True if the call needs negative prompts."""
        do_guidance, in_group = check_guidance(guidance_scale) > 1, guidance_group is not None
        if embeds_guidance(self.transformer):
            others = {"guider": guider, "guidance_group": guidance_group, "guide_transformer": guide_transformer}
            given = [name for name, value in others.items() if value is not None]
            given += ["self_guidance_scale"] if self_guidance_scale != 1 else []
            if given:
                raise ValueError(
                    f"`{given[0]}` is given, but the transformer takes the guidance scale as an input"
                    " (`guidance_embeds`): leave it out."
                )
            return False
        if guider is not None:
            check_guider(guider, guidance_scale, has_cache(self.transformer))
            changes = network_changes(guider)
            check_network_changes(changes, guider, self.transformer, in_group)
            do_guidance = True
        if guide_transformer is not None:
            check_guide_transformer(guide_transformer, self, do_guidance, network_changes(guider), in_group)
            check_self_guidance(self_guidance_scale, self.config.get("token_route"), do_guidance, self.transformer)
            return False
        check_guidance_group(guidance_group, do_guidance, self.transformer)
        check_self_guidance(self_guidance_scale, self.config.get("token_route"), do_guidance, self.transformer)
        return do_guidance

    def _check_callback(self, callback: Any, names: list[str] | None) -> list[str]:
        """Check a step callback; return the names of the tensors that it receives."""
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            names = callback.tensor_inputs
        names = ["latents"] if names is None else names
        check_callback(callback, names, self._callback_tensor_inputs)
        return names

    def _copy_scheduler(
        self,
        num_inference_steps: int,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        strength: float,
    ) -> Any:
        """Return a copy of the scheduler with the noise levels of this call, from `strength` down."""
        check_scheduler(self.scheduler, self.config["prediction_type"])
        scheduler = copy.deepcopy(self.scheduler)
        set_schedule(scheduler, num_inference_steps, timesteps, sigmas)
        if strength < 1:
            cut_schedule(scheduler, strength)
        check_cached_steps(self.transformer, len(scheduler.timesteps))
        return scheduler

    def _encode_call(self, call: CallArguments, plan: _Plan) -> PromptEmbeddings:
        """Encode the prompts of a call and of its regions, B rows."""
        members = None
        if call.regions is not None:
            token_size = self.vae_scale_factor * self.transformer.config["patch_size"]
            height, width = plan.render_size
            grid = (height // token_size, width // token_size)
            members = region_tokens(call.regions, grid, plan.image_size, plan.render_size)  # (R, N)
        embeddings = self._encode_prompts(
            call.prompt,
            self._execution_device,
            plan.do_guidance,
            call.negative_prompt,
            call.num_images_per_prompt,
            call.given_embeddings,
            call.text_settings,
            [text for text, _ in call.regions or []],
            members,
        )
        text_width = self.transformer.config["context_in_dim"]
        if embeddings.prompt_embeds.shape[-1] != text_width:
            raise ValueError(
                f"`text_encoder` returns embeddings of width {embeddings.prompt_embeds.shape[-1]}; the transformer"
                f" takes {text_width} (`context_in_dim`)."
            )
        return embeddings

    def _draw_noise(self, call: CallArguments, plan: _Plan, dtype: torch.dtype) -> torch.Tensor:
        """Draw the noise of a call, (B, C, h, w), float32; the first process's in a group."""
        channels, device = self.transformer.config["in_channels"], self._execution_device
        noise = self.prepare_latents(
            plan.batch_size, channels, *plan.render_size, dtype, device, call.generator, call.latents
        )
        return share_noise(noise, self.transformer, call.guidance_group)

    def _encode_edit(self, edit: Edit, noise: torch.Tensor) -> KnownLatents:
        """Encode the images of an edit, each once, and return them with the noise (B, C, h, w) of the call."""
        latents = edit.images.to(noise)  # (N, C, h, w), or (N, 3, H, W) in [0, 1]
        if not edit.is_latent:
            latents = self._encode(latents * 2 - 1)  # (N, C, h, w)
        return KnownLatents.expand(latents, noise, edit.latent_mask(self.vae_scale_factor))

    def _decode_images(self, latents: torch.Tensor, output_type: str, plan: _Plan, edit: Edit | None) -> Any:
        """Decode latents (B, C, h, w) to images of the size and type asked for, inside the images of an edit."""
        images = self._decode(latents)  # (B, 3, H, W)
        height, width = plan.image_size
        if plan.render_size != plan.image_size:
            images = self.image_processor.resize_and_crop_tensor(images, width, height)
        images = self.image_processor.denormalize(images)  # (B, 3, H, W) in [0, 1]
        if edit is not None:
            images = edit.paste(images)
        return self.image_processor.postprocess(images, output_type, do_denormalize=[False] * len(images))

    def _encode_conditioning(
        self, embeddings: PromptEmbeddings, latents: torch.Tensor, guidance: _Guidance
    ) -> Conditioning:
        branches = embeddings.branches(self.transformer.dtype)
        for branch in branches:
            self._call.finite_check.record("text", branch.embeds)
        conditioning = encode_conditioning(self.transformer, branches, *latents.shape[-2:])
        guide = guidance.guide_transformer
        if guide is None:
            return conditioning
        prompts = embeddings.branches(guide.dtype)[-1:]
        return dataclasses.replace(conditioning, guide=encode_conditioning(guide, prompts, *latents.shape[-2:]))

    def _encode_times(self, scheduler: Any, latents: torch.Tensor) -> list[dict[str, Any]]:
        """Return the time arguments of the transformer at each step."""
        scale = max(1.0, self.guidance_scale) if embeds_guidance(self.transformer) else None
        return encode_timesteps(self.transformer, scheduler.sigmas[:-1], latents, scale)

    def _predict_guided(
        self,
        step: int,
        latents: torch.Tensor,
        scheduler: Any,
        time: dict[str, Any],
        conditioning: Conditioning,
        guidance: _Guidance,
    ) -> torch.Tensor:
        """Return the guided prediction (B, C, h, w), float32, in the form that the scheduler steps along."""
        sigma, guidance_scale = scheduler.sigmas[step], self._call.guidance_scale
        if guidance.guider is not None:
            guidance.guider.set_state(step, len(scheduler.timesteps), scheduler.timesteps[step])
            prediction = self._apply_guider(latents, sigma, time, conditioning, guidance)  # (B, C, h, w)
        elif guidance.guide_transformer is not None and guidance_scale > 1:  # AutoGuidance, arXiv 2406.02507
            weak = self._predict_weak(latents, sigma, conditioning, guidance)  # (B, C, h, w)
            prediction = self._predict(latents, time, conditioning)  # (B, C, h, w)
            prediction = weak + guidance_scale * (prediction - weak)  # (B, C, h, w)
        elif conditioning.num_branches == 2 and guidance_scale > 1:
            both = self._predict(latents, time, conditioning, guidance.process_group)  # (2B, C, h, w)
            negative, positive = both.chunk(2)
            prediction = negative + guidance_scale * (positive - negative)  # (B, C, h, w)
        else:  # no guidance, or a callback has ended it
            prediction = self._predict(latents, time, conditioning.branch(-1))  # (B, C, h, w)
        if guidance.self_guidance_scale > 1:  # TREAD, arXiv 2501.04765
            route = self._draw_route(latents, guidance.generator)
            routed = self._predict(latents, time, conditioning, changes={"route": route})  # (B, C, h, w)
            prediction = routed + guidance.self_guidance_scale * (prediction - routed)  # (B, C, h, w)
        if self.config["prediction_type"] == "x_prediction" and is_stock(scheduler):
            # stock schedulers step along a velocity; without a clamp this leads exactly to a perfect x_0
            prediction = (latents - prediction) / sigma
        return prediction

    def _predict(
        self,
        latents: torch.Tensor,
        time: dict[str, Any],
        conditioning: Conditioning,
        process_group: ProcessGroup | None = None,
        transformer: Any = None,
        changes: Mapping[str, Any] = MappingProxyType({}),
    ) -> torch.Tensor:
        """Return the transformer's predictions (G * B, C, h, w), float32, for latents (B, C, h, w) and G branches.

        Of two branches each process of a group predicts one. Another `transformer` may predict in place of the
        pipeline's, and `changes` are arguments that change the network: `route`, `skip_blocks` and others.
        """
        transformer = self.transformer if transformer is None else transformer
        branches = conditioning.num_branches
        if branches == 2 and process_group is not None:
            own = self._predict(latents, time, conditioning.branch(process_group.rank()))  # (B, C, h, w)
            return gather_branches(own, process_group)  # (2B, C, h, w)
        if "timestep" in time:
            time = time | {"timestep": time["timestep"].expand(branches * len(latents))}  # (G * B,)
        # both branches in one call: diffusers' caches then reuse both or neither
        with transformer.cache_context("branches") if has_cache(transformer) else nullcontext():
            prediction = transformer(
                hidden_states=latents.to(transformer.dtype).repeat(branches, 1, 1, 1),  # (G * B, C, h, w)
                return_dict=False,
                **time,
                **conditioning.arguments,
                **changes,
            )[0].float()  # (G * B, C, h, w)
        self._call.finite_check.record("prediction", prediction)
        return prediction

    def _apply_guider(
        self,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        time: dict[str, Any],
        conditioning: Conditioning,
        guidance: _Guidance,
    ) -> torch.Tensor:
        """Return what a guider of diffusers makes of the predictions, (B, C, h, w)."""
        guider: Any = guidance.guider
        x_prediction = self.config["prediction_type"] == "x_prediction"
        inputs = guider.prepare_inputs({})  # one for each prediction that it wants at this step
        names = [getattr(guider_input, guider._identifier_key) for guider_input in inputs]
        predictions = self._predict_each(names, latents, sigma, time, conditioning, guidance)
        for guider_input, name in zip(inputs, names):
            prediction = predictions[name]
            guider_input.noise_pred = (latents - prediction) / sigma if x_prediction else prediction
        velocity = guider(inputs).pred  # (B, C, h, w)
        return latents - sigma * velocity if x_prediction else velocity

    def _predict_each(
        self,
        names: list[str],
        latents: torch.Tensor,
        sigma: torch.Tensor,
        time: dict[str, Any],
        conditioning: Conditioning,
        guidance: _Guidance,
    ) -> dict[str, torch.Tensor]:
        """Return the predictions (B, C, h, w) that a guider wants, by the names that diffusers gives them."""
        changes, has_guide = network_changes(guidance.guider), guidance.guide_transformer is not None
        predictions = {}
        if "pred_uncond" in names and "pred_uncond" not in changes and not has_guide:
            both = self._predict(latents, time, conditioning, guidance.process_group)  # (2B, C, h, w)
            predictions["pred_uncond"], predictions["pred_cond"] = both.chunk(2)  # (B, C, h, w) each
        else:
            predictions["pred_cond"] = self._predict(latents, time, conditioning.branch(-1))  # (B, C, h, w)
        if "pred_uncond" in names and has_guide:
            predictions["pred_uncond"] = self._predict_weak(latents, sigma, conditioning, guidance)  # (B, C, h, w)
        for name in sorted(changes.keys() & set(names)):
            branch = conditioning.branch(0 if name == "pred_uncond" else -1)
            predictions[name] = self._predict(latents, time, branch, changes=changes[name])  # (B, C, h, w)
        return predictions

    def _predict_weak(
        self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning, guidance: _Guidance
    ) -> torch.Tensor:
        """Return the prediction (B, C, h, w) of the weaker network, with the prompt."""
        assert conditioning.guide is not None
        time = {"timestep": sigma[None].to(latents.device)}
        return self._predict(latents, time, conditioning.guide, transformer=guidance.guide_transformer)

    def _draw_route(
        self, latents: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None
    ) -> TokenRoute:
        """Draw a route as in training; which tokens of an image stay depends only on its generator."""
        start, stop, ratio = self.config["token_route"]
        tokens = latents.shape[-2] * latents.shape[-1] // self.transformer.config["patch_size"] ** 2
        # normal numbers are ordered as randomly as uniform ones, and `randn_tensor` takes lists of generators
        scores = randn_tensor((len(latents), tokens), generator, latents.device, torch.float32)  # (B, N)
        return sample_route(scores, ratio, start, stop)

    def _run_callback(
        self,
        call: CallArguments,
        plan: _Plan,
        step: int,
        timestep: torch.Tensor,
        latents: torch.Tensor,
        embeddings: PromptEmbeddings,
        guidance: _Guidance,
    ) -> tuple[torch.Tensor, PromptEmbeddings]:
        """Call the step callback; return the latents and embeddings to continue with."""
        assert call.callback_on_step_end is not None
        old_scale = self._call.guidance_scale
        tensors = {
            "latents": latents,
            "prompt_embeds": embeddings.prompt_embeds,
            "negative_prompt_embeds": embeddings.negative_prompt_embeds,
        }
        given = {name: tensors[name] for name in plan.callback_inputs}
        returned = call.callback_on_step_end(self, step, timestep, given)
        returned = {} if returned is None else returned
        check_callback_result(returned, tensors)
        guided = embeddings.negative_prompt_embeds is not None or guidance.guide_transformer is not None
        guided = guided or embeds_guidance(self.transformer)
        cached = has_cache(self.transformer)
        check_guidance_change(self._call.guidance_scale, old_scale, guided, guidance.guider, cached)
        latents = returned.get("latents", latents).to(latents)
        self._call.finite_check.record("callback", latents)  # the callback may also have written into our tensor
        changed = {
            name: returned[name].to(getattr(embeddings, name))
            for name in ("prompt_embeds", "negative_prompt_embeds")
            if returned.get(name) is not None
        }
        return latents, dataclasses.replace(embeddings, **changed) if changed else embeddings
