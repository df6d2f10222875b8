"""Sending folders that are whole on this disk to the Hub; huggingface_hub does the work.

Nothing is removed here, so that an upload that failed is tried again with the same command: files that the Hub has
already are not sent twice.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..config.training_config import check_name

EXIT_NOT_UPLOADED = 69  # "service unavailable" of sysexits.h: what was trained is on this disk, not on the Hub
CARD_FILE = "README.md"
# Cards that carry this line are written again when there is more to tell; those without it are somebody's own.
CARD_MARKER = "<!-- Written by diffusers-prx. Remove this line to keep your own changes. -->"
LOADED_FROM = re.compile(r'(?<=\.from_pretrained\(")[^"]*(?="\))')
ADAPTER_LOADED_FROM = re.compile(r'(?<=\.load_lora_weights\(\n    ")[^"]*(?=")')
# said of a LoRA that is published while nothing says where on the Hub its base is
UNPUBLISHED_BASE = (
    "the adapter's base is no repository of the Hub, so nobody else can run the code in its card: publish the base "
    "(training/publish_prx.py) and train on its name, or put that into the adapter's README.md, as `base_model` and "
    "in `from_pretrained`"
)


@dataclass(frozen=True)
class Kind:
    """A kind of folder that can be published.

    Args:
        name: for messages.
        files: that tell it from others.
        repo_type: of the Hub: model, dataset or space.
        left_out: patterns of files that stay here.
    """

    name: str
    files: tuple[str, ...]
    repo_type: str
    left_out: tuple[str, ...] = ()


# ".*": the lock of a run names a host
OF_A_RUN = ("checkpoint-*", "logs/*", "validation/*", "pictures/*", "non_finite/*", "preempted.json", ".*")
# the first that fits counts
KINDS = (
    Kind("pipeline", ("model_index.json",), "model", OF_A_RUN),
    Kind("LoRA", ("pytorch_lora_weights.safetensors",), "model", OF_A_RUN),
    Kind("Space", ("app.py", "requirements.txt"), "space", ("*__pycache__*", "outputs/*")),
    Kind("report of a study", ("plan.json", "report.md"), "dataset"),
)
# What an evaluation has left in a folder is of the weights that were there before, when a run ends.
OF_AN_EVALUATION = ("report.json", "report.md", "samples.png", "comparison.png")


class UploadError(RuntimeError):
    """An upload failed; the message says how to try again. Everything is still on this disk."""


def kind_of(folder: Path) -> Kind:
    """What a folder holds, by its files.

    Raises:
        ValueError: if it is nothing that can be published.
    """
    for kind in KINDS:
        if all((folder / file).is_file() for file in kind.files):
            return kind
    known = "; ".join(f"{kind.name}: {' and '.join(kind.files)}" for kind in KINDS)
    raise ValueError(
        f"`folder` is {str(folder)!r}, which holds nothing that is published. Known by their files: {known}."
    )


def hub_id(name: str | None) -> str | None:
    """A name if it is one of the Hub: namespace/name, and no folder here."""
    if name is None or name.count("/") != 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def require_token() -> None:
    """Raise `ValueError` if there is no token of the Hub on this machine; whether it is a good one is not asked."""
    if huggingface_hub.get_token() is None:
        raise ValueError("`push_to_hub` needs a token of the Hugging Face Hub: `hf auth login`, or set HF_TOKEN.")


def repository(repo_id: str, repo_type: str = "model", space_sdk: str | None = None, private: bool = False) -> str:
    """Find a repository on the Hub, or create it, and make sure that the token may write to it.

    Args:
        repo_id: its name, or namespace/name; without a namespace it is the token's own.
        repo_type: model, dataset or space.
        space_sdk: of a new Space.
        private: of a new repository; one that is there stays as it is.

    Returns:
        namespace/name.

    Raises:
        ValueError: if the name cannot be one, there is no token, the Hub does not know it, or it may not write there.
    """
    check_name(repo_id)
    require_token()
    # which errors these calls raise changes with the HTTP library of huggingface_hub's version
    try:
        account = huggingface_hub.whoami()
    except Exception as error:
        raise ValueError(f"The Hub was asked whose token this is: {_told(error)}") from error
    try:
        full_id = huggingface_hub.create_repo(
            repo_id, repo_type=repo_type, space_sdk=space_sdk, private=private or None, exist_ok=True
        ).repo_id
        # `exist_ok` also accepts a repository of somebody else
        huggingface_hub.auth_check(full_id, repo_type=repo_type, write=True)
    except Exception as error:
        own = sorted({account["name"], *(organization["name"] for organization in account.get("orgs", []))})
        raise ValueError(
            f"The repository {repo_id!r} cannot be written to with this token, whose namespaces are {own}: "
            f"{_told(error)}"
        ) from error
    return full_id


def upload(folder: Path, repo_id: str, kind: Kind, message: str, left_out: tuple[str, ...] = ()) -> str:
    """Send a folder to a repository that is there, as one commit.

    Args:
        folder: of this kind.
        repo_id: from `repository`.
        kind: see `kind_of`.
        message: of the commit.
        left_out: patterns of more files that stay here.

    Returns:
        The address of the repository.

    Raises:
        UploadError: whatever fails.
    """
    try:
        huggingface_hub.upload_folder(
            repo_id=repo_id,
            repo_type=kind.repo_type,
            folder_path=folder,
            commit_message=message,
            ignore_patterns=[*kind.left_out, *left_out],
        )
    except Exception as error:  # of the HTTP library, of threads that send files, of the disk
        raise UploadError(
            f"not uploaded to {repo_id}: {_told(error)}. Nothing is lost: it is all in {folder}. Try again with "
            f"`python training/publish_prx.py --folder {shlex.quote(str(folder))} --repo_id {repo_id}`."
        ) from error
    prefix = "" if kind.repo_type == "model" else f"{kind.repo_type}s/"
    return f"{huggingface_hub.constants.ENDPOINT}/{prefix}{repo_id}"


def publish_folder(folder: Path, repo_id: str, private: bool = False) -> str:
    """Publish a pipeline, a LoRA, a Space or the report of a study that is there already.

    Args:
        folder: of it. Its card, where we wrote it, is changed to load the model from the repository; the report of a
            study gets one.
        repo_id: name, or namespace/name.
        private: of a new repository.

    Returns:
        The address of the repository.

    Raises:
        ValueError: for a folder or a repository that does not do; nothing is sent.
        UploadError: if sending fails.
    """
    kind = kind_of(folder)
    space_sdk = _space_sdk(folder) if kind.repo_type == "space" else None
    full_id = repository(repo_id, kind.repo_type, space_sdk, private)
    card = folder / CARD_FILE
    if kind.repo_type == "model":
        if is_ours(card):
            loaded_from = ADAPTER_LOADED_FROM if kind.name == "LoRA" else LOADED_FROM  # an adapter's base stays
            card.write_text(loaded_from.sub(full_id, card.read_text(encoding="utf-8")), encoding="utf-8")
        if kind.name == "LoRA" and _front_matter(card).get("base_model") is None:
            print(f"warning: {UNPUBLISHED_BASE}")
    elif kind.repo_type == "dataset":
        write_report_card(folder)
    return upload(folder, full_id, kind, f"Upload {kind.name}")


def is_ours(card: Path) -> bool:
    """Whether a card is there that we wrote and nobody has made their own."""
    return card.is_file() and CARD_MARKER in card.read_text(encoding="utf-8")


def _front_matter(card: Path) -> dict[str, Any]:
    return (huggingface_hub.metadata_load(card) or {}) if card.is_file() else {}


def _space_sdk(folder: Path) -> str:
    sdk = _front_matter(folder / CARD_FILE).get("sdk")
    if sdk is None:
        raise ValueError(f"The Space in {folder} needs a {CARD_FILE} whose front matter names its `sdk`.")
    return str(sdk)


def write_report_card(folder: Path) -> None:
    """Make the report of a study the page of a data set, beside it; somebody's own page stays.

    `viewer` is false, since its files are no table.
    """
    card = folder / CARD_FILE
    if card.is_file() and not is_ours(card):
        return
    report = (folder / "report.md").read_text(encoding="utf-8")
    title = report.partition("\n")[0].lstrip("# ")
    data = huggingface_hub.DatasetCardData(pretty_name=title, tags=["prx", "ablation-study"], viewer=False)
    card.write_text(f"---\n{data.to_yaml()}\n---\n\n{report.rstrip()}\n\n{CARD_MARKER}\n", encoding="utf-8")


def _told(error: BaseException) -> str:
    """An error and what caused it, on one line."""
    told = " ".join(str(error).split()) or repr(error)
    cause = error.__cause__
    return (
        told if cause is None or isinstance(error, huggingface_hub.errors.HfHubHTTPError) else f"{told} {_told(cause)}"
    )
