"""Opening the data of a run: which kind of source a name stands for is decided from what is there.

| name | what it is | read by index | streamed |
|---|---|---|---|
| `scenes` | the built-in scenes | yes | no need |
| `emoji_scenes` | scenes of the drawings of the emoji data set | yes | no need |
| folder of pictures with a metadata.jsonl | or metadata.csv, .parquet, which have the captions | yes | yes |
| folder of pictures | a .txt (or .json) beside each | yes | no |
| parquet file, pattern, or folder of them | images as bytes | yes | yes |
| tar, pattern, or folder of them | WebDataset, on this machine | yes | yes |
| tar, pattern behind http(s)://, hf:// and the like | WebDataset, elsewhere | no | yes |
| folder that `save_to_disk` wrote | | yes | no |
| any other name or folder | what `datasets.load_dataset` opens | yes | yes |

Patterns have `*`, `?`, `{a,b}` and `{000..123}`; http cannot list files and takes braces only. What a folder is, is
decided in `folders.folder_kind`; `~` and `$HOME` are replaced.
"""

import contextlib
import errno
import glob
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import fsspec
import huggingface_hub
import pyarrow as pa

from ..files import expand_path, is_remote, printable, read_yaml
from .captioned import CaptionedImages, ListedImages, OneCaption, Slice, StoredImages
from .captions import require_column
from .emoji_scenes import EmojiScenesDataset
from .folders import Contents, FolderImages, folder_kind, list_folder, split_folder
from .images import NOWHERE, Scope, UnreadableSample, image_value, to_rgb
from .iterable import HubShards, ListedShards, Shards
from .scenes import CAPTIONS, ScenesDataset, one_of
from .tars import TarImages, TarShards

__all__ = [
    "CaptionedImages",
    "FolderImages",
    "ListedImages",
    "Slice",
    "UnreadableSample",
    "load_source",
    "load_stream",
    "to_rgb",
]

# sources that are drawn on the fly
DRAWN: dict[str, Any] = {"scenes": ScenesDataset, "emoji_scenes": EmojiScenesDataset}
# one of these is in a folder that `save_to_disk` wrote
SAVED = ("state.json", "dataset_dict.json")


