"""From a recipe and the flags of a command line to the configuration of a run."""

import argparse
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cli import did_you_mean
from ..config.fields import AT_LEAST_ONE, Setting, settings_of
from ..config.training_config import TrainingConfig, sources_of
from ..files import expand_path, read_yaml
from .networks import saved_settings
from .stages import build_stages, quiet_data

# What a run's data are: a flag for one of them takes the place of whatever a recipe has.
DATA = ("dataset_name", "train_data_dir", "data_sources")
# What counts steps along the whole run; a recipe's numbers follow a flag that makes the run shorter than they need.
SCHEDULE = ("lr_warmup_steps", "lr_decay_steps")
# Settings of the command line and of recipes that end up in others.
EPOCHS = "num_train_epochs"
IMAGES = "num_validation_images"
OWN: dict[str, Setting] = {
    EPOCHS: Setting(
        int | None, "Times that every sample is read, in place of `max_train_steps`.", AT_LEAST_ONE, frozenset()
    ),
    IMAGES: Setting(int | None, "Pictures of each validation prompt.", AT_LEAST_ONE, frozenset()),
}
# Flags of diffusers' scripts for settings that have another name here.
ALIASES = {
    "lora_rank": ["--rank"],
    "train_data_dir": ["--instance_data_dir"],
    "validation_prompts": ["--validation_prompt"],
}
# Values of diffusers' scripts that have another name here.
VALUES = {"lr_scheduler": {"constant_with_warmup": "constant"}}
# What takes the place of flags of diffusers' scripts that have no counterpart here.
ANSWERS = {
    "allow_tf32": "`--mixed_precision bf16`, the default, computes matrix products in bf16.",
    "cache_dir": "set HF_HOME for what comes from the Hub.",
    "cache_latents": "training/precompute_prx.py caches latents and texts, with the flags of the run and "
    "`--precomputed_dir DIR --center_crop`.",
    "class_data_dir": "mix in pictures of the class with `--data_sources '[{name: MINE, weight: 0.5}, {name: CLASS, "
    "weight: 0.5}]'`.",
    "class_prompt": "give the pictures of the class an `instance_prompt` in `--data_sources`.",
    "enable_xformers_memory_efficient_attention": "pass `--attention_backend xformers`.",
    "guidance_scale": "pass `--validation_guidance_scale` for the validation images; PRX has no embedded guidance.",
    "hub_token": "log in with `hf auth login`, or set HF_TOKEN.",
    "input_perturbation": "flow matching has no such term; leave it out.",
    "logging_dir": "logs go to the folder `logs` in `--output_dir`.",
    "logit_mean": "`--shift S` moves the distribution of t as a mean of ln(S) does.",
    "logit_std": "the standard deviation of `--timestep_sampling logit_normal` is 1; the alternative is `uniform`.",
    "lr_num_cycles": "`--lr_scheduler` is constant, linear or cosine; `--lr_decay_steps` is the length of the decay.",
    "lr_power": "`--lr_scheduler` is constant, linear or cosine; `--lr_decay_steps` is the length of the decay.",
    "max_train_samples": "pass a smaller folder, or `--dataset_split 'train[:1000]'` for a data set of the Hub.",
    "noise_offset": "flow matching has no such term; leave it out.",
    "num_class_images": "pictures of the class are not generated: mix in your own with `--data_sources`.",
    "prior_loss_weight": "the share of the pictures of the class is their `weight` in `--data_sources`.",
    "repeats": "samples are read again until `--max_train_steps` or `--num_train_epochs` is reached.",
    "sample_batch_size": "pictures of the class are not generated: mix in your own with `--data_sources`.",
    "scale_lr": "`--learning_rate` is taken as it is: multiply it yourself.",
    "snr_gamma": "flow matching weighs all timesteps alike; `--shift` and `--uniform_fraction` change their shares.",
    "text_encoder_lr": "with `--train_text_encoder` the text encoder has the `--learning_rate` of the transformer.",
    "tracker_project_name": "runs are logged to the project `prx`.",
    "upcast_before_saving": "weights are stored in float32.",
    "use_8bit_adam": "choose `--optimizer adamw` or `muon`; to save memory, pass `--sharding full` or "
    "`--gradient_checkpointing`.",
    "validation_epochs": "pass `--validation_steps`, the optimizer steps between two validations.",
    "variant": "weights are read as they are stored, and trained in float32.",
    "weighting_scheme": "pass `--timestep_sampling logit_normal` or `uniform`, and `--shift`.",
    "with_prior_preservation": "mix in pictures of the class with `--data_sources '[{name: MINE, weight: 0.5}, {name: "
    "CLASS, weight: 0.5}]'`.",
}  # fmt: skip


