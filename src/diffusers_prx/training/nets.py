"""The networks of a run: loaded from a pipeline, from their own folders, or made new."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, DiffusionPipeline
from diffusers.utils import logging
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5GemmaConfig,
    T5GemmaEncoderModel,
)
from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig

from ..latents import latent_channels, vae_scale_factor
from ..models.transformer_prx import PRXTransformer2DModel
from ..pipelines.pipeline_prx import PRXPipeline
from ..pipelines.pipeline_prx_pixel import PRXPixelPipeline
from ..pipelines.prompt_cleaning import clean_prompt, repair_prompt
from ..schedulers import PRXFlowMatchScheduler, PRXXPredictionScheduler
from .config import TrainingConfig

logger = logging.get_logger(__name__)

PAD, END = "<pad>", "<eos>"


@dataclass
class Nets:
    """Everything a training step computes with: a PRXTransformer2DModel, a text encoder of transformers with its
    tokenizer, an AutoencoderKL or AutoencoderDC (None in pixel space), a scheduler. In training the networks may be
    inside the wrappers of accelerate."""

    transformer: Any
    text_encoder: Any
    tokenizer: Any
    vae: Any
    scheduler: PRXFlowMatchScheduler | PRXXPredictionScheduler

    @property
    def clean_caption(self) -> Callable[[str], str]:
        """How captions are cleaned: as the pipeline of these networks will clean its prompts."""
        return repair_prompt if self.vae is None else clean_prompt

    def trainable(self, cfg: TrainingConfig) -> dict[str, nn.Module]:
        """The modules that the optimizer changes, by their name in the pipeline."""
        modules: dict[str, nn.Module] = {"transformer": self.transformer}
        if cfg.train_text_encoder:
            modules["text_encoder"] = self.text_encoder
        return modules

    def pipeline(self, cfg: TrainingConfig) -> PRXPipeline | PRXPixelPipeline:
        """The networks as a pipeline; they are shared with it, not copied."""
        shared: dict[str, Any] = {
            "transformer": self.transformer,
            "scheduler": self.scheduler,
            "text_encoder": self.text_encoder,
            "tokenizer": self.tokenizer,
            "default_sample_size": cfg.resolution,
            "noise_scale": cfg.noise_scale,
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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, model_max_length=max_length
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
    # a copy: the configuration marks its decoder as one, and with that its encoder, were they the same object
    config = T5GemmaConfig(
        encoder=module, decoder=copy.deepcopy(module), is_encoder_decoder=False, vocab_size=len(tokenizer), **special
    )
    return T5GemmaEncoderModel(config)


def load_text_encoder(name_or_path: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A text encoder of transformers in float32, and its tokenizer; of an encoder-decoder, the encoder."""
    config = AutoConfig.from_pretrained(name_or_path)
    if config.model_type == "t5gemma":
        config.is_encoder_decoder = False
    # of an encoder-decoder (T5) the public class of its encoder, which a saved pipeline can name
    auto_class = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
    text_encoder = auto_class.from_pretrained(name_or_path, config=config, dtype=torch.float32)
    return text_encoder, AutoTokenizer.from_pretrained(name_or_path)


def load_vae(name_or_path: str) -> Any:
    """An autoencoder in float32, from its own folder or the `vae` subfolder of a pipeline.

    Raises:
        ValueError: if it is of a class that `latents.py` does not know.
    """
    classes: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "AutoencoderDC": AutoencoderDC}
    config: Any
    subfolder: str | None = "vae"
    try:
        config = AutoencoderKL.load_config(name_or_path, subfolder=subfolder)
    except OSError:
        config, subfolder = AutoencoderKL.load_config(name_or_path), None
    if config.get("_class_name") not in classes:
        raise ValueError(f"`vae_name_or_path` is a {config.get('_class_name')}; accepted: {sorted(classes)}.")
    return classes[config["_class_name"]].from_pretrained(name_or_path, subfolder=subfolder, torch_dtype=torch.float32)


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


