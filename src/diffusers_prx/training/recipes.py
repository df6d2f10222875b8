"""Recipes and command-line flags, resolved to the configuration of a run."""

import argparse
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cli import did_you_mean
from ..config.data_sources import data_sources_of
from ..config.fields import AT_LEAST_ONE, ConfigField, config_fields
from ..config.training_config import TrainingConfig
from ..files import expand_path, read_yaml
from .networks import saved_settings
from .stages import build_stages, quiet_data

# A flag for one of these replaces all of them in the recipe.
DATA_SETTINGS = ("dataset_name", "train_data_dir", "data_sources")
# Step counts that are shortened in proportion if a flag shortens the recipe's run.
SCHEDULE_SETTINGS = ("lr_warmup_steps", "lr_decay_steps")
EPOCHS = "num_train_epochs"
IMAGES = "num_validation_images"
# Settings of recipes and flags that are converted to settings of `TrainingConfig`.
CONVERTED_SETTINGS: dict[str, ConfigField] = {
    EPOCHS: ConfigField(int | None, "Number of passes over the data, instead of `max_train_steps`.", AT_LEAST_ONE),
    IMAGES: ConfigField(int | None, "Number of images per validation prompt.", AT_LEAST_ONE),
}
# Names in diffusers' training scripts for settings that have another name here.
ALIASES = {
    "lora_rank": ["--rank"],
    "train_data_dir": ["--instance_data_dir"],
    "validation_prompts": ["--validation_prompt"],
}
# Values in diffusers' training scripts that have another name here.
VALUE_ALIASES = {"lr_scheduler": {"constant_with_warmup": "constant"}}
_PRIOR_PRESERVATION = (
    "mix in images of the class with `--data_sources '[{name: MINE, weight: 0.5}, {name: CLASS, weight: 0.5}]'`."
)
_NO_GENERATION = "class images are not generated: mix in your own with `--data_sources`."
_SCHEDULERS = "`--lr_scheduler` is constant, linear or cosine; `--lr_decay_steps` sets the length of the decay."
_NO_NOISE_TERM = "flow matching has no such term: remove it."
# Alternatives to flags of diffusers' training scripts that do not exist here.
FLAG_HINTS = {
    "allow_tf32": "`--mixed_precision auto`, the default, computes matrix products in bf16 where that is fast.",
    "cache_dir": "set the environment variable HF_HOME to change the folder for downloads.",
    "cache_latents": "run training/precompute_prx.py with the flags of the run and `--precomputed_dir DIR "
    "--center_crop`.",
    "class_data_dir": _PRIOR_PRESERVATION,
    "class_prompt": "set `instance_prompt` for the class images in `--data_sources`.",
    "enable_xformers_memory_efficient_attention": "pass `--attention_backend xformers`.",
    "guidance_scale": "pass `--validation_guidance_scale` for validation images; PRX has no guidance embedding.",
    "hub_token": "log in with `hf auth login`, or set HF_TOKEN.",
    "input_perturbation": _NO_NOISE_TERM,
    "logging_dir": "logs are written to the folder `logs` in `--output_dir`.",
    "logit_mean": "pass `--shift S`, which equals a mean of ln(S).",
    "logit_std": "the standard deviation of `--timestep_sampling logit_normal` is 1; the alternative is `uniform`.",
    "lr_num_cycles": _SCHEDULERS,
    "lr_power": _SCHEDULERS,
    "max_train_samples": "pass a smaller folder, or `--dataset_split 'train[:1000]'` for a Hub data set.",
    "noise_offset": _NO_NOISE_TERM,
    "num_class_images": _NO_GENERATION,
    "prior_loss_weight": "set `weight` of the class images in `--data_sources`.",
    "repeats": "samples are repeated until `--max_train_steps` or `--num_train_epochs` is reached.",
    "sample_batch_size": _NO_GENERATION,
    "scale_lr": "multiply `--learning_rate` yourself; it is used unchanged.",
    "snr_gamma": "flow matching weights all timesteps equally; change how often they are sampled with `--shift` and "
    "`--uniform_fraction`.",
    "text_encoder_lr": "with `--train_text_encoder`, the text encoder uses `--learning_rate` too.",
    "tracker_project_name": "runs are logged to the project `prx`.",
    "upcast_before_saving": "weights are stored in float32 already: remove it.",
    "use_8bit_adam": "choose `--optimizer adamw` or `muon`; to save memory, pass `--sharding full` or "
    "`--gradient_checkpointing`.",
    "validation_epochs": "pass `--validation_steps`, the number of optimizer steps between two validations.",
    "variant": "weights are loaded as stored and trained in float32: remove it.",
    "weighting_scheme": "pass `--timestep_sampling logit_normal` or `uniform`, and `--shift`.",
    "with_prior_preservation": _PRIOR_PRESERVATION,
}


