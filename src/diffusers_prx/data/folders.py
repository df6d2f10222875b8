"""Folders of pictures: which files are data, and which caption belongs to which picture.

A folder is read with its subfolders. Files and folders that file managers and notebooks keep for themselves are not
data (names that begin with a dot, and `SYSTEM_FOLDERS`); linked folders are read once. `datasets` is not asked: it
takes parts of file names such as `test` for splits.
"""

import csv
import io
import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from diffusers.utils import logging

from ..files import NAMES_SHOWN, open_regular, printable, shown
from .captioned import StoredImages
from .captions import find_caption, require_column
from .images import UnreadableSample, image_endings, unreadable_endings

logger = logging.get_logger(__name__)

SYSTEM_FOLDERS = {"@eaDir", "@Recycle", "#recycle", "#snapshot", "__MACOSX", "$RECYCLE.BIN", "lost+found"}
METADATA = {"metadata.jsonl", "metadata.csv", "metadata.parquet"}
TABLES = {"arrow", "parquet"}  # data by themselves
ARCHIVES = {"7z", "bz2", "gz", "rar", "tar", "tgz", "xz", "zip", "zst"}
LISTS = {"csv", "jsonl", "tsv", "xls", "xlsx"}
SPLITS = {"train", "test", "val", "valid", "validation", "dev", "eval"}
LARGEST_CAPTION = 1 << 20  # bytes of a file


@dataclass
class Contents:
    """The files of a folder by what they can be, as sorted paths.

    Args:
        pictures: pictures in formats that are read.
        foreign: pictures in formats that cannot be read here.
        metadata: files that list pictures and captions.
        tars: tars in the folder itself, not below.
        tables: parquet and arrow files.
        stray: archives and lists that are no data beside pictures.
        others: everything else; captions are among them.
        irregular: FIFOs, devices, and links that lead nowhere.
    """

    pictures: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    tars: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    irregular: list[str] = field(default_factory=list)


def list_folder(folder: Path) -> Contents:
    """Sort the files of a folder and its subfolders.

    Raises:
        ValueError: if a link leads to a folder that contains it.
        OSError: if a folder cannot be read.
    """
    found = Contents()
    for path, regular in sorted(_walk(str(folder))):
        name = os.path.basename(path)
        ending = name.rpartition(".")[2].lower()
        if not regular:
            found.irregular.append(path)
        elif name.lower() in METADATA:
            found.metadata.append(path)
        elif ending in image_endings():
            found.pictures.append(path)
        elif ending in unreadable_endings():
            found.foreign.append(path)
        elif ending == "tar" and os.path.dirname(path) == str(folder):
            found.tars.append(path)
        elif ending in TABLES:
            found.tables.append(path)
        else:
            (found.stray if ending in ARCHIVES | LISTS else found.others).append(path)
    return found


def _walk(top: str) -> Iterator[tuple[str, bool]]:
    """(path, whether it is a regular file) of what is below a folder; linked folders come last, each once."""
    seen: set[tuple[int, int]] = set()
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [(top, ())]  # with the folders on the way there
    links: list[tuple[str, tuple[tuple[int, int], ...]]] = []
    while waiting or links:
        path, above = waiting.pop() if waiting else links.pop(0)
        status = os.stat(path)
        own = (status.st_dev, status.st_ino)
        if own in above or (os.path.islink(path) and path != top and _contains_itself(path)):
            raise ValueError(f"The folder {printable(path)} is a link to a folder that contains it: remove the link.")
        if own in seen:
            continue
        seen.add(own)
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith(".") or entry.name in SYSTEM_FOLDERS:
                    continue
                try:
                    is_folder = entry.is_dir()
                except OSError:  # a link to itself
                    is_folder = False
                if is_folder:
                    (links if entry.is_symlink() else waiting).append((entry.path, (*above, own)))
                else:
                    yield entry.path, _is_regular(entry)


def _contains_itself(link: str) -> bool:
    target, parent = os.path.realpath(link), os.path.realpath(os.path.dirname(link))
    return os.path.commonpath([target, parent]) == target


