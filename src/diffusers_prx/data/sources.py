"""Open the data of a run. The kind of source is derived from its name and the files that it refers to.

| name | source | random access | streaming |
|---|---|---|---|
| `scenes` | built-in scenes | yes | not needed |
| `emoji_scenes` | scenes of drawings from the emoji data set | yes | not needed |
| folder of images with a metadata.jsonl, .csv or .parquet | captions from the metadata | yes | yes |
| folder of images | captions from a .txt or .json next to each image | yes | no |
| parquet file, pattern, or folder of them | images as bytes | yes | yes |
| local tar, pattern, or folder of them | WebDataset | yes | yes |
| remote tar or pattern: http(s)://, hf://, ... | WebDataset | no | yes |
| folder with the index.json of MDS shards | the original trainer's data | yes, if not compressed | yes |
| folder written by `save_to_disk` | `datasets` data set | yes | no |
| any other name or folder | opened by `datasets.load_dataset` | yes | yes |

Patterns may contain `*`, `?`, `{a,b}` and `{000..123}`; http servers cannot list files, so their patterns may contain
braces only. `folders.folder_kind` decides the kind of a folder. `~` and `$HOME` are expanded.
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
from .captioned import CaptionedImages, ListedImages, SingleCaptionImages, Slice, StoredImages
from .captions import require_column
from .emoji_scenes import EmojiScenesDataset
from .folders import FolderContents, FolderImages, folder_kind, list_folder, split_folder
from .images import NO_FILES, AllowedFiles, UnreadableSample, image_value, to_rgb
from .iterable import HubShards, ListedShards, Shards
from .mds import MdsImages, MdsShards, is_mds, read_index
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

# sources whose images are drawn on the fly
DRAWN_SOURCES: dict[str, Any] = {"scenes": ScenesDataset, "emoji_scenes": EmojiScenesDataset}
# `save_to_disk` writes one of these files
SAVED_MARKERS = ("state.json", "dataset_dict.json")


class HubImages(StoredImages):
    """Captioned images of a `datasets` data set, from the Hub or from local tables.

    Images are decoded here one by one, not by `datasets`: a corrupt file is then an `UnreadableSample` and does not
    end the run.

    Args:
        dataset: map-style data set.
        image_column: column of the images.
        caption_columns: columns of the captions. If a cell holds a list of captions, the first is used.
        label: name of the data set, for messages.
        allowed_files: files that cells may name. Default: none; cells must hold bytes.

    Raises:
        ValueError: if a column is missing.

    Example:
        >>> images = HubImages(datasets.load_dataset("me/photos", split="train"), "image", ["text"], "photos")
        >>> images[0]["caption"]
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str,
        caption_columns: Sequence[str],
        label: str,
        allowed_files: AllowedFiles = NO_FILES,
    ):
        for option, column in (("image_column", image_column), *(("caption_column", c) for c in caption_columns)):
            require_column(option, column, dataset.column_names)
        self.images = dataset.select_columns([image_column])
        if isinstance(dataset.features[image_column], datasets.Image):  # a cast would copy a column of plain bytes
            self.images = self.images.cast_column(image_column, datasets.Image(decode=False))
        self.texts = dataset.select_columns(list(dict.fromkeys(caption_columns)))
        self.image_column = image_column
        self.label = label
        self.allowed_files = allowed_files

    def __len__(self) -> int:
        return len(self.images)

    def stored_image(self, index: int) -> bytes | str | None:
        return self.allowed_files.resolve(image_value(self.images[index][self.image_column]))

    def stored_captions(self, index: int) -> dict[str, Any]:
        return self.texts[index]

    def location(self, index: int) -> str:
        image = image_value(self.images[index][self.image_column])
        return image if isinstance(image, str) else self.label