@dataclass(frozen=True)
class CommandLine:
    """Settings as the user gave them, by origin.

    Args:
        defaults: defaults of the script that differ from those of `TrainingConfig`.
        recipe: settings of the recipe and its bases, without those that flags replace.
        flags: settings of the flags.
        recipe_steps: number of optimizer steps that the recipe is made for.
        notes: sentences about replaced settings.
    """

    defaults: dict[str, Any]
    recipe: dict[str, Any]
    flags: dict[str, Any]
    recipe_steps: int
    notes: list[str]

    @property
    def settings(self) -> dict[str, Any]:
        """All settings: flags override the recipe, which overrides the defaults."""
        return self.defaults | self.recipe | self.flags


def parse_run_config(
    argv: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None
) -> tuple[TrainingConfig, list[str]]:
    """Parse the command line of a run and complete it from the pretrained pipeline and the size of the data.

    Settings of the pretrained pipeline (`networks.saved_settings`) override the defaults; the recipe and the flags
    override them. They apply if the pipeline's transformer is trained further.

    Args:
        argv: arguments without the script's name; None: those of the process.
        defaults: defaults of the script that differ from those of `TrainingConfig`.

    Returns:
        The configuration, and sentences to print about the origin of settings.

    Raises:
        ValueError: see `parse_command_line` and `TrainingConfig`; or a pipeline or data set cannot be read.

    Example:
        >>> cfg, notes = parse_run_config(["--config", "training/recipes/quickstart.yaml", "--seed", "1"])
    """
    line = parse_command_line(argv, defaults)
    settings, notes = line.settings, list(line.notes)
    pretrained = settings.get("pretrained_model_name_or_path")
    if pretrained is not None and not settings.get("transformer_config"):
        saved = saved_settings(expand_path(pretrained), settings.get("revision"))
        explicit = line.recipe | line.flags
        if adopted := [f"`{name}` {value}" for name, value in saved.items() if name not in explicit]:
            notes.append(f"from {pretrained}: {', '.join(adopted)}")
        for name, value in saved.items():
            if name in explicit and explicit[name] != value:
                origin = "flag" if name in line.flags else "recipe"
                notes.append(f"`{name}` is {explicit[name]} ({origin}); the pretrained pipeline has {value}")
        settings = line.defaults | saved | explicit
    if (epochs := settings.pop(EPOCHS, None)) is not None:
        settings["max_train_steps"], note = _count_steps(settings, epochs)
        notes.append(note)
    settings, schedule_notes = _shorten_schedule(settings, line)
    return TrainingConfig(**settings), notes + schedule_notes


def parse_config(argv: Sequence[str] | None = None) -> TrainingConfig:
    """Parse the command line of a run without reading a pipeline or data.

    Raises:
        ValueError: see `parse_command_line` and `TrainingConfig`; or `num_train_epochs` is given, which needs the
            data.

    Example:
        >>> cfg = parse_config(["--config", "training/recipes/quickstart.yaml"])
    """
    line = parse_command_line(argv)
    if EPOCHS in line.settings:
        raise ValueError(f"`{EPOCHS}` needs the size of the data: pass `--max_train_steps` here.")
    return TrainingConfig(**_shorten_schedule(line.settings, line)[0])


def parse_command_line(argv: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None) -> CommandLine:
    """Parse `--config recipe.yaml` and the flags that override it.

    Flag values are YAML, for lists and mappings: --validation_prompts '[a cat, a dog]'.

    Args:
        argv: arguments without the script's name; None: those of the process.
        defaults: defaults of the script that differ from those of `TrainingConfig`.

    Raises:
        ValueError: a flag or key is unknown, a value has the wrong type, or settings replace each other.
        SystemExit: --help is given, or a flag without its value.
    """
    script_defaults = dict(defaults or {})
    fields = config_fields(TrainingConfig) | CONVERTED_SETTINGS
    flags, recipe_file = _parse_flags(argv, script_defaults, fields)
    recipe = {} if recipe_file is None else load_recipe(recipe_file)
    overridden = set(flags) | (set(DATA_SETTINGS) if set(DATA_SETTINGS) & set(flags) else set())
    staged = sorted({name for stage in recipe.get("stages") or [] for name in overridden & set(stage)})
    if staged and "stages" not in flags:
        raise ValueError(f"The stages of {recipe_file} set {staged}, which would override the flags: pass `--stages`.")
    recipe = {name: _parse_value(name, value, fields[name]) for name, value in recipe.items()}
    recipe_steps = (script_defaults | recipe).get("max_train_steps", TrainingConfig.max_train_steps)
    recipe, notes = _drop_replaced(recipe, flags)
    images = flags.pop(IMAGES, None) or recipe.get(IMAGES)
    recipe.pop(IMAGES, None)
    line = CommandLine(script_defaults, recipe, flags, recipe_steps, notes)
    if images is not None:
        prompts = line.settings.get("validation_prompts", [])
        line.flags["validation_prompts"] = [prompt for prompt in prompts for _ in range(images)]
    return line


