"""Upload of complete local folders to the Hugging Face Hub.

Local files are never removed. After a failed upload, run the same command again: files that the Hub already has are
not sent twice.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..config.checks import check_repo_id

EXIT_NOT_UPLOADED = 69  # "service unavailable" in sysexits.h: the results are on disk, but not on the Hub
CARD_FILE = "README.md"
# Cards with this line are rewritten when there are new results; cards without it belong to the user.
CARD_MARKER = "<!-- Written by diffusers-prx. Remove this line to keep your own changes. -->"
# Key in a card's metadata: the folder or repository that the card's code loads.
LOAD_FROM_KEY = "load_from"
UNPUBLISHED_BASE = (
    "the base of the adapter is not a Hub repository, so nobody else can run the code in its card. Publish the base "
    "(training/publish_prx.py) and train on its repository, or name the repository in the adapter's README.md, as "
    "`base_model` and in `from_pretrained`"
)


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that can be published.

    Args:
        name: name in messages.
        files: files that identify the kind.
        repo_type: "model", "dataset" or "space".
        excluded: patterns of files that are not uploaded.
    """

    name: str
    files: tuple[str, ...]
    repo_type: str
    excluded: tuple[str, ...] = ()


# Files of a training run that are not part of the model. ".*": the lock file names a host.
RUN_FILES = ("checkpoint-*", "logs/*", "validation/*", "pictures/*", "non_finite/*", "preempted.json", ".*")
# The first match counts.
FOLDER_KINDS = (
    FolderKind("pipeline", ("model_index.json",), "model", RUN_FILES),
    FolderKind("LoRA", ("pytorch_lora_weights.safetensors",), "model", RUN_FILES),
    FolderKind("Space", ("app.py", "requirements.txt"), "space", ("*__pycache__*", "outputs/*")),
    FolderKind("report of a study", ("plan.json", "report.md"), "dataset"),
)
# When a run ends, these files belong to an evaluation of the previous weights.
EVALUATION_FILES = ("report.json", "report.md", "samples.png", "emoji.png", "comparison.png")


class UploadError(RuntimeError):
    """An upload failed. The message contains the command that tries again; all files are still on disk."""


def kind_of(folder: Path) -> FolderKind:
    """Return the kind of a folder, identified by its files.

    Raises:
        ValueError: if the folder matches no kind.
    """
    for kind in FOLDER_KINDS:
        if all((folder / file).is_file() for file in kind.files):
            return kind
    known = "; ".join(f"{kind.name}: {' and '.join(kind.files)}" for kind in FOLDER_KINDS)
    raise ValueError(f"`folder` {folder} cannot be published; accepted kinds and their files: {known}.")


def hub_id(name: str | None) -> str | None:
    """Return a name if it is a Hub repository (namespace/name) and not a local path, else None."""
    if name is None or name.count("/") != 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def require_token() -> None:
    """Raise `ValueError` if this machine has no Hub token. The token itself is not checked."""
    if huggingface_hub.get_token() is None:
        raise ValueError("`push_to_hub` needs a Hugging Face token. Run `hf auth login`, or set HF_TOKEN.")


def repository(repo_id: str, repo_type: str = "model", space_sdk: str | None = None, private: bool = False) -> str:
    """Find or create a Hub repository, and check that the token may write to it.

    Args:
        repo_id: name or namespace/name; the default namespace is the token's own.
        repo_type: "model", "dataset" or "space".
        space_sdk: SDK of a new Space.
        private: visibility of a new repository; that of an existing one does not change.

    Returns:
        namespace/name.

    Raises:
        ValueError: if the name is invalid, or the token is missing, invalid or lacks write access.

    Example:
        >>> from diffusers_prx.hub.publishing import repository
        >>> repository("prx-quickstart", private=True)  # "me/prx-quickstart"
    """
    check_repo_id(repo_id)
    require_token()
    # the exception types of these calls depend on the version of huggingface_hub
    try:
        account = huggingface_hub.whoami()
    except Exception as error:
        raise ValueError(f"The Hub refused the token: {_one_line(error)}") from error
    try:
        full_id = huggingface_hub.create_repo(
            repo_id, repo_type=repo_type, space_sdk=space_sdk, private=private or None, exist_ok=True
        ).repo_id
        # `exist_ok` also accepts repositories without write access
        huggingface_hub.auth_check(full_id, repo_type=repo_type, write=True)
    except Exception as error:
        own = sorted({account["name"], *(organization["name"] for organization in account.get("orgs", []))})
        raise ValueError(
            f"`repo_id` is {repo_id!r}, to which this token cannot write; its namespaces are {own}: {_one_line(error)}"
        ) from error
    return full_id