class SceneImages:
    """Scenes drawn on the fly, with their long and short captions as columns.

    Args:
        scenes: scenes to draw.
        caption_columns: `long`, `short` or both.

    Raises:
        ValueError: for another column.
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
        scene = self.scenes.scene(index)
        return {column: self.scenes.describe(scene, column, index) for column in self.columns}

    def size(self, index: int) -> tuple[int, int]:
        return self.scenes.resolution, self.scenes.resolution

    def image_hash(self, index: int) -> bytes:
        return hashlib.blake2b(self.scenes[index]["image"].tobytes(), digest_size=16).digest()

    def location(self, index: int) -> str:
        return f"scene {index}"


def expand_pattern(pattern: str) -> list[str]:
    """Return the files that match a pattern, in order. Braces are expanded first, then `*` and `?`.

    Raises:
        ValueError: if a file does not exist, or no file matches.

    Example:
        >>> expand_pattern("https://example.com/{00..01}.tar")
        ['https://example.com/00.tar', 'https://example.com/01.tar']
    """
    files: list[str] = []
    pattern = expand_path(pattern)
    is_plain_path = not is_remote(pattern) and os.path.exists(pattern)
    for path in [pattern] if is_plain_path else _expand_braces(pattern):
        if path.startswith(("http://", "https://")):
            found = [path]
        elif is_remote(path):
            system, remote_path = fsspec.core.url_to_fs(path)
            names = [remote_path] if system.exists(remote_path) else sorted(system.glob(remote_path))
            found = [system.unstrip_protocol(name) for name in names]
        else:
            found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not found:
            raise ValueError(f"The file {path} does not exist.")
        files += found
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
        raise ValueError(f"`dataset_split` is {split!r}, but {name} has no splits. Omit `--dataset_split`.")


@contextlib.contextmanager
def _explain_errors(name: str) -> Iterator[None]:
    """Replace vague errors of `datasets` by their cause: a full disk, or unreadable files."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while True:
            is_full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            if is_full or "Not enough disk space" in str(cause):
                raise OSError(
                    errno.ENOSPC,
                    f"No space left for the data set's cache in {datasets.config.HF_DATASETS_CACHE}; nothing of it "
                    "was kept. Free some space, set HF_DATASETS_CACHE to another disk, or pass `--streaming`.",
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
    """Open a source with random access.

    Args:
        name: see the table at the top of this module.
        config_name: configuration of a data set that has several.
        split: split of a data set that has several.
        image_column: column of the images. For tars: ending of the image members; `image` means any image format.
        caption_columns: at least one column. For tars and folders see `captions.find_caption`; scenes have `long` and
            `short`.
        cache_dir: folder that keeps the indices of tars. Default: they are computed at every start.
        scenes: arguments of `ScenesDataset` or `EmojiScenesDataset`.
        instance_prompt: caption of every image, instead of `caption_columns`; not for scenes.

    Raises:
        ValueError: for an unknown name, unreadable files, remote tars, or a missing split or column.
        OSError: if the disk is full while `datasets` writes its cache.

    Example:
        >>> photos = load_source("~/photos")
        >>> photos[0]["image"], photos[0]["caption"]
    """
    if name in DRAWN_SOURCES:
        assert instance_prompt is None, "scenes have captions of their own"
        if name == "emoji_scenes" and "emoji_dir" not in (scenes or {}):
            raise ValueError(
                "`name` is 'emoji_scenes', which only training composes, of `emoji_dir`. Pass a folder of drawings, "
                "such as data/emoji/64."
            )
        return SceneImages(DRAWN_SOURCES[name](**(scenes or {})), caption_columns)
    columns = caption_columns if instance_prompt is None else ()
    images = _load_stored(name, config_name, split, image_column, columns, cache_dir)
    return images if instance_prompt is None else SingleCaptionImages(images, instance_prompt)


@dataclass(frozen=True)
class _DataFiles:
    """Data files that a name refers to.

    Args:
        kind: way to read them; `hub` is any data set that `datasets` opens by its name.
        name: name with `~` expanded.
        paths: the tars or parquet files.
        contents: files of a folder.
    """

    kind: Literal["tars", "parquet", "images", "mds", "saved", "tables", "hub"]
    name: str
    paths: Sequence[str] = ()
    contents: FolderContents | None = None


def _find_files(name: str, caption_columns: Sequence[str]) -> _DataFiles:
    name = expand_path(name)
    folder = Path(name)
    if folder.is_dir():
        if any((folder / file).is_file() for file in SAVED_MARKERS):
            return _DataFiles("saved", name)
        if is_mds(folder):
            return _DataFiles("mds", name)
        contents = list_folder(folder)
        kind = folder_kind(folder, contents, caption_columns)
        if kind == "tables":
            _check_plain_path(name, ("::", "*", "?", "["))
            _check_tables(folder, contents)
        return _DataFiles(kind, name, contents.tars if kind == "tars" else (), contents)
    if name.endswith(".tar"):
        return _DataFiles("tars", name, [name] if is_remote(name) else expand_pattern(name))
    if name.endswith(".parquet"):
        files = expand_pattern(name)
        for file in () if is_remote(name) else files:
            _check_plain_path(file)
            if not os.path.isfile(file):
                raise ValueError(f"{file} is not a regular file.")
        return _DataFiles("parquet", name, files)
    if folder.is_file():
        raise ValueError(f"{name} is a file. Give a folder, tars (.tar), parquet files, or the name of a data set.")
    if name.startswith(("/", "./", "../", "~")):
        raise ValueError(f"The folder {name} does not exist.")
    return _DataFiles("hub", name)


def _check_plain_path(path: str, special: Sequence[str] = ("::",)) -> None:
    """Refuse paths of tables that `datasets` would interpret as a chain of addresses or a pattern."""
    found = [characters for characters in special if characters in path]
    if found:
        raise ValueError(f"{path} has {found[0]!r} in its name, which `datasets` does not accept in paths: rename it.")


def _check_tables(folder: Path, contents: FolderContents) -> None:
    """Refuse a folder of tables whose card makes `datasets` open files outside the folder."""
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
    for value in _nested_texts(configs):
        if is_remote(value) or os.path.isabs(value) or ".." in Path(value).parts or "::" in value:
            raise ValueError(f"The card of {folder} names {value!r}, which is not inside the folder: remove it there.")


def _nested_texts(values: Any) -> Iterator[str]:
    if isinstance(values, str):
        yield values
    elif isinstance(values, (list, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _nested_texts(value)


def _load_stored(
    name: str,
    config_name: str | None,
    split: str,
    image_column: str,
    caption_columns: Sequence[str],
    cache_dir: str | None,
) -> StoredImages:
    if name.endswith(".tar") and is_remote(name):
        raise ValueError(f"{name} is not on this machine: pass `--streaming`, or download it first.")
    files = _find_files(name, caption_columns)
    if files.kind == "tars":
        _check_no_splits(name, split)
        return TarImages(files.paths, image_column, caption_columns, cache_dir)
    if files.kind == "mds":
        _check_no_splits(name, split)
        return MdsImages(read_index(files.name), image_column, caption_columns)
    if files.kind == "images":
        return _folder_images(files, split, image_column, caption_columns)
    with _explain_errors(name):
        rows = _load_rows(files, config_name, split)
    return HubImages(rows, image_column, caption_columns, name, _allowed_files(files))


def _folder_images(files: _DataFiles, split: str, image_column: str, caption_columns: Sequence[str]) -> FolderImages:
    assert files.contents is not None
    folder = split_folder(Path(files.name), files.contents, split)
    contents = files.contents if folder == Path(files.name) else list_folder(folder)
    return FolderImages(folder, caption_columns, image_column, contents)


def _load_rows(files: _DataFiles, config_name: str | None, split: str) -> datasets.Dataset:
    name = files.name
    if files.kind == "parquet":
        _check_no_splits(name, split)
        return datasets.load_dataset("parquet", data_files=_escape_patterns(files.paths), split="train")
    if files.kind == "saved" and (Path(name) / "state.json").is_file():
        _check_no_splits(name, split)
        return datasets.load_from_disk(name)
    if files.kind == "saved":
        splits = datasets.load_from_disk(name)
        if split not in splits:
            raise ValueError(f"`dataset_split` is {split!r}, but {name} has {sorted(splits)}.")
        return splits[split]
    cache_dir = _cache_folder(name, config_name) if files.kind == "tables" else None
    return datasets.load_dataset(name, config_name, split=split, cache_dir=cache_dir)


def _cache_folder(folder: str, config_name: str | None) -> str:
    """Return a cache folder for the present files of a local data set.

    `datasets` names its cache after the folder's last name and the README alone: without a cache of its own, another
    folder `64`, or the same one with new files, would silently give the rows of the old one.
    """
    data_files = datasets.load_dataset_builder(folder, config_name).config.data_files or {}
    files = sorted(str(file) for split in data_files.values() for file in split)
    states = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files if not is_remote(file)]
    key = hashlib.blake2b(repr(states).encode(), digest_size=8).hexdigest()
    return os.path.join(datasets.config.HF_DATASETS_CACHE, f"local-{key}")


def _escape_patterns(files: Sequence[str]) -> list[str]:
    """Escape local paths, because `datasets` reads them as patterns."""
    return [file if is_remote(file) else glob.escape(file) for file in files]


def _allowed_files(files: _DataFiles) -> AllowedFiles:
    """Files that the cells of a data set may name: its own, and files that `datasets` has downloaded for it."""
    caches = tuple(str(path) for path in (datasets.config.HF_DATASETS_CACHE, datasets.config.EXTRACTED_DATASETS_PATH))
    if files.kind == "hub":
        repository = files.name if "/" in files.name else ""
        if not repository:
            return AllowedFiles(caches, ("hf://datasets/",))
        hub_cache = os.path.join(huggingface_hub.constants.HF_HUB_CACHE, "datasets--" + repository.replace("/", "--"))
        addresses = (f"hf://datasets/{repository}@", f"hf://datasets/{repository}/")
        return AllowedFiles((*caches, hub_cache), addresses)
    if files.kind == "parquet":
        folders = list(dict.fromkeys(file.rpartition("/")[0] for file in files.paths))
        return AllowedFiles(
            tuple(folder or "." for folder in folders if not is_remote(folder)),
            tuple(f"{folder}/" for folder in folders if is_remote(folder)),
        )
    return AllowedFiles((files.name, *(caches if files.kind == "tables" else ())))


def load_stream(
    name: str,
    *,
    config_name: str | None = None,
    split: str = "train",
    image_column: str = "image",
    caption_columns: Sequence[str] = ("text",),
) -> Shards:
    """Open a source as shards that are read from beginning to end. The arguments are those of `load_source`.

    Raises:
        ValueError: for an unknown name, a source that cannot be streamed, or a missing split or column.

    Example:
        >>> shards = load_stream("hf://datasets/me/photos/*.tar")
        >>> image, captions = next(shards.rows(0, 0))
    """
    files = None if name in DRAWN_SOURCES else _find_files(name, caption_columns)
    is_paired = files is not None and files.kind == "images" and not (files.contents and files.contents.metadata)
    if files is None or files.kind == "saved" or is_paired:
        raise ValueError(f"`streaming` does not support {name}, which has random access: leave it out.")
    if files.kind == "images":
        return ListedShards(_folder_images(files, split, image_column, caption_columns), name)
    if files.kind == "tars":
        _check_no_splits(name, split)
        paths = expand_pattern(files.name) if is_remote(files.name) else files.paths
        return TarShards(paths, image_column, caption_columns)
    if files.kind == "mds":
        _check_no_splits(name, split)
        return MdsShards(read_index(files.name), image_column, caption_columns)
    with _explain_errors(name):
        if files.kind == "parquet":
            _check_no_splits(name, split)
            patterns = _escape_patterns(files.paths)
            rows = datasets.load_dataset("parquet", data_files=patterns, split="train", streaming=True)
        else:
            rows = datasets.load_dataset(files.name, config_name, split=split, streaming=True)
    return HubShards(rows, image_column, caption_columns, name, _allowed_files(files))
