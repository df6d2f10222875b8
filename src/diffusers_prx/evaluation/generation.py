"""Generation of one image per prompt with any pipeline, on any number of processes, stored on disk.

Existing images are reused: an interrupted evaluation resumes, and another metric generates nothing. The noise of an
image follows from the index of its prompt, and batches have fixed boundaries, so that neither the number of processes
nor an interruption changes a bit.
"""

import hashlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL.Image
import torch
from accelerate import PartialState
from accelerate.utils import tqdm
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from ..files import atomic_write
from ..pipelines.pipeline_prx import PRXPipeline
from ..pipelines.pipeline_prx_pixel import PRXPixelPipeline

logger = logging.get_logger(__name__)

T = TypeVar("T")

# (prompts, indices) -> uint8 images (B, H, W, 3)
DrawFunction = Callable[[Sequence[str], Sequence[int]], np.ndarray]
# (index, text)
Prompt = tuple[int, str]

DTYPES = ("float32", "bfloat16", "float16")
# Arguments that the call of a pipeline must accept.
REQUIRED_ARGUMENTS = ("prompt", "height", "width", "num_inference_steps", "guidance_scale", "generator", "output_type")


def load_pipeline(
    name_or_path: str, revision: str | None = None, stock: bool = False, dtype: str | None = None
) -> DiffusionPipeline:
    """Load a saved pipeline on the CPU.

    Args:
        name_or_path: folder or Hub id.
        revision: revision on the Hub.
        stock: load it with diffusers' own class: stock PRX, or any other text-to-image pipeline.
        dtype: dtype of the weights; None: default of `from_pretrained`.

    Raises:
        ValueError: if there is no pipeline, it is not a PRX pipeline and `stock` is False, or its call does not accept
            `REQUIRED_ARGUMENTS`.

    Example:
        >>> from diffusers_prx.evaluation.generation import load_pipeline
        >>> pipeline = load_pipeline("Photoroom/prx-512-t2i-sft")
    """
    classes = {"PRXPipeline": PRXPipeline, "PRXPixelPipeline": PRXPixelPipeline}
    options: dict[str, Any] = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    options |= {} if revision is None else {"revision": revision}
    try:
        name = DiffusionPipeline.load_config(name_or_path, revision=revision).get("_class_name")
    except OSError as error:
        raise ValueError(f"`model` is {name_or_path!r}, which is not a pipeline: {error}") from error
    if not stock and name not in classes:
        raise ValueError(
            f"`model` is {name_or_path!r}, a {name}; accepted: {sorted(classes)}. Pass `--stock` for other pipelines."
        )
    pipeline = (DiffusionPipeline if stock else classes[name]).from_pretrained(name_or_path, **options)
    missing = sorted(set(REQUIRED_ARGUMENTS) - set(inspect.signature(pipeline.__call__).parameters))
    if missing:
        raise ValueError(f"`model` is {name_or_path!r}, a {name}, whose call does not accept {missing}.")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def default_resolution(pipeline: DiffusionPipeline) -> int:
    """Return the default side length of a pipeline in pixels. Raises `ValueError` if it has none."""
    side = pipeline.config.get("default_sample_size") or getattr(pipeline, "default_resolution", None)
    if side is None:
        raise ValueError(f"{type(pipeline).__name__} has no default resolution. Pass `--resolution`.")
    return side


def pipeline_draw(
    pipeline: DiffusionPipeline,
    resolution: int,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int,
    fixed_noise: bool = False,
) -> Callable[..., np.ndarray]:
    """Return a function draw(prompts, indices=None) that generates images in batches.

    Args:
        pipeline: text-to-image pipeline.
        resolution: side length in pixels.
        num_inference_steps: denoising steps.
        guidance_scale: scale of classifier-free guidance.
        seed: base seed; the noise of an image has the seed `seed` + index.
        batch_size: prompts per call.
        fixed_noise: use the position in the batch instead of the index: every batch has the same noise, as in the
            study's public code.
    """
    options: dict[str, Any] = {}
    if "use_resolution_binning" in inspect.signature(pipeline.__call__).parameters:
        options["use_resolution_binning"] = False  # generate at exactly this resolution

    def draw(prompts: Sequence[str], indices: Sequence[int] | None = None) -> np.ndarray:
        pictures = []
        indices = range(len(prompts)) if indices is None else indices
        for first in range(0, len(prompts), batch_size):
            part = list(prompts[first : first + batch_size])
            offsets = range(len(part)) if fixed_noise else indices[first : first + batch_size]
            images = pipeline(
                prompt=part,
                height=resolution,
                width=resolution,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(seed + offset) for offset in offsets],
                output_type="np",
                **options,
            ).images
            if broken := sum(not np.isfinite(image).all() for image in images):
                logger.warning(f"{broken} of {len(part)} images have non-finite pixels, which are set to black.")
            pictures.append((np.nan_to_num(images, nan=0.0, posinf=0.0, neginf=0.0) * 255).round().astype(np.uint8))
        return np.concatenate(pictures)

    return draw


class PictureFolder:
    """PNG files named by index and hash of their prompt.

    Args:
        folder: folder for images with the same generation settings; created if necessary.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, prompt: Prompt) -> Path:
        index, text = prompt
        return self.folder / f"{index:07d}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}.png"

    def write(self, prompt: Prompt, image: np.ndarray) -> None:
        """Write an image, uint8 (H, W, 3), atomically."""
        with atomic_write(self.path(prompt)) as file:
            PIL.Image.fromarray(image).save(file, format="PNG")

    def has(self, prompt: Prompt) -> bool:
        """True if the image exists and its checksums are valid."""
        path = self.path(prompt)
        try:
            with PIL.Image.open(path) as image:
                image.verify()
        except FileNotFoundError:
            return False
        except Exception as error:  # Pillow raises many kinds
            logger.warning(f"{path} is damaged ({error}) and will be generated again.")
            return False
        return True

    def read(self, prompt: Prompt) -> np.ndarray:
        """Read an image, uint8 (H, W, 3)."""
        with PIL.Image.open(self.path(prompt)) as image:
            return np.array(image)


def batches_of_process(items: Sequence[T], batch_size: int, state: PartialState) -> list[Sequence[T]]:
    """Return the batches of this process; their boundaries do not depend on the number of processes."""
    batches = [items[first : first + batch_size] for first in range(0, len(items), batch_size)]
    return batches[state.process_index :: state.num_processes]


def draw_missing(
    draw: DrawFunction, pictures: PictureFolder, prompts: Sequence[Prompt], batch_size: int, label: str
) -> None:
    """Generate the images that do not exist yet, then wait for all processes.

    Args:
        draw: return value of `pipeline_draw`.
        pictures: folder of the images.
        prompts: all prompts of all processes.
        batch_size: images per batch; a batch with a missing image is generated as a whole.
        label: label of the progress bar.
    """
    state = PartialState()
    batches = batches_of_process(prompts, batch_size, state)
    missing = [batch for batch in batches if not all(map(pictures.has, batch))]
    existing = len(batches) - len(missing)
    title = f"{label} ({existing} of {len(batches)} exist)" if existing else label
    for batch in tqdm(missing, desc=title, unit="batch", disable=not missing):
        indices, texts = zip(*batch)
        for prompt, image in zip(batch, draw(texts, indices)):
            pictures.write(prompt, image)
    state.wait_for_everyone()
