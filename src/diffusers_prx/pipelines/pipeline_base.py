"""What both PRX pipelines share: the call, the one denoising loop, the checks, saving and loading."""

import copy
import inspect
import math
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.guiders import BaseGuidance
from diffusers.image_processor import PixArtImageProcessor
from diffusers.utils import logging
from torch.distributed import ProcessGroup

from ..compat import has_cache, is_group_offloaded, randn_tensor, unwrap_compiled
from ..models.token_routing import TokenRoute, sample_route
from ..models.transformer_prx import check_saving
from ..prompt_cleaning import CAPTION_CLEANINGS, CLEANERS, CaptionCleaning
from ..resolution_bins import RESOLUTION_BINS
from ..schedulers.diffusers_compat import PREDICTION_TYPES, check_scheduler, is_stock, set_schedule
from ..schedulers.scheduling_prx import check_count, check_number
from ..text import encode_text, find_cut, tokenize_prompts, trim_text, trim_tokens
from .check_finite import FiniteCheck, check_given, check_output
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
from .loading import check_same_kind, resolve_components, stored_form
from .lora import PRXLoraLoaderMixin, check_adapters, scale_adapters
from .parallel import gather_branches, share_noise, take_branch
from .pipeline_output import PRXPipelineOutput

logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class _CallState(threading.local):
    """What belongs to one call: each thread that shares a pipeline sees its own."""

    guidance_scale: float = 1.0
    num_timesteps: int = 0
    current_timestep: torch.Tensor | None = None
    interrupt: bool = False

    def __init__(self) -> None:
        self.watch = FiniteCheck()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # a copied or unpickled pipeline starts with a state of its own


