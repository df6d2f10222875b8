"""The configuration of a training run: one typed, frozen dataclass; a YAML recipe over its defaults, flags over it."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml


@dataclass(frozen=True)
class TrainingConfig:
    """Every setting of `training/train_prx.py`. The defaults are those of the PRX study's baseline at 256 px.

    Raises:
        ValueError: for a value outside its range or settings that exclude each other, with what would be accepted.
    """

    # the model
    pretrained_model_name_or_path: Annotated[
        str | None, "A saved PRX pipeline (folder or Hub id) whose components the run starts from."
    ] = None
    revision: Annotated[str | None, "Revision of the pretrained pipeline on the Hub."] = None
    transformer_config: Annotated[
        dict, "Configuration of a new transformer, trained from scratch: keys of PRXTransformer2DModel."
    ] = field(default_factory=dict)
    vae_name_or_path: Annotated[
        str | None, "Autoencoder (folder or Hub id, `vae` subfolder allowed) whose latents are modelled; none: pixels."
    ] = None
    text_encoder_name_or_path: Annotated[
        str | None,
        "Text encoder and tokenizer (folder or Hub id), where they do not come with the pretrained pipeline.",
    ] = None
    text_encoder_config: Annotated[
        dict, "A new T5Gemma text encoder, trained along: keys of T5GemmaModuleConfig; its tokenizer is trained first."
    ] = field(default_factory=dict)
    tokenizer_vocab_size: Annotated[int, "Vocabulary of the tokenizer that a new text encoder gets."] = 1024
    train_text_encoder: Annotated[bool, "Train the text encoder along with the transformer."] = False
    prediction_type: Annotated[Literal["velocity", "x_prediction"], "What the transformer predicts."] = "velocity"
    noise_scale: Annotated[float, "Standard deviation of the noise at t = 1."] = 1.0
    max_sequence_length: Annotated[int, "Captions are cut to this many tokens; how many were cut is printed."] = 256

    # the data
    dataset_name: Annotated[
        str | None,
        "`scenes` (built in, drawn on the fly), or a data set on the Hub or on disk that `datasets` can load.",
    ] = None
    dataset_config_name: Annotated[str | None, "Configuration of the data set, where it has several."] = None
    dataset_split: Annotated[str, "Split of the data set to train on."] = "train"
    train_data_dir: Annotated[str | None, "A folder of images with a metadata.jsonl, instead of --dataset_name."] = (
        None
    )
    image_column: Annotated[str, "Column that holds the images."] = "image"
    caption_column: Annotated[str, "Column that holds the captions."] = "text"
    scenes_level: Annotated[Literal["easy", "medium", "hard"], "Difficulty of the built-in scenes."] = "easy"
    scenes_caption: Annotated[Literal["long", "short"], "Captions of the built-in scenes."] = "long"
    resolution: Annotated[int, "Height and width in pixels: images are resized to cover it and cropped."] = 256
    center_crop: Annotated[bool, "Crop the centre, not a random place."] = False
    random_flip: Annotated[bool, "Flip half of the images from left to right."] = False
    max_corrupt_share: Annotated[float, "Stop when more than this share of the images read cannot be read."] = 0.01
    dataloader_num_workers: Annotated[int, "Processes that read and prepare images; 0: the main process."] = 0

    # optimization
    seed: Annotated[int, "All random numbers of the run are functions of it."] = 42
    train_batch_size: Annotated[int, "Images per process and forward."] = 32
    gradient_accumulation_steps: Annotated[int, "Forwards and backwards per optimizer step."] = 1
    max_train_steps: Annotated[int, "Optimizer steps."] = 100_000
    optimizer: Annotated[
        Literal["adamw", "muon"], "`muon`: torch.optim.Muon for the matrices of the blocks, AdamW for the rest."
    ] = "adamw"
    learning_rate: Annotated[float, "Peak learning rate."] = 1e-4
    adam_beta1: Annotated[float, "AdamW's first beta."] = 0.9
    adam_beta2: Annotated[float, "AdamW's second beta."] = 0.95
    adam_epsilon: Annotated[float, "AdamW's epsilon."] = 1e-15
    adam_weight_decay: Annotated[float, "AdamW's weight decay."] = 0.0
    muon_momentum: Annotated[float, "Muon's Nesterov momentum."] = 0.95
    lr_scheduler: Annotated[
        Literal["constant", "linear", "cosine"],
        "After the warm-up: constant, or decay to zero over the last `lr_decay_steps`.",
    ] = "constant"
    lr_warmup_steps: Annotated[int, "Steps of linear warm-up."] = 1000
    lr_decay_steps: Annotated[int | None, "Steps of the final decay (linear, cosine); none: all after warm-up."] = None
    max_grad_norm: Annotated[float, "Gradients are clipped to this norm."] = 0.2
    caption_dropout: Annotated[float, "Share of captions replaced by the empty one, for guidance."] = 0.1
    timestep_sampling: Annotated[Literal["logit_normal", "uniform"], "Distribution of t in training."] = "logit_normal"
    uniform_fraction: Annotated[float, "Share of timesteps that are drawn uniformly instead, without the shift."] = 0.1
    shift: Annotated[float, "Timestep shift s t / (1 + (s - 1) t), in training and in the saved scheduler."] = 1.0
    use_ema: Annotated[bool, "Keep an exponential moving average of the weights; it becomes the saved model."] = False
    ema_decay: Annotated[float, "Decay of the moving average."] = 0.999
    ema_update_every: Annotated[int, "Steps between two updates of the moving average."] = 10
    mixed_precision: Annotated[Literal["no", "bf16"], "Type of the computation; weights are always float32."] = "bf16"
    gradient_checkpointing: Annotated[bool, "Recompute activations in the backward pass to save memory."] = False
    attention_backend: Annotated[
        str | None, "diffusers' attention backend of the transformer, as `flash` or `_native_math`; none: its default."
    ] = None
    compile: Annotated[bool, "Compile the transformer's blocks with torch.compile."] = False

    # validation
    validation_steps: Annotated[int, "Steps between two validations; the last step is always validated."] = 1000
    num_validation_samples: Annotated[int, "Held-out images for the validation loss; 0: no validation loss."] = 0
    validation_prompts: Annotated[list, "Prompts drawn at each validation."] = field(default_factory=list)
    validation_guidance_scale: Annotated[float, "Guidance of the validation images."] = 4.0
    validation_inference_steps: Annotated[int, "Sampling steps of the validation images."] = 28

    # the run
    output_dir: Annotated[str, "Where checkpoints, logs and the final pipeline go."] = "outputs/prx"
    checkpointing_steps: Annotated[int, "Steps between two checkpoints."] = 1000
    checkpoints_total_limit: Annotated[int | None, "Keep only this many checkpoints; none: all."] = None
    resume_from_checkpoint: Annotated[
        str | None, "The folder of a checkpoint, or `latest`: the last one in output_dir, where there is one."
    ] = None
    report_to: Annotated[Literal["tensorboard", "wandb", "trackio", "none"], "Experiment tracker."] = "tensorboard"
    logging_steps: Annotated[int, "Steps between two entries of the log."] = 10
    push_to_hub: Annotated[bool, "Upload the final pipeline."] = False
    hub_model_id: Annotated[str | None, "Repository to upload to; none: the name of output_dir."] = None

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_combinations()

    def _check_ranges(self) -> None:
        at_least_one = (
            "tokenizer_vocab_size max_sequence_length resolution train_batch_size gradient_accumulation_steps "
            "max_train_steps ema_update_every validation_steps validation_inference_steps checkpointing_steps "
            "logging_steps checkpoints_total_limit lr_decay_steps"
        )
        for name in at_least_one.split():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        for name in ["lr_warmup_steps", "dataloader_num_workers", "num_validation_samples", "adam_weight_decay"]:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be finite and not negative, got {getattr(self, name)}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"`seed` must be in [0, 2**32), got {self.seed}.")
        if not 1 <= self.validation_guidance_scale < float("inf"):
            raise ValueError(
                f"`validation_guidance_scale` must be finite and at least 1 (off), got "
                f"{self.validation_guidance_scale}."
            )
        if not all(isinstance(prompt, str) for prompt in self.validation_prompts):
            raise ValueError(f"`validation_prompts` must be a list of strings, got {self.validation_prompts}.")
        for name in ["learning_rate", "noise_scale", "shift", "max_grad_norm", "adam_epsilon"]:
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be positive and finite, got {getattr(self, name)}.")
        for name in ["caption_dropout", "uniform_fraction", "max_corrupt_share"]:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is a share in [0, 1], got {getattr(self, name)}.")
        for name in ["adam_beta1", "adam_beta2", "ema_decay", "muon_momentum"]:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")

    def _check_combinations(self) -> None:
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ValueError(
                f"`dataset_name` is {self.dataset_name!r} and `train_data_dir` is {self.train_data_dir!r}: give "
                "exactly one of the two (for the built-in data: `dataset_name` scenes)."
            )
        scenes = self.dataset_name == "scenes"
        if self.dataset_config_name is not None and (scenes or self.train_data_dir is not None):
            raise ValueError(
                f"`dataset_config_name` is {self.dataset_config_name!r}; only a data set of the Hub has such "
                "configurations: leave it out."
            )
        if scenes and self.random_flip:
            raise ValueError("`random_flip` would make the captions of `dataset_name` scenes wrong (left and right).")
        if self.pretrained_model_name_or_path is None:
            if self.revision is not None:
                raise ValueError(f"`revision` is {self.revision!r}, but no `pretrained_model_name_or_path` is given.")
            if not self.transformer_config:
                raise ValueError("Give `pretrained_model_name_or_path`, or a `transformer_config` for a new one.")
            if not self.text_encoder_config and self.text_encoder_name_or_path is None:
                raise ValueError("Give `text_encoder_name_or_path`, or a `text_encoder_config` for a new one.")
        elif self.revision is not None and Path(self.pretrained_model_name_or_path).is_dir():
            raise ValueError("`revision` belongs to a repository on the Hub; the pretrained pipeline is a folder.")
        if self.text_encoder_config and self.text_encoder_name_or_path is not None:
            raise ValueError("Give `text_encoder_config` (a new one) or `text_encoder_name_or_path`, not both.")
        if self.text_encoder_config and not self.train_text_encoder:
            raise ValueError("A new text encoder (`text_encoder_config`) must be trained: set `train_text_encoder`.")
        if self.lr_scheduler == "constant" and self.lr_decay_steps is not None:
            raise ValueError("`lr_decay_steps` needs `lr_scheduler` linear or cosine; it is constant.")
        decay = self.lr_decay_steps or 0
        if self.lr_warmup_steps + decay > self.max_train_steps:
            raise ValueError(
                f"Warm-up ({self.lr_warmup_steps}) and decay ({decay}) must fit in `max_train_steps` "
                f"({self.max_train_steps})."
            )
        if self.use_ema and self.ema_update_every > self.max_train_steps:
            raise ValueError(
                f"`ema_update_every` ({self.ema_update_every}) must be at most `max_train_steps` "
                f"({self.max_train_steps}): the saved average would be the untrained weights."
            )
        if self.hub_model_id is not None and not self.push_to_hub:
            raise ValueError(f"`hub_model_id` is {self.hub_model_id!r}, but `push_to_hub` is not set.")

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain data, as they are saved with the run."""
        return dataclasses.asdict(self)