class HubImages(StoredImages):
    """Captioned images of a `datasets` data set: from the Hub, or from tables on disk.

    Args:
        dataset: the data set.
        image_column, caption_columns: its columns. Images are decoded here, one by one, so that a corrupt file is an
            `UnreadableSample` and not the end of the run. Of several captions (a list) the first is taken.
        label: its name, for messages.
        scope: the files that its cells may name; by default none, they must hold bytes.

    Raises:
        ValueError: if a column is missing, with the columns that are there.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str,
        caption_columns: Sequence[str],
        label: str,
        scope: Scope = NOWHERE,
    ):
        for option, column in (("image_column", image_column), *(("caption_column", c) for c in caption_columns)):
            require_column(option, column, dataset.column_names)
        self.images = dataset.select_columns([image_column])
        if isinstance(dataset.features[image_column], datasets.Image):  # plain bytes would be copied by a cast
            self.images = self.images.cast_column(image_column, datasets.Image(decode=False))
        self.texts = dataset.select_columns(list(dict.fromkeys(caption_columns)))
        self.image_column = image_column
        self.label = label
        self.scope = scope

    def __len__(self) -> int:
        return len(self.images)

    def stored_image(self, index: int) -> bytes | str | None:
        return self.scope.locate(image_value(self.images[index][self.image_column]))

    def stored_captions(self, index: int) -> dict[str, Any]:
        return self.texts[index]

    def place(self, index: int) -> str:
        image = image_value(self.images[index][self.image_column])
        return image if isinstance(image, str) else self.label


class SceneImages:
    """Scenes that are drawn on the fly, with their long and short captions as columns.

    Raises:
        ValueError: for a column that is neither.
    """

    def __init__(self, scenes: ScenesDataset | EmojiScenesDataset, caption_columns: Sequence[str]):
        self.scenes: Any = scenes
        self.columns = [one_of("caption_column", column, CAPTIONS) for column in caption_columns]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.scenes[index]
        captions = {column: self.scenes.describe(sample["scene"], column, index) for column in self.columns}
        return {**sample, "captions": captions, "caption": captions[self.columns[0]]}

    def captions(self, index: int) -> dict[str, str]:
        scene = self.scenes.scene(index)  # not drawn for this
        return {column: self.scenes.describe(scene, column, index) for column in self.columns}

    def size(self, index: int) -> tuple[int, int]:
        return self.scenes.resolution, self.scenes.resolution

    def image_hash(self, index: int) -> bytes:
        return hashlib.blake2b(self.scenes[index]["image"].tobytes(), digest_size=16).digest()

    def place(self, index: int) -> str:
        return f"scene {index}"


def expand(pattern: str) -> list[str]:
    """The files that a pattern stands for, in order: braces are written out, then `*` and `?` looked up.

    Raises:
        ValueError: if a file is not there, or a pattern matches none.
    """
    files: list[str] = []
    pattern = expand_path(pattern)
    exact = not is_remote(pattern) and os.path.exists(pattern)
    for path in [pattern] if exact else _expand_braces(pattern):
        if path.startswith(("http://", "https://")):
            found = [path]
            files += found
        elif is_remote(path):
            system, inside = fsspec.core.url_to_fs(path)
            found = [inside] if system.exists(inside) else sorted(system.glob(inside))
            files += [system.unstrip_protocol(name) for name in found]
        else:
            found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
            files += found
        if not found:
            raise ValueError(f"There is no file {path}.")
    return files


def _expand_braces(pattern: str) -> list[str]:
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if brace is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", brace[1])
    choices = brace[1].split(",")
    if span:
        choices = [f"{number:0{len(span[1])}d}" for number in range(int(span[1]), int(span[2]) + 1)]
    heads = [pattern[: brace.start()] + choice for choice in choices]
    tails = _expand_braces(pattern[brace.end() :])
    return [head + tail for head, tail in itertools.product(heads, tails)]


def _check_no_splits(name: str, split: str) -> None:
    if split != "train":
        raise ValueError(f"`dataset_split` is {split!r}, but {name} has no splits: leave it out.")


@contextlib.contextmanager
def _explain_errors(name: str) -> Iterator[None]:
    """Say what is wrong where `datasets` says only that something is: a full disk, or files that it cannot read."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while True:
            full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            if full or "Not enough disk space" in str(cause):
                raise OSError(
                    errno.ENOSPC,
                    f"No space left for the data set's cache in {datasets.config.HF_DATASETS_CACHE}, nothing of it "
                    "was kept: free some, set HF_DATASETS_CACHE to another disk, or stream the data.",
                ) from error
            if (deeper := cause.__cause__ or cause.__context__) is None:
                break
            cause = deeper
        if isinstance(error, (datasets.exceptions.DatasetGenerationError, pa.ArrowInvalid)):
            raise ValueError(f"The data of {name} cannot be read: {cause!r}") from error
        raise


def load_source(
    name: str,
    *,
    config_name: str | None = None,
    split: str = "train",
    image_column: str = "image",
    caption_columns: Sequence[str] = ("text",),
    cache_dir: str | None = None,
    scenes: dict[str, Any] | None = None,
    instance_prompt: str | None = None,
) -> ListedImages:
    """Open a source for reading by index.

    Args:
        name: see the table above.
        config_name, split: of a data set that has several.
        image_column: for tars an ending of members, or `image` for any kind of picture.
        caption_columns: one or more; for tars and folders see `captions.find_caption`, for scenes `long` and `short`.
        cache_dir: where the indices of tars are kept; none: they are made at every start.
        scenes: arguments of `ScenesDataset` or `EmojiScenesDataset`.
        instance_prompt: the caption of every image, in place of `caption_columns`; not for scenes.

    Raises:
        ValueError: for a name that is nothing, files that cannot be read, tars that are elsewhere, or a missing split
            or column.
        OSError: if the disk is full when the cache of `datasets` is written.
    """
    if name in DRAWN:
        assert instance_prompt is None, "scenes have captions of their own"
        return SceneImages(DRAWN[name](**(scenes or {})), caption_columns)
    columns = caption_columns if instance_prompt is None else ()
    images = _load_stored(name, config_name, split, image_column, columns, cache_dir)
    return images if instance_prompt is None else OneCaption(images, instance_prompt)


