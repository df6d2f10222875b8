"""Opening the data of a run: which kind of source a name stands for is decided from what is there.

| name | what it is | read by index | streamed |
|---|---|---|---|
| `scenes` | the built-in scenes | yes | no need |
| folder with a metadata.jsonl | images, captions in the jsonl | yes | yes |
| folder of images | a .txt (or .json) beside each | yes | no |
| parquet file, pattern, or folder of them | images as bytes | yes | yes |
| tar, pattern, or folder of them | WebDataset, on this machine | yes | yes |
| tar, pattern behind http(s)://, hf:// and the like | WebDataset, elsewhere | no | yes |
| folder that `save_to_disk` wrote | | yes | no |
| any other name or folder | what `datasets.load_dataset` opens | yes | yes |

Patterns have `*`, `?`, `{a,b}` and `{000..123}`; http cannot list files and takes braces only.
"""

import contextlib
import errno
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
from diffusers.utils import logging

from .captioned import CaptionedImages, ListedImages, OneCaption, Slice, StoredImages
from .captions import find_caption
from .images import UnreadableSample, image_endings, image_value, to_rgb
from .scenes import CAPTIONS, Scene, ScenesDataset, long_caption, one_of, sample_scene, short_caption
from .streaming import HubShards, Shards
from .tars import TarImages, TarShards, is_remote

__all__ = [
    "CaptionedImages",
    "ListedImages",
    "Slice",
    "UnreadableSample",
    "load_source",
    "load_stream",
    "to_rgb",
]

logger = logging.get_logger(__name__)


class HubImages(StoredImages):
    """Captioned images of a `datasets` data set: from the Hub, from disk, or a folder with a metadata.jsonl.

    Args:
        dataset: the data set.
        image_column, caption_columns: its columns. Images are decoded here, one by one, so that a corrupt file is an
            `UnreadableSample` and not the end of the run. Of several captions (a list) the first is taken.
        label: its name, for messages.

    Raises:
        ValueError: if a column is missing, with the columns that are there.
    """

    def __init__(self, dataset: datasets.Dataset, image_column: str, caption_columns: Sequence[str], label: str):
        for option, column in (("image_column", image_column), *(("caption_column", c) for c in caption_columns)):
            if column not in dataset.column_names:
                raise ValueError(f"`{option}` is {column!r}, but the data set has {dataset.column_names}.")
        self.images = dataset.select_columns([image_column])
        if isinstance(dataset.features[image_column], datasets.Image):  # plain bytes would be copied by a cast
            self.images = self.images.cast_column(image_column, datasets.Image(decode=False))
        self.texts = dataset.select_columns(list(dict.fromkeys(caption_columns)))
        self.image_column = image_column
        self.label = label

    def __len__(self) -> int:
        return len(self.images)

    def stored_image(self, index: int) -> bytes | str | None:
        return image_value(self.images[index][self.image_column])

    def stored_captions(self, index: int) -> dict[str, Any]:
        return self.texts[index]

    def place(self, index: int) -> str:
        image = self.stored_image(index)
        return image if isinstance(image, str) else self.label


class FolderImages(StoredImages):
    """The images of a folder and its subfolders, with captions in files beside them: a.jpg and a.txt.

    Args:
        folder: the folder.
        caption_columns: endings of files (`txt`, `long.txt`; `text` is also .txt) or keys of a .json beside the image;
            none: captions are not asked for.

    Raises:
        ValueError: if it has no image, or none with such a caption.
    """

    def __init__(self, folder: Path, caption_columns: Sequence[str]):
        kinds = image_endings()
        files = {str(file) for file in folder.rglob("*") if not file.name.startswith(".")}
        self.paths = sorted(file for file in files if file.rpartition(".")[2].lower() in kinds)
        self.caption_columns = tuple(caption_columns)
        if not self.caption_columns:
            if not self.paths:
                raise ValueError(f"The folder {folder} has no images.")
            return
        endings = {*self.caption_columns, "json"} | ({"txt"} if "text" in caption_columns else set())
        captioned = sum(any(f"{_stem(path)}.{ending}" in files for ending in endings) for path in self.paths)
        if not captioned:
            raise ValueError(
                f"The folder {folder} has {len(self.paths)} images and neither a metadata.jsonl nor captions beside "
                f"them: files like a.txt for a.jpg, for the columns {list(caption_columns)}."
            )
        if captioned < len(self.paths):
            logger.warning(f"{len(self.paths) - captioned} of {len(self.paths)} images in {folder} have no caption.")

    def __len__(self) -> int:
        return len(self.paths)

    def stored_image(self, index: int) -> str:
        return self.paths[index]

    def stored_captions(self, index: int) -> dict[str, Any]:
        beside = {
            ending: Path(f"{_stem(self.paths[index])}.{ending}") for ending in (*self.caption_columns, "txt", "json")
        }
        there = [ending for ending, file in beside.items() if file.is_file()]
        return {
            column: find_caption(column, there, lambda ending: beside[ending].read_bytes())
            for column in self.caption_columns
        }

    def place(self, index: int) -> str:
        return self.paths[index]


def _stem(path: str) -> str:
    return path.rpartition(".")[0]


