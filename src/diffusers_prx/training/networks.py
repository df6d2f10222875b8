"""The networks of a run: loaded from a pipeline, from their own folders, or made new."""

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5GemmaEncoderModel,
    T5GemmaModuleConfig,
)

from ..config.fields import settings_of
from ..config.training_config import TrainingConfig
from ..fingerprints import fingerprint, tokenizer_fingerprint
from ..latents import latent_channels, load_vae, vae_scale_factor
from ..models.transformer_prx import PRXTransformer2DModel
from ..pipelines.pipeline_prx import PRXPipeline
from ..pipelines.pipeline_prx_pixel import PRXPixelPipeline
from ..prompt_cleaning import CLEANERS, CaptionCleaning
from ..schedulers import PRXFlowMatchScheduler, PRXXPredictionScheduler
from ..techniques.alignment import FeatureCache, build_projector
from ..techniques.lora import adapter_settings, add_adapter, base_fingerprint
from ..techniques.losses import LPIPSLoss
from ..techniques.optimizers import trainable_parameters
from ..techniques.teachers import load_teacher
from ..text import LONGEST_TEXT, encoder_only, load_text_encoder

logger = logging.get_logger(__name__)

PAD, END = "<pad>", "<eos>"


@dataclass
class Nets:
    """Everything a training step computes with: a PRXTransformer2DModel, a text encoder of transformers with its
    tokenizer, a VAE that `latents` knows (None in pixel space), a scheduler. In training the networks may be
    inside the wrappers of accelerate.

    Args:
        transformer, text_encoder, tokenizer, vae, scheduler: the parts of the pipeline.
        patch_size: of the transformer.
        caption_cleaning: cleaning of captions, and of prompts by the pipeline of these networks.
        teacher, projector, teacher_cache: a VisionTeacher, a projector and features on disk, for the alignment (REPA);
            without a projector nothing is aligned.
        lpips, dino: an LPIPSLoss and a VisionTeacher, for the perceptual losses; None: off.
    """

    transformer: Any
    text_encoder: Any
    tokenizer: Any
    vae: Any
    scheduler: PRXFlowMatchScheduler | PRXXPredictionScheduler
    patch_size: int
    caption_cleaning: CaptionCleaning = "full"
    teacher: Any = None
    projector: Any = None
    teacher_cache: FeatureCache | None = None
    lpips: LPIPSLoss | None = None
    dino: Any = None
    _fingerprints: dict[str, str] = field(default_factory=dict, repr=False)  # see `fingerprint_of`

    def fingerprint_of(self, name: Literal["vae", "text_encoder"]) -> str:
        """Return the fingerprint of a frozen network; its weights, which may be gigabytes, are read once."""
        if name not in self._fingerprints:
            self._fingerprints[name] = fingerprint(getattr(self, name))
        return self._fingerprints[name]

    @property
    def pixels_per_token(self) -> int:
        """Side in pixels of what one image token stands for."""
        return self.patch_size * vae_scale_factor(self.vae)

    def token_grid(self, latents: torch.Tensor) -> tuple[int, int]:
        """(rows, columns) of image tokens of latents (B, C, h, w)."""
        return latents.shape[2] // self.patch_size, latents.shape[3] // self.patch_size

    @property
    def clean_caption(self) -> Callable[[str], str]:
        """The function of `caption_cleaning`."""
        return CLEANERS[self.caption_cleaning]

    def trainable(self, cfg: TrainingConfig) -> dict[str, nn.Module]:
        """The modules that the optimizer changes, by their name here: of each what has `requires_grad`."""
        modules: dict[str, nn.Module] = {"transformer": self.transformer}
        if cfg.train_text_encoder:
            modules["text_encoder"] = self.text_encoder
        if self.projector is not None:
            modules["projector"] = self.projector
        return modules

    def for_losses(self, cfg: TrainingConfig, aligning: bool) -> "Nets":
        """The same networks, of those that only losses need the ones of a stage's.

        Args:
            cfg: of the stage.
            aligning: whether the alignment is on.
        """
        return replace(
            self,
            projector=self.projector if aligning else None,
            lpips=self.lpips if cfg.lpips_weight else None,
            dino=self.dino if cfg.dino_weight else None,
        )

    def apply_stage(self, cfg: TrainingConfig) -> None:
        """Take a stage's noise levels."""
        self.scheduler = self.scheduler.from_config(
            self.scheduler.config,
            shift=cfg.timestep_shift,
            timestep_sampling=cfg.timestep_sampling,
            uniform_fraction=cfg.uniform_fraction,
        )

    def pipeline(self, cfg: TrainingConfig) -> PRXPipeline | PRXPixelPipeline:
        """The networks as a pipeline; they are shared with it, not copied."""
        shared: dict[str, Any] = {
            "transformer": self.transformer,
            "scheduler": self.scheduler,
            "text_encoder": self.text_encoder,
            "tokenizer": self.tokenizer,
            "default_sample_size": cfg.resolution,
            "noise_scale": cfg.noise_scale,
            "token_route": (*cfg.route_range, cfg.route_ratio) if cfg.route_ratio else None,
            "caption_cleaning": self.caption_cleaning,
        }
        if self.vae is None:
            return PRXPixelPipeline(**shared, prompt_max_tokens=cfg.max_sequence_length)
        return PRXPipeline(**shared, vae=self.vae)


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A lower-casing byte-level BPE tokenizer from captions: it knows every text, and ends it in an end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return restore_tokenizer(tokenizer.to_str(), max_length)


