"""Configuration of a training run: its settings, validated. `training.recipes` reads it from YAML and flags."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..files import expand_path
from .checks import check_combinations
from .fields import PATH, PER_STAGE, config_fields, field_names
from .settings import TrainingSettings


@dataclass(frozen=True)
class TrainingConfig(TrainingSettings):
    """All settings of a training run.

    The defaults are those of the PRX study's 256-pixel baseline, except `ema_warmup`: without it, the average of a
    short run consists mostly of the initial weights.

    Raises:
        ValueError: a value is out of range, or settings exclude each other. The message names the setting, its value
            and what is accepted.

    Example:
        >>> cfg = TrainingConfig(
        ...     pretrained_model_name_or_path="Photoroom/prx-512-t2i-sft", train_data_dir="photos", max_train_steps=500
        ... )
    """

    def __post_init__(self) -> None:
        self._expand_paths()
        for name, option in config_fields(TrainingConfig).items():
            option.check_range(name, getattr(self, name))
        if not all(isinstance(prompt, str) for prompt in self.validation_prompts):
            raise ValueError(f"`validation_prompts` must be a list of strings, got {self.validation_prompts}.")
        check_combinations(self)
        self.stage_configs()

    def _expand_paths(self) -> None:
        for name in field_names(TrainingConfig, PATH):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, expand_path(value))
        entries = [
            entry | {"name": expand_path(entry["name"])}
            if isinstance(entry, dict) and isinstance(entry.get("name"), str)
            else entry
            for entry in self.data_sources
        ]
        object.__setattr__(self, "data_sources", entries)

    def stage_configs(self) -> "list[TrainingConfig]":
        """Return one configuration per stage; for a run without stages, this configuration.

        Raises:
            ValueError: a stage changes a setting that belongs to the whole run, or is invalid by itself.
        """
        fields, allowed = config_fields(TrainingConfig), field_names(TrainingConfig, PER_STAGE)
        configs: list[TrainingConfig] = []
        for index, stage in enumerate(self.stages):
            if not isinstance(stage, dict):
                raise ValueError(f"`stages` must be a list of mappings of settings, got {stage!r}.")
            if refused := sorted(set(stage) - set(allowed)):
                raise ValueError(f"Stage {index} changes {refused}; a stage may change {sorted(allowed)}.")
            first_step = sum(earlier.max_train_steps for earlier in configs)
            try:
                changes = {name: fields[name].parse(name, value) for name, value in stage.items()}
                configs.append(dataclasses.replace(self, stages=[], **changes))
            except ValueError as error:
                raise ValueError(f"Stage {index}: {error}") from error
            until = configs[-1].repa_until_step
            if until is not None and until <= first_step:
                raise ValueError(
                    f"Stage {index}: `repa_until_step` is {until}, but the stage starts at step {first_step} of the "
                    "run: pass a later step, or set `repa_weight` to 0."
                )
        return configs or [self]

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as plain data, for the record of the run."""
        return dataclasses.asdict(self)


def complete_settings(recorded: Mapping[str, Any], is_pixel_space: bool) -> dict[str, Any]:
    """Return the settings in the record of a run, with the behavior of older versions for settings that it lacks.

    Args:
        recorded: `config` of training.json.
        is_pixel_space: True if the run had no autoencoder.
    """
    return {"caption_cleaning": "light" if is_pixel_space else "full_v1", "ema_warmup": True} | dict(recorded)
