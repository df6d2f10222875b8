"""Networks of a run: loaded from a pipeline or their own folders, or newly initialized."""

import copy
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

from ..config.fields import config_fields
from ..config.training_config import TrainingConfig
from ..evaluation.scorers import Scorer, load_scorer
from ..fingerprints import fingerprint, tokenizer_fingerprint
from ..latents import fixed_image_size, latent_channels, load_vae, vae_scale_factor
from ..models.transformer_prx import PRXTransformer2DModel
from ..pipelines.pipeline_prx import PRXPipeline
from ..pipelines.pipeline_prx_pixel import PRXPixelPipeline
from ..pipelines.presets import PRESETS
from ..prompt_cleaning import CLEANERS, CaptionCleaning
from ..schedulers import PRXFlowMatchScheduler, PRXXPredictionScheduler
from ..techniques.alignment import FeatureCache, build_projector
from ..techniques.discriminator import Discriminator, default_blocks
from ..techniques.lora import adapter_settings, add_adapter, base_fingerprint
from ..techniques.losses import LPIPSLoss
from ..techniques.optimizers import trainable_parameters
from ..techniques.teachers import load_teacher
from ..text import LONGEST_TEXT, encoder_only, load_text_encoder

logger = logging.get_logger(__name__)

PAD, END = "<pad>", "<eos>"


