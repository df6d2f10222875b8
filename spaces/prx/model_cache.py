"""Models and LoRAs: finding them, and keeping a few in memory.

Several requests may draw with one pipeline at the same time: each call has its own scheduler and state. A LoRA changes
weights that all calls share. So each LoRA in use has its own copy of the transformer (text encoder and VAE stay
shared), and requests for one LoRA take turns, since their LoRA weights may differ. Requests without a LoRA never wait
for them. `CAPACITY` bounds the memory of the copies.
"""

import copy
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

import diffusers_prx
from diffusers_prx.pipelines.check_inputs import DEFAULT_GUIDANCE_SCALE, check_guidance
from diffusers_prx.pipelines.presets import DEFAULT_STEPS, PRESETS, check_preset_steps, complete_preset_steps
from diffusers_prx.resolution_bins import RESOLUTION_BINS
from settings import NO_LORA, format_size

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
PIPELINE_CLASSES = ("PRXPipeline", "PRXPixelPipeline")
COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "transformer")  # and "vae" in `PRXPipeline`
# on offer where there is a GPU and `PRX_HUB_MODELS` is not set
HUB_MODELS = ("Photoroom/prx-512-t2i-sft", "Photoroom/prxpixel-t2i")
# listed first; the page opens on the first model
PREFERRED_MODELS = ("quickstart", "prx-scenes-small")
CAPACITY = 3  # pipelines: two models to compare, and one with a LoRA
MAX_SIDE = 4096  # pixels
LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTER_NAME = "lora"
STUDENT_NAME = "student"


class Stopped(Exception):
    """The request was canceled."""


@dataclass(frozen=True)
class ModelInfo:
    """Description of a saved pipeline.

    Args:
        name: name on the page.
        source: folder or Hub id.
        class_name: one of `PIPELINE_CLASSES`.
        sizes: sizes that it was trained at, see `format_size`.
        default_size: one of `sizes`.
        preset_steps: number of steps of each preset that is faster than those before it.
        preset_guidance: guidance of each of them.
        student: file of the adapter that draws "fast", distilled from this model; or None.
    """

    name: str
    source: str
    class_name: str
    sizes: tuple[str, ...]
    default_size: str
    preset_steps: Mapping[str, int]
    preset_guidance: Mapping[str, float]
    student: Path | None = None


def find_models() -> dict[str, ModelInfo]:
    """Return the available models by name, `PREFERRED_MODELS` first; print those that cannot be read.

    Searches the folders in `PRX_MODELS` (separated as in PATH), or outputs/ and model_cards/ of the repository, and
    their subfolders, for model_index.json. Adds the Hub ids in `PRX_HUB_MODELS` (separated by commas), or `HUB_MODELS`
    where there is a GPU. An adapter in the same folders whose card says so draws "fast" of its model.
    """
    named = os.environ.get("PRX_MODELS")
    roots = [_expand(root) for root in named.split(os.pathsep) if root] if named is not None else []
    if named is None and (REPOSITORY / "pyproject.toml").is_file():  # a Space has no repository around it
        roots = [REPOSITORY / "outputs", REPOSITORY / "model_cards"]
    sources: dict[str, str] = {}
    adapters = []
    for root in roots:
        for folder in [root, *_subfolders(root)]:
            if os.path.isfile(folder / "model_index.json"):  # Path.is_file raises in a folder that cannot be read
                name = folder.name if folder.name not in sources else f"{root.name}/{folder.name}"
                sources[name] = str(folder)
            elif os.path.isfile(folder / LORA_FILE):
                adapters.append(folder)
    hub = os.environ.get("PRX_HUB_MODELS")
    listed = HUB_MODELS if torch.cuda.is_available() else ()
    names = listed if hub is None else tuple(name.strip() for name in hub.split(",") if name.strip())
    sources.update({name: name for name in names})
    models = {}
    for name in sorted(sources, key=lambda name: PREFERRED_MODELS.index(name) if name in PREFERRED_MODELS else 99):
        try:
            models[name] = read_model_info(name, sources[name])
        except Exception as error:  # one broken folder must not stop the page
            report_skipped(sources[name], error)
    for folder in adapters:
        try:
            add_student(models, folder)
        except ValueError as error:
            report_skipped(str(folder), error)
    return models