@dataclass(frozen=True)
class _Place:
    """Location and kind of the data that a name stands for.

    Args:
        kind: way of reading them; `hub` is any data set that `datasets` opens by its name.
        name: the name, with `~` replaced.
        files: the tars or parquet files.
        contents: the files of a folder.
    """

    kind: Literal["tars", "parquet", "pictures", "saved", "tables", "hub"]
    name: str
    files: Sequence[str] = ()
    contents: Contents | None = None


def _find(name: str, caption_columns: Sequence[str]) -> _Place:
    name = expand_path(name)
    folder = Path(name)
    if folder.is_dir():
        if any((folder / file).is_file() for file in SAVED):
            return _Place("saved", name)
        contents = list_folder(folder)
        kind = folder_kind(folder, contents, caption_columns)
        if kind == "tables":
            _check_no_address(name, ("::", "*", "?", "["))
            _check_tables(folder, contents)
        return _Place(kind, name, contents.tars if kind == "tars" else (), contents)
    for kind, ending in (("tars", ".tar"), ("parquet", ".parquet")):
        if name.endswith(ending):
            files = [name] if is_remote(name) and kind == "tars" else expand(name)
            if kind == "parquet" and not is_remote(name):
                for file in files:
                    _check_no_address(file)
                    if not os.path.isfile(file):
                        raise ValueError(f"{file} is not a regular file.")
            return _Place(kind, name, files)
    if folder.is_file():
        raise ValueError(f"{name} is a file: give a folder, tars (.tar), parquet files, or the name of a data set.")
    if name.startswith(("/", "./", "../", "~")):
        raise ValueError(f"There is no folder {name}.")
    return _Place("hub", name)


def _check_no_address(path: str, signs: Sequence[str] = ("::",)) -> None:
    """Refuse paths of tables that `datasets` takes for a chain of addresses, or for a pattern."""
    found = [sign for sign in signs if sign in path]
    if found:
        raise ValueError(f"{path} has {found[0]!r} in its name, which `datasets` does not take for a path: rename it.")


def _check_tables(folder: Path, contents: Contents) -> None:
    """Refuse what `datasets` would open outside of a folder of tables: its card may name any file or host."""
    if contents.irregular:
        raise ValueError(f"{printable(contents.irregular[0])} is not a regular file: remove it.")
    configs: list[Any] = []
    for name in (datasets.config.REPOCARD_FILENAME, datasets.config.REPOYAML_FILENAME):
        if (folder / name).is_file():
            text = (folder / name).read_text(encoding="utf-8", errors="replace")
            if name == datasets.config.REPOCARD_FILENAME:
                text = text.split("---")[1] if text.startswith("---") else ""
            values = read_yaml(folder / name, text)
            configs.append(values.get("configs") if isinstance(values, dict) else None)
    for value in _texts(configs):
        if is_remote(value) or os.path.isabs(value) or ".." in Path(value).parts or "::" in value:
            raise ValueError(f"The card of {folder} names {value!r}, which is not inside of it: remove it there.")