class SceneImages:
    """The built-in scenes with their long and short captions as columns.

    Raises:
        ValueError: for a column that is neither.
    """

    def __init__(self, scenes: ScenesDataset, caption_columns: Sequence[str]):
        self.scenes = scenes
        self.columns = [one_of("caption_column", column, CAPTIONS) for column in caption_columns]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.scenes[index]
        captions = self._captions(sample["scene"], index)
        return {**sample, "captions": captions, "caption": captions[self.columns[0]]}

    def _captions(self, scene: Scene, index: int) -> dict[str, str]:
        describe = {"long": long_caption, "short": short_caption}
        return {column: describe[column](scene, seed=self.scenes.seed, index=index) for column in self.columns}

    def captions(self, index: int) -> dict[str, str]:
        scenes = self.scenes  # not drawn for this
        return self._captions(sample_scene(index, seed=scenes.seed, level=scenes.level, split=scenes.split), index)

    def size(self, index: int) -> tuple[int, int]:
        return self.scenes.resolution, self.scenes.resolution

    def image_hash(self, index: int) -> bytes:
        return hashlib.blake2b(self.scenes[index]["image"].tobytes(), digest_size=16).digest()


def expand(pattern: str) -> list[str]:
    """The files that a pattern stands for, in order: braces are written out, then `*` and `?` looked up.

    Raises:
        ValueError: if a file is not there, or a pattern matches none.
    """
    files: list[str] = []
    for path in _expand_braces(pattern):
        if path.startswith(("http://", "https://")):
            files.append(path)
            continue
        system, inside = fsspec.core.url_to_fs(path)
        found = [inside] if system.exists(inside) else sorted(system.glob(inside))
        if not found:
            raise ValueError(f"There is no file {path}.")
        files += [system.unstrip_protocol(name) if is_remote(path) else name for name in found]
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


def _files(name: str, ending: str) -> list[str]:
    """The files with an ending that a name stands for: itself, a pattern, or a folder of tars; none if it is of
    another kind. A folder of parquet files is left to `datasets`, which finds splits in it."""
    if name.endswith(ending):
        return expand(name)
    folder = Path(name)
    return [str(file) for file in sorted(folder.glob(f"*{ending}"))] if ending == ".tar" and folder.is_dir() else []


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
        scenes: arguments of `ScenesDataset`.
        instance_prompt: the caption of every image, in place of `caption_columns`; not for scenes.

    Raises:
        ValueError: for a name that is nothing, files that cannot be read, tars that are elsewhere, or a missing split
            or column.
        OSError: if the disk is full when the cache of `datasets` is written.
    """
    if name == "scenes":
        assert instance_prompt is None, "scenes have captions of their own"
        return SceneImages(ScenesDataset(**(scenes or {})), caption_columns)
    columns = caption_columns if instance_prompt is None else ()
    images = _load_stored(name, config_name, split, image_column, columns, cache_dir)
    return images if instance_prompt is None else OneCaption(images, instance_prompt)


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
    if tars := _files(name, ".tar"):
        _check_no_splits(name, split)
        return TarImages(tars, image_column, caption_columns, cache_dir)
    folder = Path(name)
    if folder.is_dir() and _is_plain_folder(folder):
        _check_no_splits(name, split)
        return FolderImages(folder, caption_columns)
    with _explain_errors(name):
        rows = _load_rows(name, folder, config_name, split)
    return HubImages(rows, image_column, caption_columns, name)


def _is_plain_folder(folder: Path) -> bool:
    """Whether a folder has images and nothing that `datasets` opens otherwise."""
    names = {file.name for file in folder.rglob("*")}
    endings = {name.rpartition(".")[2].lower() for name in names}
    tables = {"parquet", "arrow", "csv", "jsonl", "tar", "zip"}
    return not endings & tables and bool(endings & image_endings())


def _load_rows(name: str, folder: Path, config_name: str | None, split: str) -> datasets.Dataset:
    if files := _files(name, ".parquet"):
        _check_no_splits(name, split)
        return datasets.load_dataset("parquet", data_files=files, split="train")
    if (folder / "state.json").is_file():
        _check_no_splits(name, split)
        return datasets.load_from_disk(name)
    if (folder / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(name)
        if split not in splits:
            raise ValueError(f"`dataset_split` is {split!r}, but {name} has {sorted(splits)}.")
        return splits[split]
    if folder.is_dir() and any(folder.rglob("metadata.jsonl")):
        listed = sum(len(part) for part in datasets.load_dataset("imagefolder", data_dir=name).values())
        found = sum(path.suffix[1:].lower() in image_endings() for path in folder.rglob("*"))
        if found > listed:
            logger.warning(f"{found - listed} images in {folder} are in no metadata.jsonl and are not used.")
        return datasets.load_dataset("imagefolder", data_dir=name, split=split)
    return datasets.load_dataset(name, config_name, split=split)


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
    folder = Path(name)
    saved = any((folder / file).is_file() for file in ("state.json", "dataset_dict.json"))
    if name == "scenes" or saved or (folder.is_dir() and _is_plain_folder(folder)):
        raise ValueError(f"{name} is read by index: leave `streaming` out.")
    if tars := _files(name, ".tar"):
        _check_no_splits(name, split)
        return TarShards(tars, image_column, caption_columns)
    if files := _files(name, ".parquet"):
        _check_no_splits(name, split)
        rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    elif folder.is_dir() and any(folder.rglob("metadata.jsonl")):
        rows = datasets.load_dataset("imagefolder", data_dir=name, split=split, streaming=True)
    else:
        rows = datasets.load_dataset(name, config_name, split=split, streaming=True)
    return HubShards(rows, image_column, caption_columns, name)