def add_student(models: dict[str, ModelInfo], folder: Path) -> None:
    """Make a few-step adapter "fast" of the model that `demo` in its card names, if that is on offer.

    Raises:
        ValueError: if the card gives no number of steps.
    """
    demo = read_card(str(folder)).get("demo")
    base = demo.get("fast_for") if isinstance(demo, Mapping) else None
    for name, model in models.items():
        if base in (name, model.source, os.path.basename(model.source)):
            steps = faster_presets({**model.preset_steps, **check_preset_steps({"fast": demo.get("steps")})})
            guidance = {preset: 1.0 if preset == "fast" else model.preset_guidance[preset] for preset in steps}
            student = folder / LORA_FILE
            models[name] = replace(model, preset_steps=steps, preset_guidance=guidance, student=student)


def faster_presets(steps: Mapping[str, int]) -> dict[str, int]:
    """Return the presets that take fewer steps than those before them."""
    offered: dict[str, int] = {}
    for name in PRESETS:
        if name in steps and steps[name] < min(offered.values(), default=steps[name] + 1):
            offered[name] = steps[name]
    return offered


def read_card(source: str) -> dict[str, Any]:
    """Return the front matter of the card in a folder or on the Hub; {} and a printed line without one."""
    try:
        file = Path(source, "README.md") if os.path.isdir(source) else source
        return dict(ModelCard.load(file).data.to_dict())
    except Exception as error:  # no card, no network, or broken front matter: of many kinds
        print(f"No card of {os.path.basename(source)} could be read ({type(error).__name__}): it has no examples.")
        return {}


def _expand(text: str) -> Path:
    return Path(os.path.expandvars(text)).expanduser()


def _subfolders(root: Path) -> list[Path]:
    try:
        return sorted(folder for folder in root.iterdir() if folder.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        report_skipped(str(root), error)
        return []


def report_skipped(source: str, error: Exception) -> None:
    """Print a model that is skipped, and why."""
    kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
    print(f"Skipped {source}: {kind}{error}")


def read_model_info(name: str, source: str) -> ModelInfo:
    """Read the model_index.json of a saved pipeline, without loading its weights.

    Models of a resolution with aspect-ratio bins are offered at every bin, others at their training size only.

    Raises:
        OSError: if the file does not exist, or the Hub cannot be reached.
        ValueError: if it is not a PRX pipeline, or is incomplete.
    """
    try:
        config = DiffusionPipeline.load_config(source)
    except (TypeError, AttributeError, RecursionError):  # JSON that is not an object
        config = None
    if not isinstance(config, Mapping):
        raise ValueError("model_index.json is not a JSON object.")
    class_name = config.get("_class_name")
    if class_name not in PIPELINE_CLASSES:
        raise ValueError(
            f"`_class_name` in model_index.json is {class_name!r}; accepted: {', '.join(PIPELINE_CLASSES)}."
        )
    side = config.get("default_sample_size") or getattr(diffusers_prx, class_name).default_resolution
    if type(side) is not int or not 1 <= side <= MAX_SIDE:
        raise ValueError(
            f"`default_sample_size` in model_index.json is {side!r}; accepted: whole numbers of pixels from 1 to "
            f"{MAX_SIDE}."
        )
    for component in COMPONENTS if class_name == "PRXPixelPipeline" else (*COMPONENTS, "vae"):
        entry = config.get(component)
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(name, str) for name in entry):
            raise ValueError(f"`{component}` in model_index.json is {entry!r}; accepted: [library, class].")
        if os.path.isdir(source) and not os.path.isdir(os.path.join(source, component)):
            raise ValueError(f"model_index.json lists {component}, which is not a folder: save the model again.")
    sizes = [format_size(*size) for size in RESOLUTION_BINS.get(side, {"1.0": (side, side)}).values()]
    prediction_type = config.get("prediction_type") or getattr(diffusers_prx, class_name).default_prediction_type
    if prediction_type not in DEFAULT_STEPS:
        raise ValueError(
            f"`prediction_type` in model_index.json is {prediction_type!r}; accepted: {', '.join(DEFAULT_STEPS)}."
        )
    steps = faster_presets(complete_preset_steps(config.get("preset_steps"), prediction_type))
    scale = config.get("preset_guidance_scale")
    scale = DEFAULT_GUIDANCE_SCALE if scale is None else check_guidance(scale, "preset_guidance_scale")
    guidance = dict.fromkeys(steps, max(1.0, scale))
    return ModelInfo(name, source, class_name, tuple(sizes), format_size(side, side), steps, guidance)