@dataclass(frozen=True)
class CommandLine:
    """Settings as a person gave them, by where they come from.

    Args:
        defaults: defaults of the script, where they differ from those of `TrainingConfig`.
        recipe: settings of the recipe and its bases, without those that flags replace.
        flags: settings of flags.
        planned_steps: optimizer steps that the recipe is made for.
        notes: sentences about what replaced what.
    """

    defaults: dict[str, Any]
    recipe: dict[str, Any]
    flags: dict[str, Any]
    planned_steps: int
    notes: list[str]

    @property
    def settings(self) -> dict[str, Any]:
        """All settings: flags over the recipe over the defaults."""
        return self.defaults | self.recipe | self.flags


def read_run(
    argv: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None
) -> tuple[TrainingConfig, list[str]]:
    """Read the command line of a run, and what it follows from: the pretrained pipeline, and the size of the data.

    What a pipeline whose transformer is trained further says of itself (`networks.saved_settings`) is under the recipe
    and the flags, and over the defaults.

    Args:
        argv: arguments without the script's name; None: those of the process.
        defaults: defaults of this script, where they differ from those of `TrainingConfig`.

    Returns:
        The configuration, and sentences to print: what was taken from where, and what replaced what.

    Raises:
        ValueError: see `read_command_line` and `TrainingConfig`; and for a pipeline or data that cannot be read.
    """
    line = read_command_line(argv, defaults)
    settings, notes = line.settings, list(line.notes)
    pretrained = settings.get("pretrained_model_name_or_path")
    if pretrained is not None and not settings.get("transformer_config"):
        saved = saved_settings(expand_path(pretrained), settings.get("revision"))
        given = line.recipe | line.flags
        if taken := [f"`{name}` {value}" for name, value in saved.items() if name not in given]:
            notes.append(f"from {pretrained}: {', '.join(taken)}")
        for name, value in saved.items():
            if name in given and given[name] != value:
                source = "flag" if name in line.flags else "recipe"
                notes.append(f"`{name}` is {given[name]} ({source}); the pretrained pipeline has {value}")
        settings = line.defaults | saved | given
    if (epochs := settings.pop(EPOCHS, None)) is not None:
        settings["max_train_steps"], note = _steps_of_epochs(settings, epochs)
        notes.append(note)
    settings, fitted = _fit_schedule(settings, line)
    return TrainingConfig(**settings), notes + fitted


def parse_config(argv: Sequence[str] | None = None) -> TrainingConfig:
    """Read the command line of a run without looking at any pipeline or data.

    Raises:
        ValueError: see `read_command_line` and `TrainingConfig`; and for `num_train_epochs`, which needs the data.
    """
    line = read_command_line(argv)
    if EPOCHS in line.settings:
        raise ValueError(f"`{EPOCHS}` needs the size of the data: pass `--max_train_steps` here.")
    return TrainingConfig(**_fit_schedule(line.settings, line)[0])


def read_command_line(argv: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None) -> CommandLine:
    """Read `--config recipe.yaml` and flags over it.

    Values of flags are read as YAML, so that lists and mappings can be given: --validation_prompts '[a cat, a dog]'.

    Args:
        argv: arguments without the script's name; None: those of the process.
        defaults: defaults of this script, where they differ from those of `TrainingConfig`.

    Raises:
        ValueError: for an unknown flag or key, a value of the wrong type, or settings that replace each other.
        SystemExit: for --help, and for a flag without its value.
    """
    known = settings_of(TrainingConfig) | OWN
    flags, recipe_file = _read_flags(argv, dict(defaults or {}), known)
    recipe = {} if recipe_file is None else load_recipe(recipe_file)
    given = set(flags) | (set(DATA) if set(DATA) & set(flags) else set())
    staged = sorted({name for stage in recipe.get("stages") or [] for name in given & set(stage)})
    if staged and "stages" not in flags:
        raise ValueError(f"The stages of {recipe_file} set {staged} themselves, over flags: give --stages instead.")
    recipe = {name: _read_value(name, value, known[name]) for name, value in recipe.items()}
    planned = (dict(defaults or {}) | recipe).get("max_train_steps", TrainingConfig.max_train_steps)
    recipe, notes = _without_replaced(recipe, flags)
    count = flags.pop(IMAGES, None) or recipe.pop(IMAGES, None)
    recipe.pop(IMAGES, None)
    line = CommandLine(dict(defaults or {}), recipe, flags, planned, notes)
    if count is not None:
        prompts = line.settings.get("validation_prompts", [])
        line.flags["validation_prompts"] = [prompt for prompt in prompts for _ in range(count)]
    return line