@dataclass
class Nets:
    """Networks that a training step computes with; during training they may be wrapped by accelerate.

    Args:
        transformer: PRXTransformer2DModel.
        text_encoder: text encoder of transformers.
        tokenizer: tokenizer of the text encoder.
        vae: autoencoder of a class that `latents` supports; None in pixel space.
        scheduler: scheduler of the pipeline.
        patch_size: patch size of the transformer, in latents or pixels.
        caption_cleaning: cleaning of captions, and of prompts in the pipeline.
        teacher: vision teacher of the alignment (REPA), or None.
        projector: projector of the alignment; None turns it off.
        teacher_cache: teacher features on disk, or None.
        lpips: LPIPS loss, or None.
        dino: vision teacher of the DINO loss, or None.
        reference: frozen copy of the transformer that post-training starts from; None if the transformer without its
            adapter is this model, or none is needed.
        discriminator: discriminator of LADD, or None.
        scorers: scorers of drawn images by name.
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
    reference: Any = None
    discriminator: Any = None
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    _fingerprints: dict[str, str] = field(default_factory=dict, repr=False)  # see `fingerprint_of`

    def fingerprint_of(self, name: Literal["vae", "text_encoder"]) -> str:
        """Return the fingerprint of a frozen network, computed once."""
        if name not in self._fingerprints:
            self._fingerprints[name] = fingerprint(getattr(self, name))
        return self._fingerprints[name]

    def to(self, device: torch.device) -> None:
        """Move all networks to a device."""
        networks = (self.transformer, self.text_encoder, self.vae, self.projector, self.teacher, self.lpips, self.dino)
        for module in (*networks, self.reference, self.discriminator, *self.scorers.values()):
            if isinstance(module, torch.nn.Module):
                module.to(device)

    @property
    def pixels_per_token(self) -> int:
        """Side length in pixels of the area that one image token covers."""
        return self.patch_size * vae_scale_factor(self.vae)

    def token_grid(self, latents: torch.Tensor) -> tuple[int, int]:
        """Return (rows, columns) of the image tokens for latents (B, C, h, w)."""
        return latents.shape[2] // self.patch_size, latents.shape[3] // self.patch_size

    @property
    def clean_caption(self) -> Callable[[str], str]:
        """Function that cleans a caption."""
        return CLEANERS[self.caption_cleaning]

    def trainable(self, cfg: TrainingConfig) -> dict[str, nn.Module]:
        """Return the modules with trainable parameters by attribute name."""
        modules: dict[str, nn.Module] = {"transformer": self.transformer}
        if cfg.train_text_encoder:
            modules["text_encoder"] = self.text_encoder
        if self.projector is not None:
            modules["projector"] = self.projector
        if self.discriminator is not None:
            modules["discriminator"] = self.discriminator
        return modules

    @contextmanager
    def reference_model(self) -> Iterator[Any]:
        """Yield the frozen transformer that post-training starts from.

        With an adapter it is the transformer itself, whose adapter is off inside the block.
        """
        if self.reference is not None:
            yield self.reference
            return
        self.transformer.disable_adapters()
        try:
            yield self.transformer
        finally:
            self.transformer.enable_adapters()

    def for_losses(self, cfg: TrainingConfig, aligning: bool) -> "Nets":
        """Return these networks without those for losses that a stage does not use.

        Args:
            cfg: configuration of the stage.
            aligning: True if the alignment is on.
        """
        return replace(
            self,
            projector=self.projector if aligning else None,
            lpips=self.lpips if cfg.lpips_weight else None,
            dino=self.dino if cfg.dino_weight else None,
        )

    def apply_stage(self, cfg: TrainingConfig) -> None:
        """Configure the scheduler for the timesteps of a stage."""
        self.scheduler = self.scheduler.from_config(
            self.scheduler.config,
            shift=cfg.timestep_shift,
            timestep_sampling=cfg.timestep_sampling,
            uniform_fraction=cfg.uniform_fraction,
        )

    def pipeline(self, cfg: TrainingConfig) -> PRXPipeline | PRXPixelPipeline:
        """Return a pipeline that shares these networks."""
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
        if cfg.draws_without_guidance:
            shared["preset_guidance_scale"] = 1.0
        if cfg.student_steps is not None:
            shared["preset_steps"] = dict.fromkeys(PRESETS, cfg.student_steps)
        if self.vae is None:
            return PRXPixelPipeline(**shared, prompt_max_tokens=cfg.max_sequence_length)
        return PRXPipeline(**shared, vae=self.vae)


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a lowercase byte-level BPE tokenizer, which encodes any text and appends an end token."""
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
    """Restore a tokenizer of `train_tokenizer` from its `backend_tokenizer.to_str()`."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), pad_token=PAD, eos_token=END, model_max_length=max_length
    )


def new_text_encoder(settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> T5GemmaEncoderModel:
    """Make an untrained T5Gemma encoder.

    Args:
        settings: arguments of T5GemmaModuleConfig.
        tokenizer: tokenizer that determines the vocabulary and the special tokens.

    Raises:
        ValueError: T5GemmaModuleConfig does not have a key.
    """
    unknown = sorted(set(settings) - set(T5GemmaModuleConfig().to_dict()))
    if unknown:
        raise ValueError(f"`text_encoder_config` has unknown keys {unknown}; accepted: those of T5GemmaModuleConfig.")
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
    """Make an untrained transformer.

    Args:
        settings: arguments of PRXTransformer2DModel.
        in_channels: number of latent or pixel channels, if the settings lack it.
        context_in_dim: width of the text embeddings, if the settings lack it.

    Raises:
        ValueError: the class does not have a key, or a value is invalid.
    """
    known = set(PRXTransformer2DModel._get_init_keys(PRXTransformer2DModel)) - {"self"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"`transformer_config` has unknown keys {unknown}; accepted: {sorted(known)}.")
    settings = {"in_channels": in_channels, "context_in_dim": context_in_dim, **settings}
    return PRXTransformer2DModel(**settings)


def new_projector(cfg: TrainingConfig, transformer: PRXTransformer2DModel, teacher_width: int) -> nn.Module:
    """Make the projector from the transformer's features to those of a teacher with this width."""
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


def count_uncheckpointed_blocks(cfg: TrainingConfig, depth: int) -> int:
    """Return the number of trailing blocks that are not checkpointed."""
    return int(cfg.activation_budget * depth)