def _accepts(annotation: Any) -> tuple[str, tuple[Any, ...]]:
    """A readable name of what a field accepts, and the members of its union."""
    members = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    names = []
    for member in members:
        if typing.get_origin(member) is Literal:
            names += [str(choice) for choice in typing.get_args(member)]
        else:
            names.append("null" if member is type(None) else member.__name__)
    return " | ".join(names), members


def _check(name: str, value: Any, annotation: Any) -> Any:
    """The value as the field's type, or a ValueError: recipes and flags go through the same door."""
    accepted, members = _accepts(annotation)
    for member in members:
        if typing.get_origin(member) is Literal:
            # YAML reads a bare `no` as false
            value = "no" if value is False and "no" in typing.get_args(member) else value
            if value in typing.get_args(member) and isinstance(value, str):
                return value
        elif member is float and not isinstance(value, bool):
            try:
                return float(value)  # YAML reads 1e-4 as a word
            except (TypeError, ValueError):
                continue
        elif member is str and isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        elif isinstance(value, member) and not (member is int and isinstance(value, bool)):
            return value
    raise ValueError(f"`{name}` got {value!r}; accepted: {accepted}.")


def parse_config(argv: Sequence[str] | None = None) -> TrainingConfig:
    """Read the command line: `--config recipe.yaml` and flags over it.

    Values of flags are read as YAML, so that lists and mappings can be given: --validation_prompts '[a cat, a dog]'.

    Raises:
        ValueError: for an unknown key in the recipe, or a value of the wrong type.
        SystemExit: for an unknown flag, after printing the usage.
    """
    hints = {
        name: typing.get_args(hint)
        for name, hint in typing.get_type_hints(TrainingConfig, include_extras=True).items()
    }  # name: (type, help)
    defaults = {
        option.name: option.default_factory() if callable(option.default_factory) else option.default
        for option in dataclasses.fields(TrainingConfig)
    }
    parser = argparse.ArgumentParser(
        description="Train PRX. A recipe's settings are over the defaults, flags are over the recipe's.",
        usage="%(prog)s [--config RECIPE.yaml] [--SETTING VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="RECIPE", help="YAML with any of the settings below.")
    switch: dict[str, Any] = {"nargs": "?", "const": "true"}  # --use_ema as well as --use_ema false
    for name, (annotation, text) in hints.items():
        default = "null" if defaults[name] is None else defaults[name]
        parser.add_argument(
            f"--{name}",
            help=f"{text} ({_accepts(annotation)[0]}; default: {default})",
            default=argparse.SUPPRESS,
            metavar="VALUE",
            **(switch if annotation is bool else {}),
        )
    flags = vars(parser.parse_args(argv))
    recipe = flags.pop("config")
    settings = {} if recipe is None else load_recipe(recipe)
    for name, text in flags.items():
        # a plain word or path stays as it was typed
        settings[name] = text if hints[name][0] in (str, str | None) and text != "null" else _read_yaml(name, text)
    return TrainingConfig(**{name: _check(name, value, hints[name][0]) for name, value in settings.items()})


def _read_yaml(source: str | Path, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"`{source}` is no valid YAML: {error}") from error


def load_recipe(path: Path) -> dict[str, Any]:
    """The settings of a recipe file.

    Raises:
        ValueError: if there is no such file, it is no mapping, or has a key that is no setting.
    """
    if not path.is_file():
        raise ValueError(f"`config` is {str(path)!r}, which is no file.")
    settings = _read_yaml(path, path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"The recipe {path} must be a mapping of settings, got {type(settings).__name__}.")
    known = {option.name for option in dataclasses.fields(TrainingConfig)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"The recipe {path} has unknown settings {unknown}; known: {sorted(known)}.")
    return settings