def find_loras() -> dict[str, Path]:
    """Return LoRA files by name, from `PRX_LORAS` or loras/ in this folder: *.safetensors or */`LORA_FILE`."""
    root = _expand(os.environ.get("PRX_LORAS") or str(HERE / "loras"))
    files = {file.stem: file for file in sorted(root.glob("*.safetensors"))}
    return files | {file.parent.name: file for file in sorted(root.glob(f"*/{LORA_FILE}"))}


class ModelCache:
    """Least-recently-used cache of pipelines, by model, LoRA and student; loads them on first use.

    An evicted pipeline stays in memory until the requests that draw with it have ended.

    Args:
        models: available models, by name.
        loras: files of the available LoRAs, by name.
        capacity: number of pipelines kept.
    """

    def __init__(self, models: Mapping[str, ModelInfo], loras: Mapping[str, Path], capacity: int = CAPACITY):
        self.models = models
        self.loras = loras
        self.capacity = capacity
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._pipelines: OrderedDict[tuple[str, str, bool], tuple[Any, threading.Lock]] = OrderedDict()
        self._lock = threading.Lock()
        self._load_lock = threading.RLock()  # a model that two requests want is loaded once

    @contextmanager
    def lend(
        self, model: str, lora: str, lora_weight: float, stop: threading.Event, preset: str = "exact"
    ) -> Iterator[Any]:
        """Lend a pipeline for a preset; one with a LoRA is lent to one request at a time.

        Raises:
            Stopped: if `stop` is set while other requests use the LoRA.
            OSError, ValueError: if the model or the LoRA cannot be loaded.
        """
        is_student = preset == "fast" and self.models[model].student is not None
        pipeline, lora_lock = self.get(model, lora, is_student)
        if lora == NO_LORA:
            yield pipeline
            return
        while not lora_lock.acquire(timeout=0.1):
            if stop.is_set():
                raise Stopped
        try:
            student = [STUDENT_NAME] if is_student else []
            pipeline.set_adapters([ADAPTER_NAME, *student], [lora_weight, *(1.0 for _ in student)])
            yield pipeline
        finally:
            lora_lock.release()

    def get(self, model: str, lora: str = NO_LORA, is_student: bool = False) -> tuple[Any, threading.Lock]:
        """Return a pipeline, and the lock that its requests with a LoRA take."""
        key = (model, lora, is_student)
        entry = self._look_up(key)
        if entry is not None:
            return entry
        with self._load_lock:
            entry = self._look_up(key)  # another request may have loaded it meanwhile
            if entry is not None:
                return entry
            plain = lora == NO_LORA and not is_student
            pipeline = self._load(model) if plain else self._load_with_adapters(model, lora, is_student)
            entry = (pipeline, threading.Lock())
            with self._lock:
                self._pipelines[key] = entry
                while len(self._pipelines) > self.capacity:
                    self._pipelines.popitem(last=False)
            return entry

    def _look_up(self, key: tuple[str, str, bool]) -> tuple[Any, threading.Lock] | None:
        with self._lock:
            if key in self._pipelines:
                self._pipelines.move_to_end(key)
            return self._pipelines.get(key)

    def _load(self, model: str) -> Any:
        info = self.models[model]
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        pipeline = getattr(diffusers_prx, info.class_name).from_pretrained(info.source, dtype=dtype)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.device)

    def _load_with_adapters(self, model: str, lora: str, is_student: bool) -> Any:
        base, _ = self.get(model)
        info = self.models[model]
        pipeline = copy.copy(base)
        pipeline.register_modules(transformer=copy.deepcopy(base.transformer))
        files = {} if lora == NO_LORA else {ADAPTER_NAME: self.loras[lora]}
        if is_student and info.student is not None:
            files[STUDENT_NAME] = info.student
            # a distilled network draws its own number of steps with its own scheduler, see `apply_preset`
            pipeline.register_to_config(preset_steps=dict.fromkeys(PRESETS, info.preset_steps["fast"]))
        for name, file in files.items():
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
        return pipeline
