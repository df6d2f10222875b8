"""From a recipe and the flags of a command line to the configuration of a run."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .config import TrainingConfig
from .settings import settings_of

# Flags of diffusers' scripts for settings that have another name here.
ALIASES = {"lora_rank": "--rank"}


def parse_config(argv: Sequence[str] | None = None) -> TrainingConfig:
    """The configuration of a run: what `parse_settings` reads over the defaults.

    Raises:
        ValueError: see `parse_settings` and `TrainingConfig`.
        SystemExit: see `parse_settings`.
    """
    return TrainingConfig(**parse_settings(argv))


def parse_settings(argv: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read the command line: `--config recipe.yaml` and flags over it.

    Values of flags are read as YAML, so that lists and mappings can be given: --validation_prompts '[a cat, a dog]'.

    Args:
        argv: without the script's name; that of the process when None.
        defaults: of this script, where they are not those of `TrainingConfig`; under the recipe.

    Raises:
        ValueError: for an unknown key in the recipe, or a value of the wrong type.
        SystemExit: for an unknown flag, after printing the usage.
    """
    known = settings_of(TrainingConfig)
    shown = {
        option.name: option.default_factory() if callable(option.default_factory) else option.default
        for option in dataclasses.fields(TrainingConfig)
    } | dict(defaults or {})
    parser = argparse.ArgumentParser(
        description="Train PRX. A recipe's settings are over the defaults, flags are over the recipe's.",
        usage="%(prog)s [--config RECIPE.yaml] [--SETTING VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="RECIPE", help="YAML with any of the settings below.")
    switch: dict[str, Any] = {"nargs": "?", "const": "true"}  # --use_ema as well as --use_ema false
    for name, setting in known.items():
        default = "null" if shown[name] is None else shown[name]
        parser.add_argument(
            f"--{name}",
            *([ALIASES[name]] if name in ALIASES else []),
            help=f"{setting.help} ({setting.accepts}; default: {default})",
            default=argparse.SUPPRESS,
            metavar="VALUE",
            **(switch if setting.annotation is bool else {}),
        )
    flags = vars(parser.parse_args(argv))
    recipe = flags.pop("config")
    settings = dict(defaults or {}) | ({} if recipe is None else load_recipe(recipe))
    staged = sorted({name for stage in settings.get("stages") or [] for name in flags if name in stage})
    if staged:
        raise ValueError(f"The stages of {recipe} set {staged} themselves, over flags: give --stages instead.")
    for name, text in flags.items():
        # a plain word or path stays as it was typed
        word = known[name].annotation in (str, str | None) and text != "null"
        settings[name] = text if word else _read_yaml(name, text)
    return {name: known[name].read(name, value) for name, value in settings.items()}


def _read_yaml(source: str | Path, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"`{source}` is no valid YAML: {error}") from error


def load_recipe(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a recipe file, over those of the recipe that its `base` names, relative to its own folder.

    Args:
        path: of the file.
        above: the recipes whose base this one is.

    Raises:
        ValueError: if there is no such file, it is no mapping, has a key that is no setting, has a base but no
            `output_dir` of its own, or is its own base.
    """
    if path.resolve() in above:
        raise ValueError(f"The recipe {path} is its own `base`.")
    if not path.is_file():
        raise ValueError(f"`config` is {str(path)!r}, which is no file.")
    settings = _read_yaml(path, path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"The recipe {path} must be a mapping of settings, got {type(settings).__name__}.")
    base = settings.pop("base", None)
    known = settings_of(TrainingConfig)
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"The recipe {path} has unknown settings {unknown}; known: {sorted(known)} and base.")
    if base is None:
        return settings
    if "output_dir" not in settings:
        raise ValueError(f"The recipe {path} has a base, {base}, and needs an `output_dir` of its own.")
    return {**load_recipe(path.parent / str(base), (*above, path.resolve())), **settings}