class PRXPipelineBase(DiffusionPipeline, PRXLoraLoaderMixin):
    """The shared part; use `PRXPipeline` or `PRXPixelPipeline`."""

    # in the order and under the names that diffusers looks for
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]  # noqa: RUF012
    default_prediction_type: ClassVar[str]
    default_resolution: ClassVar[int]
    default_caption_cleaning: ClassVar[CaptionCleaning]

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
        """Check and register what is no component. `register_modules` has to come first."""
        if prediction_type is None:
            # diffusers' solvers have a setting of that name, which says something else
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
        if token_route is not None:  # diffusers warns of an entry that it does not know
            self.register_to_config(token_route=check_token_route(token_route, self.transformer))
        if caption_cleaning not in (None, *CAPTION_CLEANINGS):
            raise ValueError(
                f"`caption_cleaning` is {caption_cleaning!r}; accepted are {list(CAPTION_CLEANINGS)} and None."
            )
        if caption_cleaning not in (None, self.default_caption_cleaning):  # diffusers warns of this one too
            self.register_to_config(caption_cleaning=caption_cleaning)
        self.image_processor = PixArtImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._call = _CallState()

    # What the two pipelines differ in.

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, along one side."""
        raise NotImplementedError

    @property
    def stock_can_express(self) -> bool:
        """Whether stock diffusers' pipeline of this name draws the same with this configuration."""
        raise NotImplementedError

    @property
    def max_tokens(self) -> int:
        """The number of tokens that the text encoder is given, unless the call says otherwise."""
        raise NotImplementedError

    @property
    def caption_cleaning(self) -> CaptionCleaning:
        """Cleaning of prompts, that of the captions in training (see `prompt_cleaning`)."""
        return self.config.get("caption_cleaning") or self.default_caption_cleaning

    def _check_output_type(self, output_type: str) -> None:
        if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` is {output_type!r}; accepted are {list(OUTPUT_TYPES)}.")

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), float32, about in [-1, 1], of the final latents."""
        raise NotImplementedError

    # The state of the call that runs, or ran last, in this thread.

    @property
    def guidance_scale(self) -> float:
        return self._call.guidance_scale

    @property
    def _guidance_scale(self) -> float:
        return self._call.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:  # by this name callbacks of diffusers change it
        self._call.guidance_scale = check_guidance(value)

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._call.guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        return self._call.num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._call.current_timestep

    @property
    def interrupt(self) -> bool:
        return self._call.interrupt

    @property
    def _interrupt(self) -> bool:
        return self._call.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self._call.interrupt = bool(value)

    # Saving and loading.

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """Make a pipeline as `DiffusionPipeline.from_pipe` does, from one of the same kind.

        Both pipelines hold the same networks. These keep their dtypes, unless you pass `dtype`, which changes both
        pipelines (diffusers casts to float32 by default).

        Raises:
            ValueError: a pipeline of another kind: its network predicts something else, in another space.
        """
        check_same_kind(cls, pipeline)
        networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        if kwargs.keys() & {"dtype", "torch_dtype"}:
            networks = []
        # one by one: a text encoder in bfloat16 holds some buffers in float32
        dtypes = [[tensor.dtype for tensor in (*part.parameters(), *part.buffers())] for part in networks]
        new = super().from_pipe(pipeline, **kwargs)
        for part, before in zip(networks, dtypes):
            for tensor, dtype in zip((*part.parameters(), *part.buffers()), before):
                if tensor.dtype != dtype:  # float32 holds every narrower number, so the way back is exact
                    tensor.data = tensor.data.to(dtype)
        return new

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As `ConfigMixin.load_config`, with the entries of our own classes in place (see `loading`)."""
        loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        path = str(pretrained_model_name_or_path)
        folder = path if os.path.isdir(path) else os.path.dirname(path) if os.path.isfile(path) else None
        if isinstance(loaded, tuple):
            return (resolve_components(cls, loaded[0], folder), *loaded[1:])
        return resolve_components(cls, loaded, folder)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As `DiffusionPipeline.save_pretrained`; what stock diffusers can express, it loads without this package.

        Raises:
            ValueError: the transformer has adapters, whose layers a saved transformer has no place for, or a component
                is offloaded to disk, so that its weights are not in memory to be saved. Nothing is written.
        """
        for name, component in self.components.items():
            if isinstance(component, torch.nn.Module):
                check_saving(name, unwrap_compiled(component))
        DiffusionPipeline.save_pretrained(stored_form(self), str(save_directory), *args, **kwargs)

    # Text.

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        device: torch.device | None = None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = "",
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        tokenizer_max_length: int | None = None,
        skip_text_cleaning: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Encode prompts, or take embeddings that were made before. Arguments as in the call.

        Returns:
            Embeddings (B, L, D) and bool mask (B, L) of the prompts, B = prompts x images in the order p0, p0, p1, p1,
            and the same of the negative prompts, or None twice without guidance. Both have the same L; padding that
            no row needs is cut away.

        Raises:
            ValueError: an argument that is not as described, a text to encode without a `text_encoder` or `tokenizer`,
                or embeddings that are not finite.
        """
        num_images_per_prompt = check_count("num_images_per_prompt", num_images_per_prompt)
        check_flag("skip_text_cleaning", skip_text_cleaning)
        text_width = None if self.transformer is None else self.transformer.config["context_in_dim"]
        check_embeds("prompt", prompt_embeds, prompt_attention_mask, text_width)
        check_embeds("negative_prompt", negative_prompt_embeds, negative_prompt_attention_mask, text_width)
        check_prompts(False, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        device = self._execution_device if device is None else device
        texts: list[str] = [prompt] if isinstance(prompt, str) else list(prompt or [])
        rows = len(texts) if prompt_embeds is None else len(prompt_embeds)
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            single = negative_prompt is None or isinstance(negative_prompt, str)
            texts += [negative_prompt or ""] * rows if single else list(negative_prompt)  # type: ignore[list-item, arg-type]
        parts: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        if texts:
            embeds, mask = self._encode_texts(texts, device, tokenizer_max_length, skip_text_cleaning)
            parts = list(zip(embeds.split(rows), mask.split(rows)))
        if prompt_embeds is not None:
            check_given("prompt_embeds", prompt_embeds)
            parts.insert(0, (prompt_embeds, prompt_attention_mask))
        if do_classifier_free_guidance and negative_prompt_embeds is not None:
            check_given("negative_prompt_embeds", negative_prompt_embeds)
            parts.append((negative_prompt_embeds, negative_prompt_attention_mask))
        embeds, joined = _join([_with_mask(embeds.to(device), mask) for embeds, mask in parts])
        embeds, trimmed = trim_text(embeds, joined)
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=device) if trimmed is None else trimmed
        embeds = embeds.repeat_interleave(num_images_per_prompt, dim=0)
        mask = mask.repeat_interleave(num_images_per_prompt, dim=0)
        if not do_classifier_free_guidance:
            return embeds, mask, None, None
        (positive, negative), (positive_mask, negative_mask) = embeds.chunk(2), mask.chunk(2)
        return positive, positive_mask, negative, negative_mask

    def _encode_texts(
        self, texts: list[str], device: torch.device, max_length: int | None, skip_text_cleaning: bool | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for name in ("text_encoder", "tokenizer"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"The pipeline has no `{name}`, but there are {len(texts)} prompts to encode: load it with one, or"
                    " pass `prompt_embeds`, and with guidance `negative_prompt_embeds`."
                )
        cleaning = self.caption_cleaning
        if skip_text_cleaning:
            cleaning = "light"
        elif skip_text_cleaning is not None and cleaning == "light":
            cleaning = "full_v1"  # as diffusers does then
        clean = CLEANERS[cleaning]
        for text in dict.fromkeys(texts):
            if text.strip() and not clean(text):
                remedy = "" if cleaning == "light" else " Pass `skip_text_cleaning=True` to keep it."
                logger.warning(
                    f"Nothing is left of the prompt {_shortened(text)} after cleaning (`caption_cleaning` is"
                    f" {cleaning!r}): it is drawn as an empty prompt.{remedy}"
                )
        max_length = self.max_tokens if max_length is None else check_count("tokenizer_max_length", max_length)
        input_ids, mask = tokenize_prompts(self.tokenizer, texts, max_length, clean)
        if cut := sum(find_cut(self.tokenizer, texts, mask, clean)):
            logger.warning(f"{cut} of {len(texts)} prompts are longer than {max_length} tokens and were cut there.")
        input_ids, mask = trim_tokens(input_ids, mask)
        # each text once, however often it came: a negative prompt is mostly the same for the whole batch
        first = {text: row for row, text in reversed(list(enumerate(texts)))}
        once = sorted(first.values())
        rows = [once.index(first[text]) for text in texts]
        mask = mask.to(device)
        embeds = encode_text(self.text_encoder, input_ids[once].to(device), mask[once])
        check_output("text_encoder", self.text_encoder, embeds)
        return embeds[rows], mask

    # Latents.

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
        """The first noise (B, C, h, w) in float32: `noise_scale` times a draw in `dtype`, or the `latents` given.

        Raises:
            ValueError: `latents` of another shape, of whole numbers, or not finite.
        """
        shape = (batch_size, num_channels_latents, height // self.vae_scale_factor, width // self.vae_scale_factor)
        if latents is None:
            noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
            return noise.float() * self.config["noise_scale"]
        check_latents(latents, shape)
        return latents.to(device, torch.float32)

    def _sizes(
        self, height: int | None, width: int | None, use_resolution_binning: bool | None
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """The size asked for and the size to draw at, (height, width) in pixels."""
        default = self.config["default_sample_size"] or self.default_resolution
        height = default if height is None else height
        width = default if width is None else width
        height, width = check_count("height", height), check_count("width", width)
        bins = RESOLUTION_BINS.get(default)
        if use_resolution_binning and bins is None:
            raise ValueError(
                f"`use_resolution_binning` is True, but there are no bins for a `default_sample_size` of {default};"
                f" there are for {list(RESOLUTION_BINS)}. Leave it out or set it to False."
            )
        if bins is not None and use_resolution_binning is not False:
            return (height, width), self.image_processor.classify_height_width_bin(height, width, ratios=bins)
        multiple = self.vae_scale_factor * self.transformer.config["patch_size"]
        if height % multiple or width % multiple:
            raise ValueError(
                f"`height` and `width` are {height} and {width}; both have to be multiples of {multiple}"
                " (`vae_scale_factor` x the transformer's patch size)."
            )
        return (height, width), (height, width)

    # The call.

    @torch.no_grad()
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
    ) -> PRXPipelineOutput | tuple[Any]:
        """Draw images. Several threads may call one pipeline at the same time.

        Args:
            prompt: one prompt or a list of them; or give `prompt_embeds`.
            negative_prompt: what guidance leads away from: one for all prompts, or one for each. Not used without
                guidance.
            height: in pixels; `default_sample_size` when None. Without resolution bins it has to be a multiple of
                `vae_scale_factor` times the transformer's patch size.
            width: as `height`.
            num_inference_steps: number of denoising steps, at least 1. Not used with `timesteps` or `sigmas`.
            timesteps: custom timesteps, 1000 x noise level, strictly decreasing.
            guidance_scale: weight w of classifier-free guidance (arXiv 2207.12598), negative + w (positive -
                negative); at 1, or at 0 as elsewhere in diffusers, it is off and the network runs on half the batch.
                Other values below 1 are refused, as by diffusers' PRX.
            num_images_per_prompt: images for each prompt, in the order p0, p0, p1, p1.
            generator: one torch generator, or one for each image, in that order.
            latents: (B, C, h, w), the first noise, already scaled by `noise_scale`.
            prompt_embeds: (P, L, D), encoded prompts in place of `prompt`, with `prompt_attention_mask`.
            negative_prompt_embeds: (P, L', D), in place of `negative_prompt`.
            prompt_attention_mask: (P, L), true where a token counts; None when all do.
            negative_prompt_attention_mask: (P, L').
            output_type: "pil", "np" (B, H, W, 3) or "pt" (B, 3, H, W), both in [0, 1], or "latent".
            return_dict: a plain tuple when False.
            use_resolution_binning: draw at the trained size of the nearest aspect ratio, then resize and crop to the
                size asked for. None: yes where `default_sample_size` has such sizes (256, 512, 1024).
            callback_on_step_end: called as f(pipeline, step, timestep, tensors) after each step; the tensors it
                returns, in a dict, take the place of ours. `pipeline._interrupt = True` in it ends the call after
                this step; `pipeline._guidance_scale = 2.0` changes the guidance of the steps that follow, and 0 or 1
                ends it (in a call that began with it; diffusers' SDCFGCutoffCallback does so). Weights and adapters
                have to stay as they are: the text was projected at the beginning.
            callback_on_step_end_tensor_inputs: which of "latents", "prompt_embeds", "negative_prompt_embeds" the
                callback is given; the latents when None.
            tokenizer_max_length: number of text tokens, in place of the pipeline's own.
            skip_text_cleaning: True: only repair Unicode and HTML in the prompts; False: clean them fully; None: clean
                them as the captions were in training (`caption_cleaning` of the pipeline).
            sigmas: custom noise levels, strictly decreasing, in (0, 1]. Used as they are by our schedulers; diffusers'
                own apply their shift to them.
            self_guidance_scale: weight s of TREAD's self-guidance (arXiv 2501.04765), routed + s (full - routed), both
                with the prompt. `routed` is the network with a part of the tokens led around the blocks of
                `token_route`, drawn anew at each step from `generator`; at 1, the least, it is off. It takes the place
                of classifier-free guidance (set `guidance_scale=1`) and costs as much.
            guider: one of diffusers' guiders with its own scale, in place of `guidance_scale` (leave that out):
                ClassifierFreeGuidance with `start` and `stop`, the shares of the steps between which it guides (arXiv
                2404.07724; at the others the network runs on half the batch), ClassifierFreeZeroStarGuidance (arXiv
                2503.18886), AdaptiveProjectedGuidance (arXiv 2410.02416), or another that combines a prediction with
                the prompt and one with the negative prompt. It is given velocities, whatever the network predicts. The
                call works on a copy.
            guidance_group: two processes of `torch.distributed` that make this call together, with the same arguments:
                the first predicts with the negative prompt, the second with the prompt, and both have the images. With
                one call at a time; the first noise is the first process's. None: this process does both.
            attention_kwargs: `{"scale": s}` multiplies the weights of all LoRA adapters by s in this call. The
                adapters are the transformer's: with an s other than 1, make one call at a time.

        Returns:
            `PRXPipelineOutput`, or a tuple of its images.

        Raises:
            ValueError: an argument that is not as described, and the message says what is accepted; or a component
                that gives NaN or infinite values, which the message names.
        """
        # 1. Arguments.
        for name in ("transformer", "scheduler"):
            if getattr(self, name) is None:
                raise ValueError(f"The pipeline has no `{name}`, which a call needs: load or make it with one.")
        guidance_scale = check_guidance(guidance_scale)
        guided = (
            guidance_scale > 1 if guider is None else check_guider(guider, guidance_scale, has_cache(self.transformer))
        )
        check_guidance_group(guidance_group, guided, self.transformer)
        check_self_guidance(self_guidance_scale, self.config.get("token_route"), guided, self.transformer)
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        names = ["latents"] if callback_on_step_end_tensor_inputs is None else callback_on_step_end_tensor_inputs
        check_callback(callback_on_step_end, names, self._callback_tensor_inputs)
        self._check_output_type(output_type)
        lora_scale = check_adapters(self.transformer, attention_kwargs)
        num_inference_steps = check_count("num_inference_steps", num_inference_steps)
        num_images_per_prompt = check_count("num_images_per_prompt", num_images_per_prompt)
        check_flag("return_dict", return_dict)
        check_flag("use_resolution_binning", use_resolution_binning)
        check_flag("skip_text_cleaning", skip_text_cleaning)
        text_width = self.transformer.config["context_in_dim"]
        check_embeds("prompt", prompt_embeds, prompt_attention_mask, text_width)
        check_embeds("negative_prompt", negative_prompt_embeds, negative_prompt_attention_mask, text_width)
        prompts = check_prompts(guided, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        batch_size = prompts * num_images_per_prompt
        check_generator(generator, batch_size, self._execution_device)
        size, drawn_size = self._sizes(height, width, use_resolution_binning)

        # 2. State of this call: nothing that another call could touch.
        check_scheduler(self.scheduler, self.config["prediction_type"])
        scheduler = copy.deepcopy(self.scheduler)
        set_schedule(scheduler, num_inference_steps, timesteps, sigmas)
        check_cached_steps(self.transformer, len(scheduler.timesteps))
        # one that has several scales keeps them to itself
        scale = guidance_scale if guider is None else guider.config.get("guidance_scale", guidance_scale)
        self._call.guidance_scale = float(scale)
        self._call.num_timesteps = len(scheduler.timesteps)
        self._call.interrupt = False

        # 3. Text.
        device = self._execution_device
        embeds, mask, negative_embeds, negative_mask = self.encode_prompt(
            prompt,
            device,
            guided,
            negative_prompt,
            num_images_per_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            tokenizer_max_length=tokenizer_max_length,
            skip_text_cleaning=skip_text_cleaning,
        )
        if embeds.shape[-1] != text_width:
            raise ValueError(
                f"`text_encoder` gives embeddings of width {embeds.shape[-1]}; the transformer was made for"
                f" {text_width} (`context_in_dim`)."
            )

        # 4. Noise to latents to images.
        latents = self.prepare_latents(
            batch_size, self.transformer.config["in_channels"], *drawn_size, embeds.dtype, device, generator, latents
        )
        latents = share_noise(latents, self.transformer, guidance_group)
        with scale_adapters(self.transformer, lora_scale):
            latents = self._denoise(
                scheduler,
                latents,
                embeds,
                mask,
                negative_embeds,
                negative_mask,
                self_guidance_scale=float(self_guidance_scale),
                guider=copy.deepcopy(guider),
                guidance_group=guidance_group,
                generator=generator,
                callback=callback_on_step_end,
                callback_names=names,
            )
        images: Any = latents
        if output_type != "latent":
            images = self._decode(latents)
            if drawn_size != size:
                images = self.image_processor.resize_and_crop_tensor(images, size[1], size[0])
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return PRXPipelineOutput(images=images) if return_dict else (images,)

    def _denoise(
        self,
        scheduler: Any,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        mask: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None,
        negative_mask: torch.Tensor | None,
        self_guidance_scale: float,
        guider: Any,
        guidance_group: ProcessGroup | None,
        generator: torch.Generator | list[torch.Generator] | None,
        callback: Callable[..., dict[str, Any] | None] | None,
        callback_names: list[str],
    ) -> torch.Tensor:
        """The denoising loop, from noise (B, C, h, w) to clean latents, float32 but for the network itself."""
        # A stock scheduler steps along a velocity. Without a clamp, (x_t - x_0) / t leads it exactly to a perfect x_0.
        to_velocity = self.config["prediction_type"] == "x_prediction" and is_stock(scheduler)
        if has_cache(self.transformer):
            self.transformer._reset_stateful_cache()  # an error may have ended the call before this one
        branches = 1 if negative_prompt_embeds is None else 2
        watch = self._call.watch = FiniteCheck(len(scheduler.timesteps))
        watch.note("latents", latents)
        text = self._read_text(prompt_embeds, mask, negative_prompt_embeds, negative_mask, latents)
        times = self._read_timesteps(scheduler.sigmas[:-1], latents)

        with self.progress_bar(total=len(scheduler.timesteps)) as progress_bar:
            for i, t in enumerate(scheduler.timesteps):
                self._call.current_timestep = t
                watch.step = i + 1
                sigma = scheduler.sigmas[i]
                guidance_scale = self._call.guidance_scale
                if guider is not None:
                    guider.set_state(i, len(scheduler.timesteps), t)
                    prediction = self._guide(guider, latents, sigma, times[i], text, guidance_group)  # (B, C, h, w)
                elif branches == 2 and guidance_scale > 1:
                    prediction = self._predict(latents, times[i], text, 2, guidance_group)  # (2B, C, h, w)
                    negative, positive = prediction.chunk(2)
                    prediction = negative + guidance_scale * (positive - negative)  # (B, C, h, w)
                else:  # a callback may have ended guidance
                    positive_text = text if branches == 1 else take_branch(text, 1, len(latents))
                    prediction = self._predict(latents, times[i], positive_text, 1, guidance_group)  # (B, C, h, w)
                if self_guidance_scale > 1:  # TREAD, arXiv 2501.04765
                    route = self._draw_route(latents, generator)
                    routed = self._predict(latents, times[i], text, branches, guidance_group, route=route)
                    prediction = routed + self_guidance_scale * (prediction - routed)  # (B, C, h, w)
                if to_velocity:
                    prediction = (latents - prediction) / sigma
                latents = scheduler.step(prediction, t, latents, return_dict=False)[0]
                watch.note("latents", latents)

                if callback is not None:
                    given = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                    }
                    changed = callback(self, i, t, {name: given[name] for name in callback_names})
                    changed = {} if changed is None else changed
                    check_callback_result(changed, given)
                    check_guidance_change(
                        self._call.guidance_scale, guidance_scale, branches == 2, guider, has_cache(self.transformer)
                    )
                    latents = changed.get("latents", latents).to(latents)
                    watch.note("callback", latents)  # it may have written into ours as well
                    texts = {name: changed.get(name) for name in ("prompt_embeds", "negative_prompt_embeds")}
                    if any(value is not None for value in texts.values()):
                        if texts["prompt_embeds"] is not None:
                            prompt_embeds = texts["prompt_embeds"].to(prompt_embeds)
                        if texts["negative_prompt_embeds"] is not None and negative_prompt_embeds is not None:
                            negative_prompt_embeds = texts["negative_prompt_embeds"].to(negative_prompt_embeds)
                        text = self._read_text(prompt_embeds, mask, negative_prompt_embeds, negative_mask, latents)
                progress_bar.update()
                if self.interrupt:
                    break
        self._call.current_timestep = None
        guidance = f"`guidance_scale` {self._call.guidance_scale:g}" if guider is None else type(guider).__name__
        if self_guidance_scale > 1:
            guidance = f"`self_guidance_scale` {self_guidance_scale:g}"
        watch.check(self.transformer, scheduler, guidance)
        return latents

    def _read_text(
        self,
        prompt_embeds: torch.Tensor,
        mask: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None,
        negative_mask: torch.Tensor | None,
        latents: torch.Tensor,
    ) -> dict[str, Any]:
        """The text (B, L, D), behind the negative one where there is one, as arguments of the network.

        Where the network can, that is the keys and values of its blocks, for all steps of the call.
        """
        dtype, (height, width) = self.transformer.dtype, latents.shape[-2:]
        branches = [(prompt_embeds.to(dtype), mask)]
        if negative_prompt_embeds is not None and negative_mask is not None:
            branches.insert(0, (negative_prompt_embeds.to(dtype), negative_mask))
        for embeds, _ in branches:
            self._call.watch.note("text", embeds)
        if _takes_contexts(self.transformer):
            contexts = [
                self.transformer.encode_text_context(
                    *trim_text(*_one_row_if_equal(*branch)), height=height, width=width
                )
                for branch in branches
            ]  # B rows each, or 1 that serves all
            return {"text_context": tuple(contexts)}
        text, masks = (torch.cat(parts) for parts in zip(*branches))  # (B or 2B, L, D)
        # where nothing is padded, attention without a mask is faster
        return {"encoder_hidden_states": text, "attention_mask": None if bool(masks.all()) else masks}

    def _read_timesteps(self, sigmas: torch.Tensor, latents: torch.Tensor) -> list[dict[str, Any]]:
        """The noise level of every step as arguments of the network."""
        sigmas = sigmas.to(latents.device)
        if _takes_contexts(self.transformer):
            times = self.transformer.encode_timesteps(sigmas, *latents.shape[-2:])
            return [{"time_context": times.at(step)} for step in range(len(sigmas))]
        return [{"timestep": sigma[None]} for sigma in sigmas]

    def _predict(
        self,
        latents: torch.Tensor,
        time: dict[str, Any],
        text: dict[str, Any],
        branches: int,
        group: ProcessGroup | None,
        **route: Any,
    ) -> torch.Tensor:
        """What the network predicts, float32, for latents (B, C, h, w) with each branch of the text, 1 or 2; of two
        branches each process of a group predicts one."""
        if branches == 2 and group is not None:
            own = take_branch(text, group.rank(), len(latents))
            return gather_branches(self._predict(latents, time, own, 1, None, **route), group)  # (2B, C, h, w)
        if "timestep" in time:
            time = {"timestep": time["timestep"].expand(branches * len(latents))}  # (B or 2B,)
        # all branches are one call to a cache of diffusers: they are reused together or not at all
        with self.transformer.cache_context("branches") if has_cache(self.transformer) else nullcontext():
            prediction = self.transformer(
                hidden_states=latents.to(self.transformer.dtype).repeat(branches, 1, 1, 1),  # (B or 2B, C, h, w)
                return_dict=False,
                **time,
                **text,
                **route,  # given only where there is one: not every transformer takes it
            )[0].float()  # (B or 2B, C, h, w)
        self._call.watch.note("prediction", prediction)
        return prediction

    def _guide(
        self,
        guider: Any,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        time: dict[str, Any],
        text: dict[str, Any],
        group: ProcessGroup | None,
    ) -> torch.Tensor:
        """What one of diffusers' guiders makes of the predictions (B, C, h, w); it says how many it needs now."""
        x_prediction = self.config["prediction_type"] == "x_prediction"
        inputs = guider.prepare_inputs({})  # with the prompt, then with the negative one
        if len(inputs) == 1:
            text = take_branch(text, 1, len(latents))
        predictions = self._predict(latents, time, text, len(inputs), group).chunk(len(inputs))  # (B, C, h, w) each
        for given, prediction in zip(inputs, reversed(predictions)):
            given.noise_pred = (latents - prediction) / sigma if x_prediction else prediction
        velocity = guider(inputs).pred  # (B, C, h, w)
        return latents - sigma * velocity if x_prediction else velocity

    def _draw_route(
        self, latents: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None
    ) -> TokenRoute:
        """A route as in training: which tokens of an image stay depends on nothing but its generator."""
        start, stop, ratio = self.config["token_route"]
        tokens = latents.shape[-2] * latents.shape[-1] // self.transformer.config["patch_size"] ** 2
        # the order of normal draws is as random as that of uniform ones; one call serves single and listed generators
        scores = randn_tensor((len(latents), tokens), generator, latents.device, torch.float32)  # (B, N)
        return sample_route(scores, ratio, start, stop)


def _shortened(text: str, length: int = 80) -> str:
    return repr(text) if len(text) <= length else f"{text[:length]!r}..."


def _takes_contexts(transformer: Any) -> bool:
    """Whether what no step changes can be computed once for a call.

    Not every transformer takes it: stock's does not. And with group offloading, or sharded over processes, a block's
    weights are there only while the block runs, so that its text is projected then, as in training.
    """
    transformer = unwrap_compiled(transformer)
    parameters = inspect.signature(transformer.forward).parameters
    whole = not is_group_offloaded(transformer) and not hasattr(transformer, "unshard")  # torch's FSDPModule
    return {"text_context", "time_context"} <= parameters.keys() and whole


def _one_row_if_equal(embeds: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first row of a text (B, L, D) and mask (B, L) if all rows are equal, as those of a negative prompt
    mostly are; else all rows."""
    equal = bool((embeds == embeds[:1]).all() and (mask == mask[:1]).all())
    return (embeds[:1], mask[:1]) if equal else (embeds, mask)


def _with_mask(embeds: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    if mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool)
    return embeds, mask.to(embeds.device, torch.bool)


def _join(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack embeddings and masks; shorter ones are padded on the right with positions that do not count."""
    longest = max(mask.shape[1] for _, mask in parts)
    pad = torch.nn.functional.pad
    embeds = [pad(embeds, (0, 0, 0, longest - embeds.shape[1])) for embeds, _ in parts]
    masks = [pad(mask, (0, longest - mask.shape[1]), value=False) for _, mask in parts]
    return torch.cat(embeds), torch.cat(masks)