def check_positions(cfg: TrainingConfig, text_config: Any) -> None:
    """Validate that a text encoder has enough positions for `max_sequence_length`.

    Raises:
        ValueError: it has fewer positions.
    """
    positions = getattr(_encoder_half(text_config), "max_position_embeddings", None)
    if positions is not None and cfg.max_sequence_length > positions:
        raise ValueError(
            f"`max_sequence_length` is {cfg.max_sequence_length}, but the text encoder has {positions} positions: "
            f"pass at most {positions}."
        )


def check_fit(config: Mapping[str, Any], vae: Any, stages: Sequence[TrainingConfig]) -> None:
    """Validate transformer, autoencoder and stages against each other; no weights are needed.

    Args:
        config: configuration of the transformer.
        vae: autoencoder, possibly on the meta device; None in pixel space.
        stages: configurations of the stages.

    Raises:
        ValueError: a setting does not fit the networks.
    """
    depth, channels = config["depth"], latent_channels(vae)
    if config["in_channels"] != channels:
        raise ValueError(
            f"`in_channels` of the transformer is {config['in_channels']}, but the autoencoder or pixel space has "
            f"{channels} channels."
        )
    multiple, size = config["patch_size"] * vae_scale_factor(vae), fixed_image_size(vae)
    for cfg in stages:
        if size is not None and (cfg.resolution != size or cfg.aspect_ratio_buckets != "none"):
            raise ValueError(
                f"`resolution` is {cfg.resolution} and `aspect_ratio_buckets` is {cfg.aspect_ratio_buckets}, but "
                f"{type(vae).__name__} takes only {size} x {size} pixels: pass `--resolution {size}` and no buckets."
            )
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
        if cfg.has_perceptual_loss and vae is not None and not cfg.perceptual_decode_latents:
            raise ValueError(
                "`lpips_weight` and `dino_weight` compare pixels, but the run is in latent space: pass "
                "`--perceptual_decode_latents` to decode the predicted latents in every step."
            )
        if cfg.perceptual_decode_latents and vae is None:
            raise ValueError("`perceptual_decode_latents` is set, but the run is in pixel space: remove it.")


