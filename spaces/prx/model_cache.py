"""Which models and LoRAs can be asked for, and the few of them that are kept in memory.

Several requests may draw with one pipeline at the same time: a call keeps everything of its own to itself, its
scheduler too. A LoRA is different, it changes the weights that all calls share. So each LoRA that is asked for gets a
transformer of its own (text encoder and VAE stay shared), and requests with one LoRA take turns, because the weight
it is used with may differ. A request without a LoRA never waits for one with it, nor sees it. The price is memory,
one transformer for each LoRA in use, which `CAPACITY` bounds.
"""

import copy
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

import diffusers_prx
from diffusers_prx.resolution_bins import RESOLUTION_BINS
from settings import NO_LORA, size_name

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent  # also where there is none so far up: the parent of / is /
CLASSES = ("PRXPipeline", "PRXPixelPipeline")
PARTS = (
    "scheduler",
    "text_encoder",
    "tokenizer",
    "transformer",
)  # that a pipeline draws with; one for latents has a vae
# On a GPU; in this order. PRX_HUB_MODELS replaces them anywhere.
HUB_MODELS = ("Photoroom/prx-512-t2i-sft", "Photoroom/prxpixel-t2i")
# What the page opens on, the first that is there.
OPENED_FIRST = ("quickstart", "prx-scenes-small")
CAPACITY = 3  # two models side by side, and one with a LoRA
MAX_SIDE = 4096  # pixels
LORA_FILE = "pytorch_lora_weights.safetensors"
_ADAPTER = "lora"


class Stopped(Exception):
    """Nobody waits for the picture any more."""


@dataclass(frozen=True)
class Model:
    """A pipeline that can be asked for: a folder or a name on the Hub, and the sizes that it was trained at."""

    name: str
    source: str
    class_name: str
    sizes: tuple[str, ...]
    default_size: str


def find_models() -> dict[str, Model]:
    """The models by name, the one to open on first; what is no PRX pipeline or cannot be read is printed and left out.

    Folders are those in `PRX_MODELS` (several with the separator of PATH), or outputs/ and model_cards/ of the
    repository: each folder in them that holds a model_index.json, and they themselves. Names on the Hub are those in
    `PRX_HUB_MODELS` (with commas), or `HUB_MODELS` where there is a GPU.
    """
    named = os.environ.get("PRX_MODELS")
    roots = [_path(root) for root in named.split(os.pathsep) if root] if named is not None else []
    if named is None and (REPOSITORY / "pyproject.toml").is_file():  # a Space is this folder alone
        roots = [REPOSITORY / "outputs", REPOSITORY / "model_cards"]
    sources: dict[str, str] = {}
    for root in roots:
        for folder in [root, *_folders_in(root)]:
            if os.path.isfile(folder / "model_index.json"):  # False, not an error, in a folder that cannot be read
                name = folder.name if folder.name not in sources else f"{root.name}/{folder.name}"
                sources[name] = str(folder)
    hub = os.environ.get("PRX_HUB_MODELS")
    listed = HUB_MODELS if torch.cuda.is_available() else ()
    names = listed if hub is None else tuple(name.strip() for name in hub.split(",") if name.strip())
    sources.update({name: name for name in names})
    models = {}
    for name in sorted(sources, key=lambda name: OPENED_FIRST.index(name) if name in OPENED_FIRST else 99):
        try:
            models[name] = describe(name, sources[name])
        except Exception as error:  # one folder that cannot be read must not keep the others from being served
            print_left_out(sources[name], error)
    return models


def _path(text: str) -> Path:
    """A path with ~ and $NAME in it expanded."""
    return Path(os.path.expandvars(text)).expanduser()