def _is_regular(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def folder_kind(
    folder: Path, contents: Contents, caption_columns: Sequence[str]
) -> Literal["pictures", "tars", "tables"]:
    """Decide what a folder's data are.

    Pictures with captions are the data, whatever else is there. Without captions pictures may be an illustration of
    tars or tables; `tables` are left to `datasets`.

    Args:
        folder: the folder.
        contents: its files.
        caption_columns: see `FolderImages`.

    Raises:
        ValueError: if nothing in it can be data.
    """
    if contents.pictures and (contents.metadata or not caption_columns or _captions(contents, caption_columns)):
        return "pictures"
    if contents.tars:
        return "tars"
    if contents.tables:
        return "tables"
    if contents.pictures or contents.foreign or (contents.metadata and not contents.stray):
        return "pictures"
    if contents.stray or contents.others:
        return "tables"
    raise ValueError(f"The folder {folder} has no data: no pictures, tars or tables.")


def split_folder(folder: Path, contents: Contents, split: str) -> Path:
    """The folder that holds a split: a subfolder of that name where there are only subfolders named as splits, one of
    them `train`; else the folder itself has no splits.

    Raises:
        ValueError: for another split than `train` that is no subfolder.
    """
    if split == "train" and not (folder / "train").is_dir():
        return folder
    parts = {
        os.path.relpath(path, folder).split(os.sep)[0] for path in (*contents.pictures, *contents.metadata)
    }  # names at the top
    if split == "train" and not ("train" in parts and parts <= SPLITS and len(parts) > 1):
        return folder
    if split not in parts or not (folder / split).is_dir():
        raise ValueError(f"`dataset_split` is {split!r}, but {folder} has no splits: leave it out.")
    others = sorted(parts - {split})
    if others:
        logger.warning(
            f"Of {folder} only the pictures in {split} are used (`dataset_split`), not those in {', '.join(others)}."
        )
    return folder / split


def _key(path: str) -> str:
    """A path for comparisons: its ending in lower case, and accents in one form (they differ between file systems)."""
    return unicodedata.normalize("NFC", path)


def _stem(path: str) -> str:
    return path.rpartition(".")[0]


def _wanted_endings(caption_columns: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*caption_columns, *(["txt"] if "text" in caption_columns else []), "json"]))


def _captions(contents: Contents, caption_columns: Sequence[str]) -> dict[str, str]:
    """Files beside pictures that hold captions: `stem.ending`, with the ending as it is asked for, and the path."""
    endings = _wanted_endings(caption_columns)
    stems = {_key(_stem(path)) for path in (*contents.pictures, *contents.foreign)}
    found: dict[str, str] = {}
    for path in contents.others:
        for ending in endings:
            tail = f".{ending}"
            if path.lower().endswith(tail.lower()):
                stem = _key(path[: -len(tail)])
                if stem in stems and (stem + tail not in found or path.endswith(tail)):
                    found[stem + tail] = path
    return found