def upload(folder: Path, repo_id: str, kind: FolderKind, message: str, excluded: tuple[str, ...] = ()) -> str:
    """Upload a folder to an existing repository as one commit.

    Args:
        folder: folder to upload.
        repo_id: return value of `repository`.
        kind: return value of `kind_of`.
        message: commit message.
        excluded: patterns of further files that are not uploaded.

    Returns:
        URL of the repository.

    Raises:
        UploadError: if anything fails.
    """
    try:
        huggingface_hub.upload_folder(
            repo_id=repo_id,
            repo_type=kind.repo_type,
            folder_path=folder,
            commit_message=message,
            ignore_patterns=[*kind.excluded, *excluded],
        )
    except Exception as error:  # from the HTTP library, upload threads or the disk
        raise UploadError(
            f"not uploaded to {repo_id}: {_one_line(error)}. All files are still in {folder}. Try again with "
            f"`python training/publish_prx.py --folder {shlex.quote(str(folder))} --repo_id {repo_id}`."
        ) from error
    prefix = "" if kind.repo_type == "model" else f"{kind.repo_type}s/"
    return f"{huggingface_hub.constants.ENDPOINT}/{prefix}{repo_id}"


def publish_folder(folder: Path, repo_id: str, private: bool = False) -> str:
    """Publish a saved pipeline, LoRA, Space or study report.

    The code in a generated model card is changed to load from the repository. A study report gets a card.

    Args:
        folder: folder to publish.
        repo_id: name or namespace/name.
        private: visibility of a new repository.

    Returns:
        URL of the repository.

    Raises:
        ValueError: if the folder or the repository is invalid; nothing is uploaded.
        UploadError: if the upload fails.

    Example:
        >>> from pathlib import Path
        >>> from diffusers_prx.hub.publishing import publish_folder
        >>> publish_folder(Path("outputs/quickstart"), "me/prx-quickstart")
    """
    kind = kind_of(folder)
    space_sdk = _space_sdk(folder) if kind.repo_type == "space" else None
    full_id = repository(repo_id, kind.repo_type, space_sdk, private)
    card = folder / CARD_FILE
    if kind.repo_type == "model":
        if is_generated(card):
            _load_from_repository(card, full_id)
        if kind.name == "LoRA" and _front_matter(card).get("base_model") is None:
            print(f"warning: {UNPUBLISHED_BASE}")
    elif kind.repo_type == "dataset":
        write_report_card(folder)
    return upload(folder, full_id, kind, f"Upload {kind.name}")


def is_generated(card: Path) -> bool:
    """True if a card exists, was generated by this package, and has not been claimed by the user."""
    return card.is_file() and CARD_MARKER in card.read_text(encoding="utf-8")


def _load_from_repository(card: Path, repo_id: str) -> None:
    """Change the code of a generated card, and the metadata that record what it loads, to a repository."""
    before = _front_matter(card).get(LOAD_FROM_KEY)
    if before is not None:
        text = card.read_text(encoding="utf-8").replace(f'"{before}"', f'"{repo_id}"')
        card.write_text(text, encoding="utf-8")
        huggingface_hub.metadata_save(card, _front_matter(card) | {LOAD_FROM_KEY: repo_id})


def _front_matter(card: Path) -> dict[str, Any]:
    return (huggingface_hub.metadata_load(card) or {}) if card.is_file() else {}


def _space_sdk(folder: Path) -> str:
    sdk = _front_matter(folder / CARD_FILE).get("sdk")
    if sdk is None:
        raise ValueError(f"`folder` {folder} is a Space without `sdk` in the front matter of {CARD_FILE}. Add it.")
    return str(sdk)


def write_report_card(folder: Path) -> None:
    """Write the report of a study as a data set card, unless the user has a card of their own.

    `viewer` is false, because the files are not a table.
    """
    card = folder / CARD_FILE
    if card.is_file() and not is_generated(card):
        return
    report = (folder / "report.md").read_text(encoding="utf-8")
    title = report.partition("\n")[0].lstrip("# ")
    data = huggingface_hub.DatasetCardData(pretty_name=title, tags=["prx", "ablation-study"], viewer=False)
    card.write_text(f"---\n{data.to_yaml()}\n---\n\n{report.rstrip()}\n\n{CARD_MARKER}\n", encoding="utf-8")


def _one_line(error: BaseException) -> str:
    """Return an error and its causes on one line."""
    text = " ".join(str(error).split()) or repr(error)
    if error.__cause__ is None or isinstance(error, huggingface_hub.errors.HfHubHTTPError):
        return text
    return f"{text} {_one_line(error.__cause__)}"