def _folders_in(root: Path) -> list[Path]:
    try:
        return sorted(folder for folder in root.iterdir() if folder.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        print_left_out(str(root), error)
        return []


def print_left_out(source: str, error: Exception) -> None:
    """Name a model that is not offered, and why."""
    kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
    print(f"Left out {source}: {kind}{error}")


def describe(name: str, source: str) -> Model:
    """Read what a pipeline is from its model_index.json, without loading it.

    A side that has resolution bins can be drawn at each of them. Any other was the only one in training, and is the
    only one on offer.

    Raises:
        OSError: there is none, or the Hub does not answer.
        ValueError: it is no PRX pipeline, or what it says of itself makes no sense.
    """
    try:
        config = DiffusionPipeline.load_config(source)
    except (TypeError, AttributeError, RecursionError):  # JSON of another kind; some is read all the same
        config = None
    if not isinstance(config, Mapping):
        raise ValueError("model_index.json is not a JSON object.")
    class_name = config.get("_class_name")
    if class_name not in CLASSES:
        raise ValueError(f"model_index.json states `_class_name` {class_name!r}; accepted: {', '.join(CLASSES)}.")
    side = config.get("default_sample_size") or getattr(diffusers_prx, class_name).default_resolution
    if type(side) is not int or not 1 <= side <= MAX_SIDE:
        raise ValueError(
            f"model_index.json states `default_sample_size` {side!r}; accepted: a whole number of pixels, "
            f"1 to {MAX_SIDE}."
        )
    for part in PARTS if class_name == "PRXPixelPipeline" else (*PARTS, "vae"):
        stated = config.get(part)
        if not isinstance(stated, list) or len(stated) != 2 or not all(isinstance(name, str) for name in stated):
            raise ValueError(f"model_index.json states `{part}` {stated!r}; accepted: [library, class].")
        if os.path.isdir(source) and not os.path.isdir(os.path.join(source, part)):
            raise ValueError(f"There is no folder {part}, which model_index.json lists: save the model again.")
    sizes = [size_name(*size) for size in RESOLUTION_BINS.get(side, {"1.0": (side, side)}).values()]
    return Model(name, source, class_name, tuple(sizes), size_name(side, side))


def find_loras() -> dict[str, Path]:
    """LoRA files by name, in `PRX_LORAS` or loras/ beside this file: *.safetensors, or folders with `LORA_FILE`."""
    root = _path(os.environ.get("PRX_LORAS") or str(HERE / "loras"))
    files = {file.stem: file for file in sorted(root.glob("*.safetensors"))}
    return files | {file.parent.name: file for file in sorted(root.glob(f"*/{LORA_FILE}"))}


class ModelCache:
    """Pipelines by model and LoRA, loaded when they are first asked for; the least recently used makes room.

    One that makes room while a request still draws with it goes when that request ends.
    """

    def __init__(self, models: Mapping[str, Model], loras: Mapping[str, Path], capacity: int = CAPACITY):
        self.models = models
        self.loras = loras
        self.capacity = capacity
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._kept: OrderedDict[tuple[str, str], tuple[Any, threading.Lock]] = OrderedDict()
        self._kept_lock = threading.Lock()
        self._load_lock = threading.RLock()  # one at a time: two that load the same would take twice the memory

    @contextmanager
    def lend(self, model: str, lora: str, lora_weight: float, stop: threading.Event) -> Iterator[Any]:
        """The pipeline to draw with, and with a LoRA alone with it.

        Raises:
            Stopped: `stop` was set while others had their turn with this LoRA.
            OSError, ValueError: the model or the LoRA cannot be loaded.
        """
        pipeline, turn = self.get(model, lora)
        if lora == NO_LORA:
            yield pipeline
            return
        while not turn.acquire(timeout=0.1):
            if stop.is_set():
                raise Stopped
        try:
            pipeline.set_adapters([_ADAPTER], [lora_weight])
            yield pipeline
        finally:
            turn.release()

    def get(self, model: str, lora: str = NO_LORA) -> tuple[Any, threading.Lock]:
        """A pipeline, and the lock of its turns."""
        key = (model, lora)
        found = self._look_up(key)
        if found is not None:
            return found
        with self._load_lock:
            found = self._look_up(key)  # another request may have loaded it meanwhile
            if found is not None:
                return found
            pipeline = self._load(model) if lora == NO_LORA else self._with_lora(model, lora)
            made = (pipeline, threading.Lock())
            with self._kept_lock:
                self._kept[key] = made
                while len(self._kept) > self.capacity:
                    self._kept.popitem(last=False)
            return made

    def _look_up(self, key: tuple[str, str]) -> tuple[Any, threading.Lock] | None:
        with self._kept_lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _load(self, model: str) -> Any:
        described = self.models[model]
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        pipeline = getattr(diffusers_prx, described.class_name).from_pretrained(described.source, dtype=dtype)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.device)

    def _with_lora(self, model: str, lora: str) -> Any:
        base, _ = self.get(model)
        pipeline = copy.copy(base)
        pipeline.register_modules(transformer=copy.deepcopy(base.transformer))
        file = self.loras[lora]
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=_ADAPTER)
        return pipeline