def _texts(values: Any) -> Iterator[str]:
    if isinstance(values, str):
        yield values
    elif isinstance(values, (list, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _texts(value)


def _load_stored(
    name: str,
    config_name: str | None,
    split: str,
    image_column: str,
    caption_columns: Sequence[str],
    cache_dir: str | None,
) -> StoredImages:
    if name.endswith(".tar") and is_remote(name):
        raise ValueError(f"{name} is not on this machine: stream it (`streaming`), or download it first.")
    place = _find(name, caption_columns)
    if place.kind == "tars":
        _check_no_splits(name, split)
        return TarImages(place.files, image_column, caption_columns, cache_dir)
    if place.kind == "pictures":
        return _folder_images(place, split, image_column, caption_columns)
    with _explain_errors(name):
        rows = _load_rows(place, config_name, split)
    return HubImages(rows, image_column, caption_columns, name, _scope(place))


def _folder_images(place: _Place, split: str, image_column: str, caption_columns: Sequence[str]) -> FolderImages:
    assert place.contents is not None
    folder = split_folder(Path(place.name), place.contents, split)
    contents = place.contents if folder == Path(place.name) else list_folder(folder)
    return FolderImages(folder, caption_columns, image_column, contents)


def _load_rows(place: _Place, config_name: str | None, split: str) -> datasets.Dataset:
    name = place.name
    if place.kind == "parquet":
        _check_no_splits(name, split)
        return datasets.load_dataset("parquet", data_files=_as_patterns(place.files), split="train")
    if place.kind == "saved" and (Path(name) / "state.json").is_file():
        _check_no_splits(name, split)
        return datasets.load_from_disk(name)
    if place.kind == "saved":
        splits = datasets.load_from_disk(name)
        if split not in splits:
            raise ValueError(f"`dataset_split` is {split!r}, but {name} has {sorted(splits)}.")
        return splits[split]
    return datasets.load_dataset(name, config_name, split=split)


def _as_patterns(files: Sequence[str]) -> list[str]:
    """Files as `datasets` takes them: as patterns."""
    return [file if is_remote(file) else glob.escape(file) for file in files]


def _scope(place: _Place) -> Scope:
    """The files that the cells of a data set may name: its own, and those that `datasets` has downloaded for it."""
    kept = tuple(str(path) for path in (datasets.config.HF_DATASETS_CACHE, datasets.config.EXTRACTED_DATASETS_PATH))
    if place.kind == "hub":
        repository = place.name if "/" in place.name else ""
        hub_cache = os.path.join(huggingface_hub.constants.HF_HUB_CACHE, "datasets--" + repository.replace("/", "--"))
        own = (f"hf://datasets/{repository}@", f"hf://datasets/{repository}/") if repository else ("hf://datasets/",)
        return Scope((*kept, hub_cache) if repository else kept, own)
    if place.kind == "parquet":
        folders = list(dict.fromkeys(file.rpartition("/")[0] for file in place.files))
        return Scope(
            tuple(folder or "." for folder in folders if not is_remote(folder)),
            tuple(f"{folder}/" for folder in folders if is_remote(folder)),
        )
    return Scope((place.name, *(kept if place.kind == "tables" else ())))


def load_stream(
    name: str,
    *,
    config_name: str | None = None,
    split: str = "train",
    image_column: str = "image",
    caption_columns: Sequence[str] = ("text",),
) -> Shards:
    """Open a source as shards, to be read from beginning to end. The arguments are those of `load_source`.

    Raises:
        ValueError: for a name that is nothing or that there is no need to stream, or a missing split or column.
    """
    place = None if name in DRAWN else _find(name, caption_columns)
    beside = place is not None and place.kind == "pictures" and not (place.contents and place.contents.metadata)
    if place is None or place.kind == "saved" or beside:
        raise ValueError(f"{name} is read by index: leave `streaming` out.")
    if place.kind == "pictures":
        return ListedShards(_folder_images(place, split, image_column, caption_columns), name)
    if place.kind == "tars":
        _check_no_splits(name, split)
        files = expand(place.name) if is_remote(place.name) else place.files
        return TarShards(files, image_column, caption_columns)
    with _explain_errors(name):
        if place.kind == "parquet":
            _check_no_splits(name, split)
            rows = datasets.load_dataset(
                "parquet", data_files=_as_patterns(place.files), split="train", streaming=True
            )
        else:
            rows = datasets.load_dataset(place.name, config_name, split=split, streaming=True)
    return HubShards(rows, image_column, caption_columns, name, _scope(place))
