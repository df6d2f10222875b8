"""Image folders: select the data files of a folder, and match each image with its caption.

Subfolders are read too. Names that begin with a dot and `SYSTEM_FOLDERS` are ignored; a linked folder is read once.
`datasets`' own folder loader is not used, because it interprets parts of file names such as `test` as splits.
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
METADATA_NAMES = {"metadata.jsonl", "metadata.csv", "metadata.parquet"}
TABLE_ENDINGS = {"arrow", "parquet"}
ARCHIVE_ENDINGS = {"7z", "bz2", "gz", "rar", "tar", "tgz", "xz", "zip", "zst"}
LIST_ENDINGS = {"csv", "jsonl", "tsv", "xls", "xlsx"}
SPLIT_NAMES = {"train", "test", "val", "valid", "validation", "dev", "eval"}
MAX_CAPTION_BYTES = 1 << 20


@dataclass
class FolderContents:
    """Files of a folder by kind, as sorted paths.

    Args:
        images: images in readable formats.
        unsupported_images: images in formats that cannot be read here.
        metadata: files that list images and captions.
        tars: tars directly in the folder, not in subfolders.
        tables: parquet and arrow files.
        ignored: archives and lists, which are not data next to images.
        others: all other files, including caption files.
        irregular: FIFOs, devices and broken links.
    """

    images: list[str] = field(default_factory=list)
    unsupported_images: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    tars: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    irregular: list[str] = field(default_factory=list)


def list_folder(folder: Path) -> FolderContents:
    """Sort the files of a folder and its subfolders by kind.

    Raises:
        ValueError: if a link leads to a folder that contains it.
        OSError: if a folder cannot be read.
    """
    contents = FolderContents()
    for path, is_regular in sorted(_walk(str(folder))):
        name = os.path.basename(path)
        ending = name.rpartition(".")[2].lower()
        if not is_regular:
            contents.irregular.append(path)
        elif name.lower() in METADATA_NAMES:
            contents.metadata.append(path)
        elif ending in image_endings():
            contents.images.append(path)
        elif ending in unreadable_endings():
            contents.unsupported_images.append(path)
        elif ending == "tar" and os.path.dirname(path) == str(folder):
            contents.tars.append(path)
        elif ending in TABLE_ENDINGS:
            contents.tables.append(path)
        elif ending in ARCHIVE_ENDINGS | LIST_ENDINGS:
            contents.ignored.append(path)
        else:
            contents.others.append(path)
    return contents


def _walk(top: str) -> Iterator[tuple[str, bool]]:
    """Yield (path, is_regular_file) for everything below a folder. Linked folders come last, each once."""
    seen: set[tuple[int, int]] = set()
    folders: list[tuple[str, tuple[tuple[int, int], ...]]] = [(top, ())]  # each with the ids of its parents
    linked_folders: list[tuple[str, tuple[tuple[int, int], ...]]] = []
    while folders or linked_folders:
        path, parents = folders.pop() if folders else linked_folders.pop(0)
        status = os.stat(path)
        folder_id = (status.st_dev, status.st_ino)
        if folder_id in parents or (os.path.islink(path) and path != top and _contains_itself(path)):
            raise ValueError(f"The folder {printable(path)} is a link to a folder that contains it: remove the link.")
        if folder_id in seen:
            continue
        seen.add(folder_id)
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith(".") or entry.name in SYSTEM_FOLDERS:
                    continue
                try:
                    is_folder = entry.is_dir()
                except OSError:  # a link to itself
                    is_folder = False
                if is_folder:
                    (linked_folders if entry.is_symlink() else folders).append((entry.path, (*parents, folder_id)))
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
    folder: Path, contents: FolderContents, caption_columns: Sequence[str]
) -> Literal["images", "tars", "tables"]:
    """Decide which of a folder's files are the data.

    Images with captions take precedence over everything else. Images without captions may illustrate tars or tables,
    so those take precedence over them. `tables` are opened by `datasets`.

    Args:
        folder: data folder.
        contents: files of the folder.
        caption_columns: see `FolderImages`.

    Raises:
        ValueError: if no file of the folder can be data.
    """
    if contents.images and (contents.metadata or not caption_columns or _caption_files(contents, caption_columns)):
        return "images"
    if contents.tars:
        return "tars"
    if contents.tables:
        return "tables"
    if contents.images or contents.unsupported_images or (contents.metadata and not contents.ignored):
        return "images"
    if contents.ignored or contents.others:
        return "tables"
    raise ValueError(f"The folder {folder} has no data: it needs images, tars (.tar) or parquet files.")


def split_folder(folder: Path, contents: FolderContents, split: str) -> Path:
    """Return the subfolder that holds a split, or the folder itself if it has no splits.

    A folder has splits if all its images are in subfolders named like splits and one of these is `train`.

    Raises:
        ValueError: for a split other than `train` without a subfolder of that name.
    """
    if split == "train" and not (folder / "train").is_dir():
        return folder
    top_names = {os.path.relpath(path, folder).split(os.sep)[0] for path in (*contents.images, *contents.metadata)}
    if split == "train" and not ("train" in top_names and top_names <= SPLIT_NAMES and len(top_names) > 1):
        return folder
    if split not in top_names or not (folder / split).is_dir():
        raise ValueError(f"`dataset_split` is {split!r}, but {folder} has no splits. Omit `--dataset_split`.")
    others = sorted(top_names - {split})
    if others:
        logger.warning(f"`dataset_split` selects {folder / split}; the images in {', '.join(others)} are not used.")
    return folder / split


def _normalized(path: str) -> str:
    """Path with composed accents: file systems differ in the Unicode form that they store."""
    return unicodedata.normalize("NFC", path)


def _stem(path: str) -> str:
    return path.rpartition(".")[0]


def _caption_endings(caption_columns: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*caption_columns, *(["txt"] if "text" in caption_columns else []), "json"]))


def _caption_files(contents: FolderContents, caption_columns: Sequence[str]) -> dict[str, str]:
    """Map `stem.ending`, normalized and with the ending as requested, to the caption file next to that image."""
    endings = _caption_endings(caption_columns)
    stems = {_normalized(_stem(path)) for path in (*contents.images, *contents.unsupported_images)}
    files: dict[str, str] = {}
    for path in contents.others:
        for ending in endings:
            suffix = f".{ending}"
            if path.lower().endswith(suffix.lower()):
                stem = _normalized(path[: -len(suffix)])
                if stem in stems and (stem + suffix not in files or path.endswith(suffix)):
                    files[stem + suffix] = path
    return files


class FolderImages(StoredImages):
    """Captioned images of a folder and its subfolders.

    Captions come from a metadata.jsonl, .csv or .parquet, which lists the images of its folder and subfolders, or from
    a file next to each image: a.jpg and a.txt. Files that are not used are logged by name.

    Args:
        folder: data folder.
        caption_columns: metadata columns. Without metadata: endings of caption files (`txt`, `long.txt`; `text` also
            means .txt; upper and lower case are equal) or keys of a .json file. Empty: no captions are read.
        image_column: metadata column with the image files; `image` also means `file_name`.
        contents: result of `list_folder`, if already known.

    Raises:
        ValueError: if no image is usable, or the metadata are malformed or name files outside the folder.

    Example:
        >>> images = FolderImages(Path("photos"), ["text"])
        >>> images[0]["caption"]
    """

    def __init__(
        self,
        folder: Path,
        caption_columns: Sequence[str],
        image_column: str = "image",
        contents: FolderContents | None = None,
    ):
        contents = list_folder(folder) if contents is None else contents
        self.folder = folder
        self.caption_columns = tuple(caption_columns)
        self.tables: list[dict[str, Any]] = []  # caption columns of each metadata file
        self._renamed: dict[str, str] = {}  # expected caption file: actual file, where case or accents differ
        self._warnings: list[str] = []
        listed = self._read_metadata(contents, image_column)  # (image, table, row)
        has_metadata = _folders_with_metadata(contents)
        candidates = [path for path in contents.images if not has_metadata[os.path.dirname(path)]]
        paired = self._match_caption_files(contents, candidates) if caption_columns else candidates
        self.paths = [path for path, *_ in listed] + paired
        rows = [(table, row) for _, table, row in listed] + [(-1, -1)] * len(paired)
        self.rows = np.array(rows, dtype=np.int64).reshape(-1, 2)  # (images, 2): table and row, or -1
        known = {_normalized(path) for path in (*candidates, *self.paths)}
        unlisted = [path for path in contents.images if _normalized(path) not in known]
        self._report(unlisted, "images are in no metadata file and are not used", len(contents.images))
        self._report_unused_files(contents)
        if not self.paths:
            raise ValueError(self._no_images_message(contents))
        for warning in self._warnings:
            logger.warning(warning)

    def _match_caption_files(self, contents: FolderContents, candidates: Sequence[str]) -> list[str]:
        """Return the images with at least one caption file; index the files whose names differ from the expected."""
        endings = _caption_endings(self.caption_columns)
        captions = _caption_files(contents, self.caption_columns)
        paired = []
        for path in candidates:
            stem = _stem(path)
            files = {
                f"{stem}.{ending}": captions[key]
                for ending in endings
                if (key := f"{_normalized(stem)}.{ending}") in captions
            }
            if files:
                paired.append(path)
            self._renamed |= {expected: file for expected, file in files.items() if expected != file}
        without = sorted(set(candidates) - set(paired))
        self._report(without, "images have no caption and are not used", len(candidates))
        if candidates:
            suffixes = tuple(f".{ending.lower()}" for ending in endings if ending != "json")
            used = set(captions.values())
            unused = [path for path in contents.others if path.lower().endswith(suffixes) and path not in used]
            self._report(unused, "captions have no image and are not used")
        return paired

    def _report(self, names: Sequence[str], text: str, total: int | None = None, remedy: str = "") -> None:
        if names:
            count = f"{len(names)}" if total is None else f"{len(names)} of {total}"
            relative = [os.path.relpath(name, self.folder) for name in names[:NAMES_SHOWN]]
            message = f"{count} {text} ({self.folder}): {shown(relative, len(names))}."
            self._warnings.append(f"{message} {remedy}".strip())

    def _report_unused_files(self, contents: FolderContents) -> None:
        for ending, remedy in unreadable_endings().items():
            names = [path for path in contents.unsupported_images if path.lower().endswith(f".{ending}")]
            self._report(names, f"images have an unsupported format (.{ending})", remedy=f"{remedy}.")
        self._report(contents.irregular, "entries are not regular files (FIFO, device, broken link) and are ignored")
        ignored = sorted([*contents.ignored, *contents.tables, *contents.tars])
        has_lists = any(path.lower().endswith(("csv", "jsonl")) for path in ignored)
        remedy = "To use a list of captions, name it metadata.csv or metadata.jsonl and give it a `file_name` column."
        self._report(ignored, "files are neither images nor captions and are ignored", remedy=remedy * has_lists)

    def _no_images_message(self, contents: FolderContents) -> str:
        if not contents.images:
            text = f"The folder {self.folder} has no readable images."
        elif contents.metadata:
            text = f"The folder {self.folder} has {len(contents.images)} images, but its metadata list none of them."
        else:
            text = (
                f"The folder {self.folder} has {len(contents.images)} images, but neither a metadata.jsonl nor "
                f"caption files (a.txt for a.jpg) for `caption_column` {list(self.caption_columns)}. "
                "To use one caption for all images, pass `--instance_prompt`."
            )
        return " ".join([text, *self._warnings])

    def _read_metadata(self, contents: FolderContents, image_column: str) -> list[tuple[str, int, int]]:
        """Read all metadata files; return (image, index of the table, row) for each image that exists."""
        if not contents.metadata:
            return []
        images = {_normalized(path): path for path in contents.images}
        unsupported = {_normalized(path) for path in contents.unsupported_images}
        listed: list[tuple[str, int, int]] = []
        missing: list[str] = []
        folders = [os.path.dirname(path) for path in contents.metadata]
        for path, parent in zip(contents.metadata, folders):
            if folders.count(parent) > 1:
                raise ValueError(f"The folder {parent} has several metadata files. Keep one of them.")
            columns = read_metadata(path)
            file_column = self._file_column(path, columns, image_column)
            for row, value in enumerate(columns[file_column]):
                name = _cell(value)
                if not isinstance(name, str) or not name:
                    missing.append(f"row {row + 1} " + (f"names {name!r:.40}" if name else "without a name"))
                    continue
                file = self._resolve(parent, name, path, row)
                image = images.get(_normalized(file)) or (file if os.path.isfile(file) else None)
                if image is not None and _normalized(image) not in unsupported:
                    listed.append((image, len(self.tables), row))
                elif _normalized(file) not in unsupported:
                    missing.append(file)
            self.tables.append({column: columns[column] for column in self.caption_columns})
        self._report(missing, "images listed in the metadata do not exist", len(missing) + len(listed))
        return listed

    def _file_column(self, path: str, columns: dict[str, Any], image_column: str) -> str:
        """Return the column with the image files; raise ValueError if a required column is missing."""
        if not columns:
            raise ValueError(
                f"{printable(path)} has no rows. Remove it, or give each row a `file_name` and a caption."
            )
        candidates = [f"{image_column}_file_name", *(["file_name"] if image_column == "image" else []), image_column]
        file_column = next((name for name in candidates if name in columns), "")
        available = list(dict.fromkeys("image" if name == "file_name" else name for name in columns))
        if not file_column:
            remedy = "name the images in a column `file_name`, or pass `--image_column` with one of these columns"
            if len(columns) == 1 and not {";", "\t"}.isdisjoint(next(iter(columns))):
                remedy = "separate the columns with commas"
            require_column("image_column", image_column, available, printable(path), remedy)
        for column in self.caption_columns:
            require_column("caption_column", column, available)
        return file_column

    def _resolve(self, parent: str, name: str, metadata: str, row: int) -> str:
        """Return the path of an image named by metadata; raise ValueError if it is outside the folder."""
        path = os.path.normpath(os.path.join(parent, name))
        if "\\" in name and not os.path.exists(path):  # written on Windows
            path = os.path.normpath(os.path.join(parent, name.replace("\\", "/")))
        root = os.path.normpath(self.folder)
        if os.path.isabs(name):
            path, root = os.path.abspath(path), os.path.abspath(root)
        if os.path.commonpath([os.path.abspath(path), os.path.abspath(root)]) != os.path.abspath(root):
            raise ValueError(
                f"Row {row + 1} of {printable(metadata)} names {name!r}, which is not inside {self.folder}. Metadata "
                "may only name files of their own data set."
            )
        return path

    def __len__(self) -> int:
        return len(self.paths)

    def stored_image(self, index: int) -> str:
        return self.paths[index]

    def stored_captions(self, index: int) -> dict[str, Any]:
        table, row = (int(number) for number in self.rows[index])
        if table >= 0:
            return {column: _cell(values[row]) for column, values in self.tables[table].items()}
        stem = _stem(self.paths[index])
        files = {}
        for ending in _caption_endings(self.caption_columns):
            path = self._renamed.get(f"{stem}.{ending}", f"{stem}.{ending}")
            if os.path.isfile(path):
                files[ending] = path
        return {
            column: find_caption(column, files, lambda ending: _read_caption_file(files[ending]))
            for column in self.caption_columns
        }

    def location(self, index: int) -> str:
        return printable(self.paths[index])


def _cell(value: Any) -> Any:
    return value.as_py() if isinstance(value, pa.Scalar) else value


def _read_caption_file(path: str) -> bytes:
    with open_regular(path) as file:
        text = file.read(MAX_CAPTION_BYTES + 1)
    if len(text) > MAX_CAPTION_BYTES:
        raise UnreadableSample(f"the caption has more than {MAX_CAPTION_BYTES} bytes")
    return text


def _folders_with_metadata(contents: FolderContents) -> dict[str, bool]:
    """Map each folder with images to True if it or a parent folder has a metadata file."""
    metadata_folders = {os.path.dirname(path) for path in contents.metadata}
    known: dict[str, bool] = {}

    def look_up(folder: str) -> bool:
        if folder not in known:
            parent = os.path.dirname(folder)
            known[folder] = folder in metadata_folders or (parent != folder and look_up(parent))
        return known[folder]

    for folder in {os.path.dirname(path) for path in contents.images}:
        look_up(folder)
    return known


def read_metadata(path: str) -> dict[str, Any]:
    """Read the columns of a metadata file, as arrow arrays, or as lists where a column mixes types.

    Raises:
        ValueError: if the file cannot be read; the message names the line.
    """
    try:
        if path.lower().endswith(".parquet"):
            table = pyarrow.parquet.read_table(path)
            return {name: table.column(name) for name in table.column_names}
        with open_regular(path) as file:
            text = file.read().decode("utf-8-sig")
        is_csv = path.lower().endswith(".csv")
        rows = list(csv.DictReader(io.StringIO(text, newline=""))) if is_csv else _parse_json_lines(text)
    except (ValueError, csv.Error, pa.ArrowException) as error:
        raise ValueError(f"The data of {printable(path)} cannot be read: {error!r}") from error
    names = list(dict.fromkeys(name for row in rows for name in row if isinstance(name, str)))
    return {name: _as_column([row.get(name) for row in rows]) for name in names}


def _parse_json_lines(text: str) -> list[dict[str, Any]]:
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
                raise ValueError(f"line {number} is not a mapping: {line[:80]!r}")
            rows.append(row)
    return rows


def _as_column(values: list[Any]) -> Any:
    """Convert texts to an arrow array, which needs less memory and stays shared between worker processes."""
    try:
        return pa.array(values, pa.large_string())
    except (pa.ArrowException, UnicodeError, TypeError):
        return values