def build_nets(
    cfg: TrainingConfig,
    techniques: bool = True,
    teacher_width: int | None = None,
    trained_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Nets:
    """Load or make all networks of a run, in float32 on the CPU.

    Args:
        cfg: configuration of the run.
        techniques: False leaves out networks that only auxiliary losses need.
        teacher_width: see `add_techniques`.
        trained_tokenizer: tokenizer of `train_tokenizer` for a new text encoder, or None.

    Raises:
        ValueError: the networks do not fit each other.

    Example:
        >>> nets = build_nets(cfg)
        >>> pipeline = nets.pipeline(cfg)
    """
    torch.manual_seed(cfg.seed)  # for new networks
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
        assert trained_tokenizer is not None, "a new text encoder needs its trained tokenizer"
        tokenizer = trained_tokenizer
        text_encoder: nn.Module = new_text_encoder(cfg.text_encoder_config, tokenizer)
    elif cfg.text_encoder_name_or_path is not None:
        text_encoder, tokenizer = load_text_encoder(cfg.text_encoder_name_or_path, torch.float32)
    else:
        text_encoder, tokenizer = loaded["text_encoder"], loaded["tokenizer"]
    tokenizer.model_max_length = cfg.max_sequence_length  # PRXPipeline truncates prompts here

    check_positions(cfg, text_encoder.config)
    context_in_dim = text_width(text_encoder)
    if cfg.transformer_config:
        transformer = new_transformer(cfg.transformer_config, latent_channels(vae), context_in_dim)
    else:
        transformer = loaded["transformer"]
    stored = transformer.config["context_in_dim"]
    if stored != context_in_dim:
        raise ValueError(
            f"`context_in_dim` of the transformer is {stored}, but the text encoder has the width {context_in_dim}."
        )
    check_fit(transformer.config, vae, cfg.stage_configs())
    nets = Nets(
        transformer,
        text_encoder,
        tokenizer,
        vae,
        build_scheduler(cfg, loaded.get("scheduler")),
        transformer.config["patch_size"],
        cfg.caption_cleaning,
    )
    if techniques:
        add_reference(nets, cfg)
        add_guidance_input(nets, cfg)
        add_techniques(nets, cfg.stage_configs(), teacher_width)
    _prepare_for_training(nets, cfg)
    return nets


def build_scheduler(cfg: TrainingConfig, pretrained: Any) -> PRXFlowMatchScheduler | PRXXPredictionScheduler:
    """Make the scheduler of a run; other settings of the pretrained scheduler of the same class are kept."""
    settings = {
        "shift": cfg.timestep_shift,
        "timestep_sampling": cfg.timestep_sampling,
        "uniform_fraction": cfg.uniform_fraction,
    }
    scheduler_class = PRXFlowMatchScheduler if cfg.prediction_type == "velocity" else PRXXPredictionScheduler
    if not isinstance(pretrained, scheduler_class):
        return scheduler_class(**settings)
    scheduler = scheduler_class.from_config(pretrained.config, **settings)
    if scheduler.shift != pretrained.shift:
        logger.warning(f"`shift` is {cfg.timestep_shift}; the pretrained pipeline has {pretrained.shift}.")
    return scheduler


def _prepare_for_training(nets: Nets, cfg: TrainingConfig) -> None:
    """Set which parameters are trainable, their data type, the adapter, and options of the transformer."""
    transformer = nets.transformer
    for module in (nets.text_encoder, nets.vae):
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
        transformer.kept_blocks = count_uncheckpointed_blocks(cfg, transformer.config["depth"])
    if cfg.attention_backend is not None:
        transformer.set_attention_backend(cfg.attention_backend)


def add_techniques(nets: Nets, stages: list[TrainingConfig], teacher_width: int | None = None) -> None:
    """Load the networks of the auxiliary losses of all stages into `nets`.

    Args:
        nets: networks of the pipeline.
        stages: configurations of the stages.
        teacher_width: width of the teacher if the alignment is over. The teacher is not loaded then; the projector
            remains in the checkpoints.

    Raises:
        ValueError: stages need different networks, or the networks do not fit each other.
    """
    aligned = [cfg for cfg in stages if cfg.repa_weight]
    if aligned:
        shared = ("repa_teacher", "repa_projector", "repa_projector_size", "repa_block", "repa_cache_dir")
        shared_end = ("repa_until_step", "repa_check_steps", "repa_check_window")
        cfg = _require_equal(aligned, *shared, *shared_end)
        nets.teacher = None if teacher_width else load_teacher(str(cfg.repa_teacher))
        nets.projector = new_projector(cfg, nets.transformer, teacher_width or nets.teacher.hidden_size)
        nets.teacher_cache = None if cfg.repa_cache_dir is None else FeatureCache(cfg.repa_cache_dir)
    with_lpips = [cfg for cfg in stages if cfg.lpips_weight]
    if with_lpips:
        cfg = _require_equal(with_lpips, "lpips_scale", "lpips_backbone")
        nets.lpips = LPIPSLoss(cfg.lpips_scale, cfg.lpips_backbone)
    with_dino = [cfg for cfg in stages if cfg.dino_weight]
    if with_dino:
        cfg = _require_equal(with_dino, "dino_teacher")
        same = nets.teacher is not None and nets.teacher.name == cfg.dino_teacher
        nets.dino = nets.teacher if same else load_teacher(str(cfg.dino_teacher))
        for cfg in with_dino:
            check_dino_size(cfg, nets.dino.patch_size)
    adversarial = [cfg for cfg in stages if cfg.objective == "ladd"]
    if adversarial:
        cfg = _require_equal(adversarial, "ladd_blocks")
        nets.discriminator = new_discriminator(cfg, nets.transformer)
    nets.scorers = {
        name: load_scorer(name, cfg.emoji_dir, cfg.resolution) for cfg in stages for name in cfg.reward_scorers
    }


def new_discriminator(cfg: TrainingConfig, transformer: PRXTransformer2DModel) -> Discriminator:
    """Make the discriminator of LADD for the features of a transformer.

    Raises:
        ValueError: `ladd_blocks` has a block that the transformer does not have.
    """
    config = transformer.config
    blocks = cfg.ladd_blocks or default_blocks(config["depth"])
    if not all(isinstance(block, int) and 0 <= block < config["depth"] for block in blocks):
        raise ValueError(f"`ladd_blocks` is {blocks}, but the transformer has the blocks 0 to {config['depth'] - 1}.")
    return Discriminator(sorted(set(blocks)), config["hidden_size"], config["context_in_dim"])


def add_reference(nets: Nets, cfg: TrainingConfig) -> None:
    """Add the frozen copy of the transformer that post-training compares with, if a stage needs it."""
    if cfg.lora_rank is None and any(stage.needs_reference for stage in cfg.stage_configs()):
        nets.reference = copy.deepcopy(nets.transformer).requires_grad_(False).eval()


def add_guidance_input(nets: Nets, cfg: TrainingConfig) -> None:
    """Make the guidance scale an input of the student if the run distills it.

    Raises:
        ValueError: the pretrained transformer has this input already, or not every stage trains it.
    """
    stages = cfg.stage_configs()
    if nets.transformer.config["guidance_embeds"]:
        raise ValueError(
            "The pretrained transformer takes the guidance scale as an input (`guidance_embeds`), which only its "
            "distillation trains: start from the model that it was distilled from."
        )
    if cfg.distill_guidance_max is None:
        return
    if others := [stage.objective for stage in stages if stage.objective != "guidance_distillation"]:
        raise ValueError(
            f"`distill_guidance_max` is set, but a stage has the `objective` {others[0]}; accepted: "
            "guidance_distillation."
        )
    nets.transformer.add_guidance_embedder()


def check_dino_size(cfg: TrainingConfig, patch_size: int) -> None:
    """Validate that images for the DINO loss consist of whole patches.

    Raises:
        ValueError: `dino_size` is not a multiple of the patch size.
    """
    if cfg.dino_size % patch_size:
        raise ValueError(
            f"`dino_size` must be a multiple of {patch_size}, the patch of `dino_teacher`, got {cfg.dino_size}."
        )


def has_unused_parameters(nets: Nets, stages: list[TrainingConfig]) -> bool:
    """True if any step leaves trainable parameters unused, which DDP needs to know.

    SPRINT's mask token is unused without a route, the projector without alignment, and the discriminator without LADD.
    """
    if nets.discriminator is not None and not all(cfg.objective == "ladd" for cfg in stages):
        return True
    fuses, aligns = nets.transformer.config["fusion_range"] is not None, nets.projector is not None
    ends = any(cfg.repa_until_step is not None or cfg.repa_check_steps is not None for cfg in stages)
    never_off = all(cfg.repa_weight for cfg in stages) and not ends
    return (fuses and not all(cfg.route_ratio for cfg in stages)) or (aligns and not never_off)


def _require_equal(stages: list[TrainingConfig], *names: str) -> TrainingConfig:
    """Return the first stage; raise a ValueError if the stages differ in one of the settings."""
    for name in names:
        values = [getattr(cfg, name) for cfg in stages]
        if any(value != values[0] for value in values):
            raise ValueError(f"Stages have different values of `{name}`, {values}: all must be equal.")
    return stages[0]


def network_identities(cfg: TrainingConfig, nets: Nets, teacher_width: int | None) -> dict[str, Any]:
    """Return facts that identify the networks of a run, as JSON types. A resumed run must have the same.

    Args:
        cfg: configuration of the run.
        nets: networks before training.
        teacher_width: width of a teacher that is no longer loaded, or None.
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
    """Return the class of the pretrained pipeline."""
    config = DiffusionPipeline.load_config(cfg.pretrained_model_name_or_path, revision=cfg.revision)
    return _named_class(config["_class_name"])


def _named_class(name: Any) -> type[PRXPipeline] | type[PRXPixelPipeline]:
    classes = {"PRXPipeline": PRXPipeline, "PRXPixelPipeline": PRXPixelPipeline}
    if not isinstance(name, str) or name not in classes:
        raise ValueError(f"`pretrained_model_name_or_path` contains a {name}; accepted: {sorted(classes)}.")
    return classes[name]


def saved_settings(name_or_path: str, revision: str | None = None) -> dict[str, Any]:
    """Return the settings for training a saved pipeline further, from its configuration files.

    Args:
        name_or_path: folder or Hub id.
        revision: revision on the Hub.

    Raises:
        ValueError: it is not a PRX pipeline, or the Hub cannot be reached.
    """
    try:
        cfg: Any = DiffusionPipeline.load_config(name_or_path, revision=revision)
    except OSError as error:
        hint = "" if Path(name_or_path).is_dir() else ", which is not a local folder"
        raise ValueError(f"`pretrained_model_name_or_path` is {name_or_path!r}{hint}: {error}") from error
    pipeline_class: Any = _named_class(cfg.get("_class_name") if isinstance(cfg, dict) else cfg)
    defaults = {name: value.default for name, value in inspect.signature(pipeline_class.__init__).parameters.items()}
    source: dict[str, Any] = {"revision": revision} if revision else {}
    if pipeline_class is PRXPixelPipeline:
        tokens = cfg.get("prompt_max_tokens", defaults["prompt_max_tokens"])
    else:
        tokens = AutoTokenizer.from_pretrained(name_or_path, subfolder="tokenizer", **source).model_max_length
    scheduler = PRXFlowMatchScheduler.load_config(name_or_path, subfolder="scheduler", **source)
    found = {
        "prediction_type": cfg.get("prediction_type") or pipeline_class.default_prediction_type,
        "noise_scale": cfg.get("noise_scale", defaults["noise_scale"]),
        "resolution": cfg.get("default_sample_size") or pipeline_class.default_resolution,
        "max_sequence_length": tokens,
        "shift": scheduler.get("shift", 1.0),
        "caption_cleaning": cfg.get("caption_cleaning") or pipeline_class.default_caption_cleaning,
    }
    if tokens > LONGEST_TEXT:  # the tokenizer has no limit
        del found["max_sequence_length"]
    known = config_fields(TrainingConfig)
    try:
        return {name: known[name].parse(name, value) for name, value in found.items()}
    except ValueError as error:
        raise ValueError(f"The pipeline {name_or_path} cannot be trained further: {error}") from error


def _check_continued(cfg: TrainingConfig, pipeline: PRXPipeline | PRXPixelPipeline) -> None:
    """Raise a ValueError if a pretrained transformer would get another prediction type or noise scale."""
    for name in ("prediction_type", "noise_scale"):
        if getattr(cfg, name) != pipeline.config[name]:
            raise ValueError(
                f"`{name}` is {getattr(cfg, name)}, but the pretrained pipeline was trained with "
                f"{pipeline.config[name]}: pass the same."
            )
    if cfg.caption_cleaning != pipeline.caption_cleaning:
        logger.warning(
            f"`caption_cleaning` is {cfg.caption_cleaning}; the pretrained pipeline has {pipeline.caption_cleaning}."
        )


def text_width(text_encoder: Any) -> int:
    """Return the width of the text encoder's hidden states, `context_in_dim` of the transformer."""
    return _encoder_half(text_encoder.config).hidden_size


def _encoder_half(text_config: Any) -> Any:
    """Return the part of a text configuration that describes the encoder; T5Gemma nests it."""
    return getattr(text_config, "encoder", text_config)
