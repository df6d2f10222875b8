"""Drawing one picture per prompt with any pipeline, on any number of processes, and keeping them on disk.

What is on disk is not drawn again: a run that was killed goes on, and another metric of the same pictures costs no
drawing. The noise of a picture follows the index of its prompt, and batches are always cut at the same places, so that
neither the number of processes nor a kill changes a bit.
"""

import hashlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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

# prompts, and the index of each -> uint8 images (B, H, W, 3)
DrawIndexed = Callable[[Sequence[str], Sequence[int]], np.ndarray]
# (index, prompt)
Prompt = tuple[int, str]

DTYPES = ("float32", "bfloat16", "float16")
# what a pipeline's call must take to be drawn from
NEEDED = ("prompt", "height", "width", "num_inference_steps", "guidance_scale", "generator", "output_type")


def load_pipeline(
    name_or_path: str, revision: str | None = None, stock: bool = False, dtype: str | None = None
) -> Any:
    """A saved pipeline, on the CPU.

    Args:
        name_or_path: a folder or a Hub id.
        revision: on the Hub.
        stock: load it with diffusers' own class: stock PRX, or any other pipeline from text to image.
        dtype: of the weights; None: what `from_pretrained` makes of them.

    Raises:
        ValueError: if there is none, it is no PRX pipeline and not `stock`, or it cannot be asked for a text's image.
    """
    ours = {"PRXPipeline": PRXPipeline, "PRXPixelPipeline": PRXPixelPipeline}
    options: dict[str, Any] = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    options |= {} if revision is None else {"revision": revision}
    try:
        name = DiffusionPipeline.load_config(name_or_path, revision=revision).get("_class_name")
    except OSError as error:
        raise ValueError(f"{name_or_path} holds no pipeline: {error}") from error
    if not stock and name not in ours:
        raise ValueError(f"{name_or_path} holds a {name}; accepted: {sorted(ours)}, and others as stock.")
    pipeline: Any = (DiffusionPipeline if stock else ours[name]).from_pretrained(name_or_path, **options)
    lacking = sorted(set(NEEDED) - set(inspect.signature(pipeline.__call__).parameters))
    if lacking:
        raise ValueError(f"{name_or_path} holds a {name}, whose call does not take {lacking}.")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def default_resolution(pipeline: Any) -> int:
    """The side in pixels at which a pipeline draws by itself; raises `ValueError` if it does not say."""
    side = pipeline.config.get("default_sample_size") or getattr(pipeline, "default_resolution", None)
    if side is None:
        raise ValueError(f"{type(pipeline).__name__} states no resolution: give `resolution`.")
    return side


def pipeline_draw(
    pipeline: Any,
    resolution: int,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int,
    fixed_noise: bool = False,
) -> Callable[..., np.ndarray]:
    """A function draw(prompts, indices=None) that draws prompts with a pipeline, in batches.

    Each picture has a noise of its own, that of `seed` plus its index; without indices it is its place. `fixed_noise`
    takes the place in the batch instead: every batch gets the same noise, as in the study's public code.
    """
    options: dict[str, Any] = {}
    if "use_resolution_binning" in inspect.signature(pipeline.__call__).parameters:
        options["use_resolution_binning"] = False  # draw at this resolution, and do not resize from another

    def draw(prompts: Sequence[str], indices: Sequence[int] | None = None) -> np.ndarray:
        pictures = []
        indices = range(len(prompts)) if indices is None else indices
        for first in range(0, len(prompts), batch_size):
            part = list(prompts[first : first + batch_size])
            places = range(len(part)) if fixed_noise else indices[first : first + batch_size]
            images = pipeline(
                prompt=part,
                height=resolution,
                width=resolution,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(seed + place) for place in places],
                output_type="np",
                **options,
            ).images
            if broken := sum(not np.isfinite(image).all() for image in images):
                logger.warning(f"{broken} of {len(part)} pictures have pixels that are not finite; these are black.")
            pictures.append((np.nan_to_num(images, nan=0.0, posinf=0.0, neginf=0.0) * 255).round().astype(np.uint8))
        return np.concatenate(pictures)

    return draw


class PictureFolder:
    """Pictures as PNG files, by the index of their prompt and a hash of it: another prompt is another picture.

    Args:
        folder: of pictures that were drawn in one way; made when it is not there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, prompt: Prompt) -> Path:
        index, text = prompt
        return self.folder / f"{index:07d}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}.png"

    def write(self, prompt: Prompt, image: np.ndarray) -> None:
        """Keep a picture (H, W, 3), uint8, whole or not at all."""
        with atomic_write(self.path(prompt)) as file:
            PIL.Image.fromarray(image).save(file, format="PNG")

    def has(self, prompt: Prompt) -> bool:
        """True if there is a picture and all its checksums are right; one that is damaged is drawn again."""
        path = self.path(prompt)
        try:
            with PIL.Image.open(path) as image:
                image.verify()
        except FileNotFoundError:
            return False
        except Exception as error:  # Pillow raises many kinds
            logger.warning(f"{path} is damaged ({error}) and is drawn again.")
            return False
        return True

    def read(self, prompt: Prompt) -> np.ndarray:
        """A picture (H, W, 3), uint8."""
        with PIL.Image.open(self.path(prompt)) as image:
            return np.array(image)


def share_batches(items: Sequence[Any], batch_size: int, state: PartialState) -> list[Sequence[Any]]:
    """The batches of this process: cut at the same places for any number of them, and dealt out in turn."""
    batches = [items[first : first + batch_size] for first in range(0, len(items), batch_size)]
    return batches[state.process_index :: state.num_processes]


def draw_missing(
    draw: DrawIndexed, pictures: PictureFolder, prompts: Sequence[Prompt], batch_size: int, label: str
) -> None:
    """Draw the prompts of which there is no picture yet; then wait until every process is done.

    Args:
        draw: see `pipeline_draw`.
        pictures: where they go.
        prompts: all of them, of all processes.
        batch_size: a batch that is not whole on disk is drawn as a whole.
        label: for the progress bar.
    """
    state = PartialState()
    mine = share_batches(prompts, batch_size, state)
    missing = [batch for batch in mine if not all(map(pictures.has, batch))]
    title = label if len(missing) == len(mine) else f"{label} ({len(mine) - len(missing)} of {len(mine)} were there)"
    for batch in tqdm(missing, desc=title, unit="batch", disable=not missing):
        indices, texts = zip(*batch)
        for prompt, image in zip(batch, draw(texts, indices)):
            pictures.write(prompt, image)
    state.wait_for_everyone()