def _read_flags(
    argv: Sequence[str] | None, defaults: dict[str, Any], known: Mapping[str, Setting]
) -> tuple[dict[str, Any], Path | None]:
    """Return the settings of flags, and the recipe that they are over."""
    shown = {
        option.name: option.default_factory() if callable(option.default_factory) else option.default
        for option in dataclasses.fields(TrainingConfig)
    } | defaults
    parser = argparse.ArgumentParser(
        description="Train PRX. A recipe's settings are over the defaults, flags are over the recipe's.",
        usage="%(prog)s [--config RECIPE.yaml] [--SETTING VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="RECIPE", help="YAML with any of the settings below.")
    names = {"--config": "config"}
    for name, setting in known.items():
        default = "null" if shown.get(name) is None else shown[name]
        spelled = [f"--{name}", *ALIASES.get(name, [])]
        names |= dict.fromkeys(spelled, name)
        # --use_ema as well as --use_ema false; --validation_prompts "a cat" "a dog" as well as '[a cat, a dog]'
        several: dict[str, Any] = {bool: {"nargs": "?", "const": "true"}, list: {"nargs": "+"}}.get(
            setting.annotation, {}
        )
        parser.add_argument(
            *spelled,
            help=f"{setting.help} ({setting.accepts}; default: {default})".replace("%", "%%"),
            default=argparse.SUPPRESS,
            metavar="VALUE",
            **several,
        )
    parsed, unknown = parser.parse_known_args(argv)
    for flag in unknown:
        word = flag.partition("=")[0]
        if answer := ANSWERS.get(word.removeprefix("--").replace("-", "_")):
            raise ValueError(f"`{word}` is not a flag here: {answer}")
    if unknown:
        raise ValueError(f"unknown arguments: {' '.join(unknown)}{did_you_mean(unknown, names)}; --help lists all.")
    flags = vars(parsed)
    recipe = flags.pop("config")
    return (
        {name: _read_flag(name, text, known[name]) for name, text in flags.items()},
        None if recipe is None else Path(expand_path(recipe)),
    )


def _read_flag(name: str, text: str | list[str], setting: Setting) -> Any:
    value: Any = text
    if isinstance(text, list):
        # one word may be a list in YAML; anything else is a prompt, or the name of a layer, as it was typed
        value = read_yaml(name, text[0]) if len(text) == 1 and text[0].lstrip()[:1] in ("[", "-") else text
    elif setting.annotation not in (str, str | None) or text == "null":  # a plain word or path stays as it was typed
        value = read_yaml(name, text)
    return _read_value(name, value, setting)


def _read_value(name: str, value: Any, setting: Setting) -> Any:
    value = VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value
    value = setting.read(name, value)
    setting.check(name, value)
    if name == "lora_layers" and len(value) == 1 and isinstance(value[0], str):
        return [part.strip() for part in value[0].split(",")]  # one word with commas, as in diffusers' scripts
    return value


def _without_replaced(recipe: dict[str, Any], flags: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a recipe without what flags replace under another name, and what there is to say about it."""
    if EPOCHS in flags and "max_train_steps" in flags:
        raise ValueError(f"`{EPOCHS}` and `max_train_steps` are both given: pass one of them.")
    replaced: dict[str, str] = {}  # setting of the recipe -> the flag in its place
    for kind in (name for name in DATA if flags.get(name)):
        if others := [name for name in DATA if recipe.get(name) and name not in flags]:
            # where the other data come from; columns and captions stay
            replaced |= {name: kind for name in (*others, "dataset_config_name", "dataset_split") if name in recipe}
    for one, other in ((EPOCHS, "max_train_steps"), ("max_train_steps", EPOCHS)):
        if one in flags and other in recipe:
            replaced[other] = one
    if EPOCHS in recipe and "max_train_steps" in recipe and not {EPOCHS, "max_train_steps"} & set(replaced):
        raise ValueError(f"The recipe has `{EPOCHS}` and `max_train_steps`: keep one of them.")
    notes = [f"--{flag} in place of the recipe's `{name}` {recipe[name]}" for name, flag in replaced.items()]
    return {name: value for name, value in recipe.items() if name not in replaced}, notes


def _steps_of_epochs(settings: dict[str, Any], epochs: int) -> tuple[int, str]:
    """Return the optimizer steps of so many epochs, and a sentence with the numbers.

    Raises:
        ValueError: for data without an end, and for stages, which have steps of their own.
    """
    others = {name: value for name, value in settings.items() if name not in ("max_train_steps", *SCHEDULE)}
    cfg = TrainingConfig(**others)
    sources = sources_of(cfg)
    endless = cfg.streaming or (cfg.scenes_size is None and any(source.is_drawn for source in sources))
    if endless or cfg.stages or (len(sources) > 1 and sources[0].weight is not None):
        kind = "stages, each with `max_train_steps` of its own" if cfg.stages else "data without an end"
        raise ValueError(f"`{EPOCHS}` is {epochs}, but the run has {kind}: pass `--max_train_steps`.")
    with quiet_data():  # the run opens them again, and warns
        (stage,) = build_stages(cfg)
    samples, batch = sum(stage.sizes), stage.step_size(int(os.environ.get("WORLD_SIZE", 1)))
    steps = math.ceil(epochs * samples / batch)
    return steps, f"`{EPOCHS}` {epochs}: {steps} steps of {batch} of the {samples} samples"


def _fit_schedule(settings: dict[str, Any], line: CommandLine) -> tuple[dict[str, Any], list[str]]:
    """Shorten a recipe's warm-up and decay in proportion where a flag has made its run too short for them."""
    steps = settings.get("max_train_steps")
    planned = line.planned_steps
    lengths = {name: settings[name] for name in SCHEDULE if settings.get(name) is not None}
    followed = [name for name in lengths if name not in line.flags and lengths[name]]
    if steps is None or steps >= planned or sum(lengths.values()) <= steps or not followed:
        return settings, []
    changed = {name: lengths[name] * steps // planned for name in followed}
    if "lr_decay_steps" in changed:
        changed["lr_decay_steps"] = max(1, changed["lr_decay_steps"])
    told = ", ".join(f"`{name}` {lengths[name]} becomes {value}" for name, value in changed.items())
    return settings | changed, [f"{told}: of {steps} steps in place of the recipe's {planned}"]


def load_recipe(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read the settings of a recipe file, over those of the recipe that its `base` names, relative to its own folder.

    Args:
        path: recipe file.
        above: recipes whose base this one is.

    Raises:
        ValueError: if there is no such file, it is not a mapping, has a key that is not a setting, has a base but no
            `output_dir` of its own, or is its own base.
    """
    if path.resolve() in above:
        raise ValueError(f"The recipe {path} is its own `base`.")
    if not path.is_file():
        raise ValueError(f"`config` is {str(path)!r}, which is not a file.")
    settings = read_yaml(path, path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"The recipe {path} must be a mapping of settings, got {type(settings).__name__}.")
    base = settings.pop("base", None)
    known = settings_of(TrainingConfig) | OWN
    for name in map(str, settings):
        if name not in known and name in ANSWERS:
            raise ValueError(f"The recipe {path} has `{name}`, which is not a setting here: {ANSWERS[name]}")
    if unknown := sorted(set(map(str, settings)) - set(known)):
        raise ValueError(
            f"The recipe {path} has unknown settings {unknown}{did_you_mean(unknown, known)}; --help lists all."
        )
    if base is None:
        return settings
    if "output_dir" not in settings:
        raise ValueError(f"The recipe {path} has a base, {base}, and needs an `output_dir` of its own.")
    above = (*above, path.resolve())
    return {**load_recipe(path.parent / expand_path(str(base)), above), **settings}