class FolderImages(StoredImages):
    """The pictures of a folder and its subfolders.

    Captions stand in a metadata.jsonl, .csv or .parquet, which lists the pictures of its folder and those below it, or
    in files beside each picture: a.jpg and a.txt. What is left out is reported with its names.

    Args:
        folder: the folder.
        caption_columns: columns of the metadata; beside pictures endings of files (`txt`, `long.txt`; `text` is also
            .txt, in upper case as well) or keys of a .json; none: captions are not asked for.
        image_column: column of the metadata that names the pictures; `image` is also `file_name`.
        contents: the folder's files, where they are listed already.

    Raises:
        ValueError: if no picture can be used, or the metadata are broken or name files outside of the folder.
    """

    def __init__(
        self,
        folder: Path,
        caption_columns: Sequence[str],
        image_column: str = "image",
        contents: Contents | None = None,
    ):
        contents = list_folder(folder) if contents is None else contents
        self.folder = folder
        self.caption_columns = tuple(caption_columns)
        self.paths: list[str] = []
        self.tables: list[dict[str, Any]] = []  # columns of captions of each file with metadata
        self._warnings: list[str] = []
        listed = self._read_metadata(contents, image_column)  # (picture, table, row)
        governed = _governed(contents)
        used = {_key(path) for path, *_ in listed}
        alone = [path for path in contents.pictures if not governed[os.path.dirname(path)]]
        captions = _captions(contents, caption_columns) if caption_columns else {}
        endings = _wanted_endings(caption_columns)
        paired = [
            path
            for path in alone
            if not caption_columns or any(f"{_key(_stem(path))}.{ending}" in captions for ending in endings)
        ]
        self.paths = [path for path, *_ in listed] + paired
        rows = [(table, row) for _, table, row in listed] + [(-1, -1)] * len(paired)
        self.rows = np.array(rows, dtype=np.int64).reshape(-1, 2)  # (pictures, 2): table and row, or -1
        # where a caption is not at `stem.ending`, but in other letters
        beside = (
            (f"{_stem(path)}.{ending}", f"{_key(_stem(path))}.{ending}") for path in paired for ending in endings
        )
        self._renamed = {path: captions[key] for path, key in beside if captions.get(key, path) != path}
        if caption_columns:
            self._report(sorted(set(alone) - set(paired)), "pictures have no caption and are left out", len(alone))
        unlisted = [path for path in contents.pictures if governed[os.path.dirname(path)] and _key(path) not in used]
        self._report(unlisted, "images are in no metadata file and are not used", len(contents.pictures))
        self._report_rest(contents, captions, bool(alone))
        if not self.paths:
            raise ValueError(self._nothing(contents))
        for warning in self._warnings:
            logger.warning(warning)

    def _report(self, names: Sequence[str], what: str, total: int | None = None, remedy: str = "") -> None:
        if names:
            count = f"{len(names)}" if total is None else f"{len(names)} of {total}"
            inside = [os.path.relpath(name, self.folder) for name in names[:NAMES_SHOWN]]
            text = f"{count} {what} ({self.folder}): {shown(inside, len(names))}."
            self._warnings.append(f"{text} {remedy}".strip())

    def _report_rest(self, contents: Contents, captions: dict[str, str], pairs: bool) -> None:
        """Report what is in the folder beside the pictures that are used."""
        for ending, remedy in unreadable_endings().items():
            names = [path for path in contents.foreign if path.lower().endswith(f".{ending}")]
            self._report(names, f"pictures are in a format that cannot be read here (.{ending})", remedy=f"{remedy}.")
        if pairs and self.caption_columns:
            tails = tuple(f".{ending.lower()}" for ending in _wanted_endings(self.caption_columns) if ending != "json")
            texts = [path for path in contents.others if path.lower().endswith(tails)]
            taken = set(captions.values())
            self._report([path for path in texts if path not in taken], "captions have no picture and are not used")
        self._report(
            contents.irregular, "entries are no regular files (FIFOs, devices, broken links) and are not read"
        )
        stray = sorted([*contents.stray, *contents.tables, *contents.tars])
        lists = any(path.lower().endswith(("csv", "jsonl")) for path in stray)
        remedy = "A list of captions is read if it is called metadata.csv or metadata.jsonl and has `file_name`s."
        self._report(stray, "files are no pictures or captions and are ignored", remedy=remedy if lists else "")

    def _nothing(self, contents: Contents) -> str:
        if not contents.pictures:
            text = f"The folder {self.folder} has no images that can be read."
        elif contents.metadata:
            text = f"The folder {self.folder} has {len(contents.pictures)} images, none of which its metadata lists."
        else:
            text = (
                f"The folder {self.folder} has {len(contents.pictures)} images and neither a metadata.jsonl nor "
                f"captions beside them: files like a.txt for a.jpg, for the columns {list(self.caption_columns)}. For "
                "one caption of all images pass `--instance_prompt`."
            )
        return " ".join([text, *self._warnings])

    def _read_metadata(self, contents: Contents, image_column: str) -> list[tuple[str, int, int]]:
        if not contents.metadata:
            return []
        pictures = {_key(path): path for path in contents.pictures}
        foreign = {_key(path) for path in contents.foreign}
        found: list[tuple[str, int, int]] = []
        missing: list[str] = []
        folders = [os.path.dirname(path) for path in contents.metadata]
        for path, parent in zip(contents.metadata, folders):
            if folders.count(parent) > 1:
                raise ValueError(f"The folder {parent} has several metadata files: keep one of them.")
            columns = read_metadata(path)
            file_column = next(
                (n for n in (f"{image_column}_file_name", _file_name(image_column), image_column) if n in columns), ""
            )
            there = list(dict.fromkeys("image" if name == "file_name" else name for name in columns))
            if not columns:
                raise ValueError(
                    f"{printable(path)} has no rows. Remove it, or list a `file_name` and a caption per row."
                )
            if not file_column:
                remedy = "name the pictures in a column `file_name`, or pass one of them as `--image_column`"
                if len(columns) == 1 and not {";", "\t"}.isdisjoint(next(iter(columns))):
                    remedy = "separate the columns with commas"
                require_column("image_column", image_column, there, printable(path), remedy)
            for column in self.caption_columns:
                require_column("caption_column", column, there)
            for row, value in enumerate(columns[file_column]):
                name = _cell(value)
                if not isinstance(name, str) or not name:
                    missing.append(f"row {row + 1} " + (f"names {name!r:.40}" if name else "without a name"))
                    continue
                where = self._inside(parent, name, path, row)
                picture = pictures.get(_key(where)) or (where if os.path.isfile(where) else None)
                if picture is not None and _key(picture) not in foreign:
                    found.append((picture, len(self.tables), row))
                elif _key(where) not in foreign:
                    missing.append(where)
            self.tables.append({column: columns[column] for column in self.caption_columns})
        self._report(missing, "pictures that the metadata list are not there", len(missing) + len(found))
        return found

    def _inside(self, parent: str, name: str, path: str, row: int) -> str:
        """The path of a picture that metadata name."""
        where = os.path.normpath(os.path.join(parent, name))
        if "\\" in name and not os.path.exists(where):  # written on Windows
            where = os.path.normpath(os.path.join(parent, name.replace("\\", "/")))
        root = os.path.normpath(self.folder)
        if os.path.isabs(name):
            where, root = os.path.abspath(where), os.path.abspath(root)
        if os.path.commonpath([os.path.abspath(where), os.path.abspath(root)]) != os.path.abspath(root):
            raise ValueError(
                f"Row {row + 1} of {printable(path)} names {name!r}, which is not inside of {self.folder}: metadata "
                "may only name files of their own data set."
            )
        return where

    def __len__(self) -> int:
        return len(self.paths)

    def stored_image(self, index: int) -> str:
        return self.paths[index]

    def stored_captions(self, index: int) -> dict[str, Any]:
        table, row = (int(number) for number in self.rows[index])
        if table >= 0:
            return {column: _cell(values[row]) for column, values in self.tables[table].items()}
        stem = _stem(self.paths[index])
        beside = {}
        for ending in _wanted_endings(self.caption_columns):
            path = self._renamed.get(f"{stem}.{ending}", f"{stem}.{ending}")
            if os.path.isfile(path):
                beside[ending] = path
        return {
            column: find_caption(column, beside, lambda ending: _read_text(beside[ending]))
            for column in self.caption_columns
        }

    def place(self, index: int) -> str:
        return printable(self.paths[index])