def restore_tokenizer(text: str, max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `train_tokenizer` from its `backend_tokenizer.to_str()`."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), pad_token=PAD, eos_token=END, model_max_length=max_length
    )


def new_text_encoder(settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> T5GemmaEncoderModel:
    """An untrained T5Gemma encoder.

    Args:
        settings: keys of T5GemmaModuleConfig; the vocabulary and special tokens come from the tokenizer.

    Raises:
        ValueError: for a key that T5GemmaModuleConfig does not have.
    """
    unknown = sorted(set(settings) - set(T5GemmaModuleConfig().to_dict()))
    if unknown:
        raise ValueError(f"`text_encoder_config` has keys {unknown} that T5GemmaModuleConfig does not have.")
    module = T5GemmaModuleConfig(
        **settings,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        is_decoder=False,
    )
    special: Any = {"pad_token_id": module.pad_token_id, "eos_token_id": module.eos_token_id, "bos_token_id": None}
    return T5GemmaEncoderModel(encoder_only(module, vocab_size=len(tokenizer), **special))


def new_transformer(settings: dict[str, Any], in_channels: int, context_in_dim: int) -> PRXTransformer2DModel:
    """An untrained transformer; channels and text width follow the other networks unless the settings name them.

    Raises:
        ValueError: for a key that the class does not have, or channels or a width that do not fit.
    """
    known = set(PRXTransformer2DModel._get_init_keys(PRXTransformer2DModel)) - {"self"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"`transformer_config` has unknown keys {unknown}; known: {sorted(known)}.")
    settings = {"in_channels": in_channels, "context_in_dim": context_in_dim, **settings}
    return PRXTransformer2DModel(**settings)


def new_projector(cfg: TrainingConfig, transformer: PRXTransformer2DModel, teacher_width: int) -> nn.Module:
    """The projector of a stage's alignment, from the transformer's features to those of a teacher of this width."""
    config = transformer.config
    return build_projector(
        cfg.repa_projector,
        config["hidden_size"],
        teacher_width,
        cfg.repa_projector_size or config["hidden_size"],
        num_heads=config["num_heads"],
        axes_dim=transformer.axes_dim,
        theta=config["theta"],
    )


def kept_blocks(cfg: TrainingConfig, depth: int) -> int:
    """How many of the blocks keep their activations under gradient checkpointing, within the budget."""
    return int(cfg.activation_budget * depth)


def check_positions(cfg: TrainingConfig, text_config: Any) -> None:
    """Refuse more tokens than a text encoder has positions for.

    Raises:
        ValueError: with both numbers.
    """
    positions = getattr(_encoder_half(text_config), "max_position_embeddings", None)
    if positions is not None and cfg.max_sequence_length > positions:
        raise ValueError(
            f"`max_sequence_length` is {cfg.max_sequence_length}, but the text encoder has positions for {positions}"
            " tokens: set it to that or less."
        )


def check_fit(config: Mapping[str, Any], vae: Any, stages: Sequence[TrainingConfig]) -> None:
    """Refuse what a transformer and an autoencoder cannot do; needs no weights.

    Args:
        config: of the transformer.
        vae: the autoencoder, or one without values; None in pixel space.
        stages: of the run.

    Raises:
        ValueError: with the setting, its value and what would fit.
    """
    depth, channels = config["depth"], latent_channels(vae)
    if config["in_channels"] != channels:
        raise ValueError(
            f"The transformer's `in_channels` is {config['in_channels']}, but the other networks need {channels}."
        )
    multiple = config["patch_size"] * vae_scale_factor(vae)
    for cfg in stages:
        if cfg.resolution % multiple:
            raise ValueError(
                f"`resolution` must be a multiple of {multiple} for these networks, got {cfg.resolution}."
            )
        if cfg.route_ratio and cfg.route_range[1] > depth:
            raise ValueError(f"`route_range` is {cfg.route_range}, but the transformer has {depth} blocks.")
        if cfg.route_ratio and config["fusion_range"] not in (None, tuple(cfg.route_range), list(cfg.route_range)):
            raise ValueError(
                f"`route_range` is {cfg.route_range}, but the transformer's `fusion_range` is "
                f"{config['fusion_range']}: they must be the same."
            )
        if cfg.repa_weight and cfg.repa_block >= depth:
            raise ValueError(f"`repa_block` is {cfg.repa_block}, but the transformer has {depth} blocks.")
        perceptual = cfg.lpips_weight or cfg.dino_weight
        if perceptual and vae is not None and not cfg.perceptual_decode_latents:
            raise ValueError(
                "`lpips_weight` and `dino_weight` compare pixels, but this is a run in latents: set "
                "`perceptual_decode_latents` to decode the predicted latents in every step."
            )
        if cfg.perceptual_decode_latents and vae is None:
            raise ValueError("`perceptual_decode_latents` is set, but this is a run in pixels: leave it out.")


def build_nets(
    cfg: TrainingConfig,
    techniques: bool = True,
    teacher_width: int | None = None,
    trained_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Nets:
    """Load or make every network of the run, in float32, on the CPU.

    Args:
        techniques: False leaves out what only the auxiliary losses need.
        teacher_width: see `add_techniques`.
        trained_tokenizer: tokenizer for a new text encoder, as `train_tokenizer` makes it; None without one.

    Raises:
        ValueError: if the networks do not fit each other.
    """
    torch.manual_seed(cfg.seed)  # of new networks
    loaded: dict[str, Any] = {}
    if cfg.pretrained_model_name_or_path is not None:
        pipeline = pipeline_class_of(cfg).from_pretrained(
            cfg.pretrained_model_name_or_path, revision=cfg.revision, dtype=torch.float32
        )
        loaded = pipeline.components
        if not cfg.transformer_config:
            _check_continued(cfg, pipeline)

    tokenizer: Any
    vae = load_vae(cfg.vae_name_or_path) if cfg.vae_name_or_path is not None else loaded.get("vae")
    if cfg.text_encoder_config:
        assert trained_tokenizer is not None, "a new text encoder needs the tokenizer that was trained for it"
        tokenizer = trained_tokenizer
        text_encoder: nn.Module = new_text_encoder(cfg.text_encoder_config, tokenizer)
    elif cfg.text_encoder_name_or_path is not None:
        text_encoder, tokenizer = load_text_encoder(cfg.text_encoder_name_or_path, torch.float32)
    else:
        text_encoder, tokenizer = loaded["text_encoder"], loaded["tokenizer"]
    tokenizer.model_max_length = cfg.max_sequence_length  # where PRXPipeline will cut prompts

    check_positions(cfg, text_encoder.config)
    context_in_dim = text_width(text_encoder)
    if cfg.transformer_config:
        transformer = new_transformer(cfg.transformer_config, latent_channels(vae), context_in_dim)
    else:
        transformer = loaded["transformer"]
    stored = transformer.config["context_in_dim"]
    if stored != context_in_dim:
        raise ValueError(
            f"The transformer's `context_in_dim` is {stored}, but the other networks need {context_in_dim}."
        )
    check_fit(transformer.config, vae, cfg.stage_configs())
    options = {
        "shift": cfg.timestep_shift,
        "timestep_sampling": cfg.timestep_sampling,
        "uniform_fraction": cfg.uniform_fraction,
    }
    scheduler_class = PRXFlowMatchScheduler if cfg.prediction_type == "velocity" else PRXXPredictionScheduler
    scheduler = scheduler_class(**options)
    if isinstance(loaded.get("scheduler"), scheduler_class):  # what this run does not set stays as it was
        scheduler = scheduler_class.from_config(loaded["scheduler"].config, **options)
        if scheduler.shift != loaded["scheduler"].shift:
            logger.warning(
                f"`shift` is {cfg.timestep_shift}; the pretrained pipeline's is {loaded['scheduler'].shift}."
            )
    nets = Nets(
        transformer, text_encoder, tokenizer, vae, scheduler, transformer.config["patch_size"], cfg.caption_cleaning
    )
    if techniques:
        add_techniques(nets, cfg.stage_configs(), teacher_width)
    for module in (text_encoder, vae):
        if module is not None:
            module.requires_grad_(False).eval()
    for module in nets.trainable(cfg).values():
        module.requires_grad_(True).train()
    if cfg.weights_dtype == "bf16":
        transformer.to(torch.bfloat16)
    if cfg.lora_rank is not None:
        add_adapter(cfg, transformer)
    if cfg.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
        transformer.kept_blocks = kept_blocks(cfg, transformer.config["depth"])
    if cfg.attention_backend is not None:
        transformer.set_attention_backend(cfg.attention_backend)
    return nets


def add_techniques(nets: Nets, stages: list[TrainingConfig], teacher_width: int | None = None) -> None:
    """Load what the auxiliary losses of any stage need, beside the networks of the pipeline.

    Args:
        nets: of the pipeline; what is loaded is put there.
        stages: of the run.
        teacher_width: of a run whose alignment is over, the width of its teacher, which is not loaded again; the
            projector stays in the run's checkpoints.

    Raises:
        ValueError: if two stages ask for different ones, or they do not fit each other.
    """
    aligned = [cfg for cfg in stages if cfg.repa_weight]
    if aligned:
        of_alignment = ("repa_teacher", "repa_projector", "repa_projector_size", "repa_block", "repa_cache_dir")
        of_its_end = ("repa_until_step", "repa_check_steps", "repa_check_window")
        cfg = _the_same(aligned, *of_alignment, *of_its_end)
        nets.teacher = None if teacher_width else load_teacher(str(cfg.repa_teacher))
        nets.projector = new_projector(cfg, nets.transformer, teacher_width or nets.teacher.hidden_size)
        nets.teacher_cache = None if cfg.repa_cache_dir is None else FeatureCache(cfg.repa_cache_dir)
    with_lpips = [cfg for cfg in stages if cfg.lpips_weight]
    if with_lpips:
        cfg = _the_same(with_lpips, "lpips_scale", "lpips_backbone")
        nets.lpips = LPIPSLoss(cfg.lpips_scale, cfg.lpips_backbone)
    with_dino = [cfg for cfg in stages if cfg.dino_weight]
    if with_dino:
        cfg = _the_same(with_dino, "dino_teacher")
        same = nets.teacher is not None and nets.teacher.name == cfg.dino_teacher
        nets.dino = nets.teacher if same else load_teacher(str(cfg.dino_teacher))
        for cfg in with_dino:
            check_dino_size(cfg, nets.dino.patch_size)


def check_dino_size(cfg: TrainingConfig, patch_size: int) -> None:
    """Refuse pictures for a teacher that are not made of whole patches.

    Raises:
        ValueError: with both sizes in pixels.
    """
    if cfg.dino_size % patch_size:
        raise ValueError(
            f"`dino_size` must be a multiple of {patch_size}, the patch of `dino_teacher`, got {cfg.dino_size}."
        )


def has_unused_parameters(nets: Nets, stages: list[TrainingConfig]) -> bool:
    """Whether there are steps in which some trained parameters are in no loss: SPRINT's mask token where there is no
    route, the projector where there is no alignment."""
    fuses, aligns = nets.transformer.config["fusion_range"] is not None, nets.projector is not None
    ends = any(cfg.repa_until_step is not None or cfg.repa_check_steps is not None for cfg in stages)
    never_off = all(cfg.repa_weight for cfg in stages) and not ends
    return (fuses and not all(cfg.route_ratio for cfg in stages)) or (aligns and not never_off)


def _the_same(stages: list[TrainingConfig], *names: str) -> TrainingConfig:
    """The first of the stages, after checking that they agree: a run has one network of each kind, and one end of the
    alignment."""
    for name in names:
        values = [getattr(cfg, name) for cfg in stages]
        if any(value != values[0] for value in values):
            raise ValueError(f"Stages have different values of `{name}`, {values}: a run can have one.")
    return stages[0]


def identity(cfg: TrainingConfig, nets: Nets, teacher_width: int | None) -> dict[str, Any]:
    """Identify the networks of a run, of which a resumed run must have the same. Types are those of JSON.

    Args:
        cfg: run configuration.
        nets: networks as they were loaded or made.
        teacher_width: width of a teacher that is not loaded any more.
    """
    trained = nets.trainable(cfg)
    networks: tuple[Literal["vae", "text_encoder"], ...] = ("vae", "text_encoder")
    frozen = [name for name in networks if getattr(nets, name) is not None and name not in trained]
    counts = {name: sum(p.numel() for p in trainable_parameters(module).values()) for name, module in trained.items()}
    found: dict[str, Any] = {}
    if cfg.lora_rank is not None:
        found |= {"adapter": adapter_settings(cfg), "adapted_weights": base_fingerprint(nets.transformer)}
    if hasattr(nets.tokenizer, "backend_tokenizer"):
        found["tokenizer"] = tokenizer_fingerprint(nets.tokenizer)
    return {
        **found,
        "trained_parameters": counts,
        "transformer": json.loads(json.dumps({k: v for k, v in nets.transformer.config.items() if k[0] != "_"})),
        "frozen_networks": {name: nets.fingerprint_of(name) for name in frozen},
        "teacher_width": teacher_width if nets.teacher is None else nets.teacher.hidden_size,
    }


def pipeline_class_of(cfg: TrainingConfig) -> type[PRXPipeline] | type[PRXPixelPipeline]:
    """Which of the two pipelines a saved one is."""
    config = DiffusionPipeline.load_config(cfg.pretrained_model_name_or_path, revision=cfg.revision)
    return _named_class(config["_class_name"])


def _named_class(name: Any) -> type[PRXPipeline] | type[PRXPixelPipeline]:
    classes = {"PRXPipeline": PRXPipeline, "PRXPixelPipeline": PRXPixelPipeline}
    if not isinstance(name, str) or name not in classes:
        raise ValueError(f"`pretrained_model_name_or_path` holds a {name}; accepted: {sorted(classes)}.")
    return classes[name]


def saved_settings(name_or_path: str, revision: str | None = None) -> dict[str, Any]:
    """Read from a saved pipeline, without its weights, how it was trained: the settings of a run that continues it.

    Args:
        name_or_path: a folder or a Hub id.
        revision: revision on the Hub.

    Raises:
        ValueError: if there is no PRX pipeline, or the Hub could not be reached.
    """
    try:
        cfg: Any = DiffusionPipeline.load_config(name_or_path, revision=revision)
    except OSError as error:
        where_not = "" if Path(name_or_path).is_dir() else ", which is not a folder on this disk"
        raise ValueError(f"`pretrained_model_name_or_path` is {name_or_path!r}{where_not}: {error}") from error
    pipeline_class: Any = _named_class(cfg.get("_class_name") if isinstance(cfg, dict) else cfg)
    unsaid = {name: value.default for name, value in inspect.signature(pipeline_class.__init__).parameters.items()}
    where: dict[str, Any] = {"revision": revision} if revision else {}
    if pipeline_class is PRXPixelPipeline:
        tokens = cfg.get("prompt_max_tokens", unsaid["prompt_max_tokens"])
    else:
        tokens = AutoTokenizer.from_pretrained(name_or_path, subfolder="tokenizer", **where).model_max_length
    scheduler = PRXFlowMatchScheduler.load_config(name_or_path, subfolder="scheduler", **where)
    found = {
        "prediction_type": cfg.get("prediction_type") or pipeline_class.default_prediction_type,
        "noise_scale": cfg.get("noise_scale", unsaid["noise_scale"]),
        "resolution": cfg.get("default_sample_size") or pipeline_class.default_resolution,
        "max_sequence_length": tokens,
        "shift": scheduler.get("shift", 1.0),
        "caption_cleaning": cfg.get("caption_cleaning") or pipeline_class.default_caption_cleaning,
    }
    if tokens > LONGEST_TEXT:  # the tokenizer states no length
        del found["max_sequence_length"]
    known = settings_of(TrainingConfig)
    try:
        return {name: known[name].read(name, value) for name, value in found.items()}
    except ValueError as error:
        raise ValueError(f"The pipeline {name_or_path} cannot be continued as it is: {error}") from error


def _check_continued(cfg: TrainingConfig, pipeline: PRXPipeline | PRXPixelPipeline) -> None:
    """A transformer that goes on learning must be asked for what it has learnt to predict, from the same noise."""
    for name in ("prediction_type", "noise_scale"):
        if getattr(cfg, name) != pipeline.config[name]:
            raise ValueError(
                f"`{name}` is {getattr(cfg, name)}, but the pretrained pipeline was trained with "
                f"{pipeline.config[name]}: set it to that."
            )
    if cfg.caption_cleaning != pipeline.caption_cleaning:
        logger.warning(
            f"`caption_cleaning` is {cfg.caption_cleaning}; the pretrained pipeline's is {pipeline.caption_cleaning}."
        )


def text_width(text_encoder: Any) -> int:
    """Width of the text encoder's hidden states, which `context_in_dim` of the transformer follows."""
    return _encoder_half(text_encoder.config).hidden_size


def _encoder_half(text_config: Any) -> Any:
    """T5Gemma keeps its settings in the configuration of its encoder half."""
    return getattr(text_config, "encoder", text_config)