def build_nets(cfg: TrainingConfig, captions: Iterator[str]) -> Nets:
    """Load or make every network of the run, in float32, on the CPU.

    Args:
        captions: of the training data, for a tokenizer that is trained first.

    Raises:
        ValueError: if the networks do not fit each other.
    """
    torch.manual_seed(cfg.seed)  # of new networks
    loaded: dict[str, Any] = {}
    if cfg.pretrained_model_name_or_path is not None:
        pipeline = pipeline_class_of(cfg).from_pretrained(
            cfg.pretrained_model_name_or_path, revision=cfg.revision, torch_dtype=torch.float32
        )
        loaded = pipeline.components
        if not cfg.transformer_config:
            _check_continued(cfg, pipeline)

    tokenizer: Any
    vae = load_vae(cfg.vae_name_or_path) if cfg.vae_name_or_path is not None else loaded.get("vae")
    if cfg.text_encoder_config:
        tokenizer = train_tokenizer(captions, cfg.tokenizer_vocab_size, cfg.max_sequence_length)
        text_encoder: nn.Module = new_text_encoder(cfg.text_encoder_config, tokenizer)
    elif cfg.text_encoder_name_or_path is not None:
        text_encoder, tokenizer = load_text_encoder(cfg.text_encoder_name_or_path)
    else:
        text_encoder, tokenizer = loaded["text_encoder"], loaded["tokenizer"]
    tokenizer.model_max_length = cfg.max_sequence_length  # where PRXPipeline will cut prompts

    in_channels = 3 if vae is None else latent_channels(vae)
    context_in_dim = text_width(text_encoder)
    if cfg.transformer_config:
        transformer = new_transformer(cfg.transformer_config, in_channels, context_in_dim)
    else:
        transformer = loaded["transformer"]
    for key, needed in (("in_channels", in_channels), ("context_in_dim", context_in_dim)):
        if transformer.config[key] != needed:
            raise ValueError(
                f"The transformer's `{key}` is {transformer.config[key]}, but the other networks need {needed}."
            )
    multiple = transformer.config["patch_size"] * (1 if vae is None else vae_scale_factor(vae))
    if cfg.resolution % multiple:
        raise ValueError(f"`resolution` must be a multiple of {multiple} for these networks, got {cfg.resolution}.")

    options = {
        "shift": cfg.shift,
        "timestep_sampling": cfg.timestep_sampling,
        "uniform_fraction": cfg.uniform_fraction,
    }
    scheduler_class = PRXFlowMatchScheduler if cfg.prediction_type == "velocity" else PRXXPredictionScheduler
    scheduler = scheduler_class(**options)
    if isinstance(loaded.get("scheduler"), scheduler_class):  # what this run does not set stays as it was
        scheduler = scheduler_class.from_config(loaded["scheduler"].config, **options)
        if scheduler.shift != loaded["scheduler"].shift:
            logger.warning(f"`shift` is {cfg.shift}; the pretrained pipeline's is {loaded['scheduler'].shift}.")
    nets = Nets(transformer, text_encoder, tokenizer, vae, scheduler)
    for module in (text_encoder, vae):
        if module is not None:
            module.requires_grad_(False).eval()
    for module in nets.trainable(cfg).values():
        module.requires_grad_(True).train()
    if cfg.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if cfg.attention_backend is not None:
        transformer.set_attention_backend(cfg.attention_backend)
    return nets


def pipeline_class_of(cfg: TrainingConfig) -> type[PRXPipeline] | type[PRXPixelPipeline]:
    """Which of the two pipelines a saved one is."""
    classes = {"PRXPipeline": PRXPipeline, "PRXPixelPipeline": PRXPixelPipeline}
    name = DiffusionPipeline.load_config(cfg.pretrained_model_name_or_path, revision=cfg.revision)["_class_name"]
    if name not in classes:
        raise ValueError(f"`pretrained_model_name_or_path` holds a {name}; accepted: {sorted(classes)}.")
    return classes[name]


def _check_continued(cfg: TrainingConfig, pipeline: PRXPipeline | PRXPixelPipeline) -> None:
    """A transformer that goes on learning must be asked for what it has learnt to predict, from the same noise."""
    for name in ("prediction_type", "noise_scale"):
        if getattr(cfg, name) != pipeline.config[name]:
            raise ValueError(
                f"`{name}` is {getattr(cfg, name)}, but the pretrained pipeline was trained with "
                f"{pipeline.config[name]}: set it to that."
            )


def text_width(text_encoder: Any) -> int:
    """Width of the text encoder's hidden states; T5Gemma keeps it in the configuration of its encoder half."""
    config = text_encoder.config
    return getattr(config, "encoder", config).hidden_size