def _file_name(image_column: str) -> str:
    return "file_name" if image_column == "image" else ""


def _cell(value: Any) -> Any:
    return value.as_py() if isinstance(value, pa.Scalar) else value


def _read_text(path: str) -> bytes:
    with open_regular(path) as file:
        text = file.read(LARGEST_CAPTION + 1)
    if len(text) > LARGEST_CAPTION:
        raise UnreadableSample(f"a caption of more than {LARGEST_CAPTION} bytes")
    return text


def _governed(contents: Contents) -> dict[str, bool]:
    """True for every folder with pictures in which, or above which, metadata list the pictures."""
    with_metadata = {os.path.dirname(path) for path in contents.metadata}
    known: dict[str, bool] = {}

    def look_up(folder: str) -> bool:
        if folder not in known:
            parent = os.path.dirname(folder)
            known[folder] = folder in with_metadata or (parent != folder and look_up(parent))
        return known[folder]

    for folder in {os.path.dirname(path) for path in contents.pictures}:
        look_up(folder)
    return known


def read_metadata(path: str) -> dict[str, Any]:
    """The columns of a metadata file: arrow arrays, or lists where their values have several types.

    Raises:
        ValueError: if it cannot be read, with the line.
    """
    try:
        if path.lower().endswith(".parquet"):
            table = pyarrow.parquet.read_table(path)
            return {name: table.column(name) for name in table.column_names}
        with open_regular(path) as file:
            text = file.read().decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text, newline=""))) if path.lower().endswith(".csv") else _lines(text)
    except (ValueError, csv.Error, pa.ArrowException) as error:
        raise ValueError(f"The data of {printable(path)} cannot be read: {error!r}") from error
    names = list(dict.fromkeys(name for row in rows for name in row if isinstance(name, str)))
    return {name: _column([row.get(name) for row in rows]) for name in names}


def _lines(text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except RecursionError as error:
                raise ValueError(f"line {number} is nested too deeply") from error
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no mapping: {line[:80]!r}")
            rows.append(row)
    return rows


def _column(values: list[Any]) -> Any:
    """An arrow array of texts: it takes less memory, and stays shared between processes."""
    try:
        return pa.array(values, pa.large_string())
    except (pa.ArrowException, UnicodeError, TypeError):
        return values
