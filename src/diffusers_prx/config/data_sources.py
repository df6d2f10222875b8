"""Data sources of a training stage, as its configuration describes them."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from .settings import TrainingSettings

# Names of data sources that are drawn during training.
DRAWN_SOURCES = ("scenes", "emoji_scenes")


@dataclass(frozen=True)
class DataSource:
    """One data source.

    Args:
        name: folder, file pattern or Hub id, as `data.sources.load_source` accepts it.
        weight: sampling proportion; None reads every sample once per epoch.
        config_name: configuration of a Hub data set.
        split: split of a data set.
        image_column: column of the images.
        caption_column: column of the captions.
        instance_prompt: caption that replaces those of the data.
    """

    name: str
    weight: float | None
    config_name: str | None
    split: str
    image_column: str
    caption_column: str
    instance_prompt: str | None = None

    @property
    def is_drawn(self) -> bool:
        """True if the samples are drawn during training."""
        return self.name in DRAWN_SOURCES


def data_sources_of(cfg: TrainingSettings) -> list[DataSource]:
    """Return the entries of `data_sources`, or the single source that the other settings describe."""
    entries = cfg.data_sources or [
        {"name": cfg.dataset_name or cfg.train_data_dir, "config_name": cfg.dataset_config_name}
    ]
    sources = []
    for entry in entries:
        is_drawn = entry["name"] in DRAWN_SOURCES
        defaults = {
            "weight": None,
            "config_name": None,
            "split": cfg.dataset_split,
            "image_column": cfg.image_column,
            "caption_column": cfg.scenes_caption if is_drawn else cfg.caption_column,
            "instance_prompt": None if is_drawn else cfg.instance_prompt,
        }
        sources.append(DataSource(**defaults | entry))
    return sources


def check_entry(entry: Any, has_caption_weights: bool) -> None:
    """Validate one entry of `data_sources`.

    Args:
        entry: entry as the recipe or flag gives it.
        has_caption_weights: True if `caption_weights` is set, which names the caption columns of all sources.

    Raises:
        ValueError: it is not a mapping with a name, or has unknown, ill-typed or conflicting keys.
    """
    known = [option.name for option in dataclasses.fields(DataSource)]
    if not isinstance(entry, dict) or "name" not in entry:
        raise ValueError(f"`data_sources` must be a list of mappings with a `name`, got {entry!r}.")
    if unknown := sorted(map(str, set(entry) - set(known))):
        raise ValueError(f"`data_sources` has unknown keys {unknown} in {entry['name']!r}; accepted: {known}.")
    for name, value in entry.items():
        if name == "weight":
            if not is_weight(value):
                raise ValueError(f"`data_sources`: `weight` must be positive and finite, got {value!r}.")
        elif not isinstance(value, str):
            raise ValueError(f"`data_sources`: `{name}` must be a string, got {value!r}.")
    stored_only = sorted(set(entry) & {"config_name", "split", "image_column", "instance_prompt"})
    if entry["name"] in DRAWN_SOURCES and stored_only:
        raise ValueError(f"`data_sources` has {stored_only} for {entry['name']}, which is not stored: remove them.")
    if has_caption_weights and "caption_column" in entry:
        raise ValueError(
            f"`data_sources` has the `caption_column` {entry['caption_column']!r}, but `caption_weights` names the "
            "columns of all sources: remove one of them."
        )


def is_weight(value: Any) -> bool:
    """True for a positive, finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