def _parse_flags(
    argv: Sequence[str] | None, defaults: dict[str, Any], fields: Mapping[str, ConfigField]
) -> tuple[dict[str, Any], Path | None]:
    """Return the settings of the flags, and the path of the recipe."""
    shown_defaults = {
        option.name: option.default_factory() if callable(option.default_factory) else option.default
        for option in dataclasses.fields(TrainingConfig)
    } | defaults
    parser = argparse.ArgumentParser(
        description="Train PRX. Flags override the recipe, which overrides the defaults.",
        usage="%(prog)s [--config RECIPE.yaml] [--SETTING VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="RECIPE", help="YAML file with any of the settings below.")
    spellings = ["--config"]
    for name, field in fields.items():
        default = "null" if shown_defaults.get(name) is None else shown_defaults[name]
        spelled = [f"--{name}", *ALIASES.get(name, [])]
        spellings += spelled
        # --use_ema as well as --use_ema false; --validation_prompts "a cat" "a dog" as well as '[a cat, a dog]'
        arity: dict[Any, dict[str, Any]] = {bool: {"nargs": "?", "const": "true"}, list: {"nargs": "+"}}
        parser.add_argument(
            *spelled,
            help=f"{field.help} ({field.accepted}; default: {default})".replace("%", "%%"),
            default=argparse.SUPPRESS,
            metavar="VALUE",
            **arity.get(field.type_hint, {}),
        )
    parsed, unknown = parser.parse_known_args(argv)
    for argument in unknown:
        flag = argument.partition("=")[0]
        if hint := FLAG_HINTS.get(flag.removeprefix("--").replace("-", "_")):
            raise ValueError(f"`{flag}` is not a flag of this script: {hint}")
    if unknown:
        raise ValueError(
            f"unknown arguments: {' '.join(unknown)}{did_you_mean(unknown, spellings)}; --help lists all flags."
        )
    flags = vars(parsed)
    recipe = flags.pop("config")
    return (
        {name: _parse_flag(name, text, fields[name]) for name, text in flags.items()},
        None if recipe is None else Path(expand_path(recipe)),
    )


def _parse_flag(name: str, text: str | list[str], field: ConfigField) -> Any:
    value: Any = text
    if isinstance(text, list):
        # a single word may be a YAML list; anything else is a prompt or a layer name, taken literally
        value = read_yaml(name, text[0]) if len(text) == 1 and text[0].lstrip()[:1] in ("[", "-") else text
    elif field.type_hint not in (str, str | None) or text == "null":  # strings and paths are taken literally
        value = read_yaml(name, text)
    return _parse_value(name, value, field)


def _parse_value(name: str, value: Any, field: ConfigField) -> Any:
    value = VALUE_ALIASES.get(name, {}).get(value, value) if isinstance(value, str) else value
    value = field.parse(name, value)
    if name == "lora_layers" and len(value) == 1 and isinstance(value[0], str):
        return [part.strip() for part in value[0].split(",")]  # one word with commas, as in diffusers' scripts
    return value


def _drop_replaced(recipe: dict[str, Any], flags: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the recipe without settings that flags replace under another name, and a note for each of them."""
    if EPOCHS in flags and "max_train_steps" in flags:
        raise ValueError(f"`{EPOCHS}` and `max_train_steps` are both set: pass one of them.")
    replaced: dict[str, str] = {}  # setting of the recipe -> flag
    for flag in (name for name in DATA_SETTINGS if flags.get(name)):
        if others := [name for name in DATA_SETTINGS if recipe.get(name) and name not in flags]:
            # columns and captions stay
            replaced |= {name: flag for name in (*others, "dataset_config_name", "dataset_split") if name in recipe}
    for flag, setting in ((EPOCHS, "max_train_steps"), ("max_train_steps", EPOCHS)):
        if flag in flags and setting in recipe:
            replaced[setting] = flag
    if EPOCHS in recipe and "max_train_steps" in recipe and not {EPOCHS, "max_train_steps"} & set(replaced):
        raise ValueError(f"The recipe sets `{EPOCHS}` and `max_train_steps`: remove one of them.")
    notes = [f"--{flag} replaces the recipe's `{name}` {recipe[name]}" for name, flag in replaced.items()]
    return {name: value for name, value in recipe.items() if name not in replaced}, notes


def _count_steps(settings: dict[str, Any], epochs: int) -> tuple[int, str]:
    """Return the number of optimizer steps for a number of epochs, and a note that explains it.

    Raises:
        ValueError: the data has no end, or the run has stages, which have their own step counts.
    """
    ignored = ("max_train_steps", *SCHEDULE_SETTINGS)
    cfg = TrainingConfig(**{name: value for name, value in settings.items() if name not in ignored})
    sources = data_sources_of(cfg)
    is_endless = cfg.streaming or (cfg.scenes_size is None and any(source.is_drawn for source in sources))
    if is_endless or cfg.stages or (len(sources) > 1 and sources[0].weight is not None):
        reason = "stages, which have their own `max_train_steps`" if cfg.stages else "data without an end"
        raise ValueError(f"`{EPOCHS}` is {epochs}, but the run has {reason}: pass `--max_train_steps`.")
    with quiet_data():  # the run opens the data again and prints the warnings
        (stage,) = build_stages(cfg)
    samples, batch_size = sum(stage.sizes), stage.step_size(int(os.environ.get("WORLD_SIZE", 1)))
    steps = math.ceil(epochs * samples / batch_size)
    return steps, f"`{EPOCHS}` {epochs}: {steps} steps of {batch_size} of the {samples} samples"


def _shorten_schedule(settings: dict[str, Any], line: CommandLine) -> tuple[dict[str, Any], list[str]]:
    """Shorten the recipe's warm-up and decay in proportion if a flag makes the run too short for them."""
    steps = settings.get("max_train_steps")
    lengths = {name: settings[name] for name in SCHEDULE_SETTINGS if settings.get(name) is not None}
    adjustable = [name for name in lengths if name not in line.flags and lengths[name]]
    if steps is None or steps >= line.recipe_steps or sum(lengths.values()) <= steps or not adjustable:
        return settings, []
    shortened = {name: lengths[name] * steps // line.recipe_steps for name in adjustable}
    if "lr_decay_steps" in shortened:
        shortened["lr_decay_steps"] = max(1, shortened["lr_decay_steps"])
    changes = ", ".join(f"`{name}` {lengths[name]} becomes {value}" for name, value in shortened.items())
    return settings | shortened, [f"{changes}: the run has {steps} steps, the recipe {line.recipe_steps}"]


def load_recipe(path: Path, derived_recipes: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a recipe file, with the settings of the recipe that its `base` names (relative to its folder) below them.

    Args:
        path: recipe file.
        derived_recipes: recipes that have this one as a base, directly or not.

    Raises:
        ValueError: the file is missing, is not a mapping, has unknown keys, has a base but no `output_dir`, or is
            its own base.

    Example:
        >>> settings = load_recipe(Path("training/recipes/quickstart.yaml"))
    """
    if path.resolve() in derived_recipes:
        raise ValueError(f"The recipe {path} is its own `base`.")
    if not path.is_file():
        raise ValueError(f"`config` is {str(path)!r}, which is not a file.")
    settings = read_yaml(path, path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"The recipe {path} must be a mapping of settings, got {type(settings).__name__}.")
    base = settings.pop("base", None)
    known = config_fields(TrainingConfig) | CONVERTED_SETTINGS
    for name in map(str, settings):
        if name not in known and name in FLAG_HINTS:
            raise ValueError(f"The recipe {path} has `{name}`, which is not a setting here: {FLAG_HINTS[name]}")
    if unknown := sorted(set(map(str, settings)) - set(known)):
        raise ValueError(
            f"The recipe {path} has unknown settings {unknown}{did_you_mean(unknown, known)}; --help lists all."
        )
    if base is None:
        return settings
    if "output_dir" not in settings:
        raise ValueError(f"The recipe {path} has the base {base}: give it its own `output_dir`.")
    base_settings = load_recipe(path.parent / expand_path(str(base)), (*derived_recipes, path.resolve()))
    return {**base_settings, **settings}
