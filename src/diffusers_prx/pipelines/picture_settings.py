"""Pictures that say how they were made: the settings of a call as JSON in the picture's metadata."""

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

KEY = "prx"  # in `image.info`, and as PNG text
# EXIF: the tag of a user's comment, in the part for the camera's settings, with the name of its characters in front
EXIF_PART, USER_COMMENT, ASCII = 0x8769, 0x9286, b"ASCII\0\0\0"
LONGEST_COMMENT = 65_000  # bytes of a JPEG comment


def find_seeds(generator: torch.Generator | list[torch.Generator] | None, count: int) -> list[int | None]:
    """Return the seed of each of B images; None if there is none that draws this image again.

    One generator for all images counts as the seed of the first. A generator that has drawn before has no seed.
    """
    if generator is None:
        return [None] * count
    seeds: list[int | None] = []
    for entry in generator if isinstance(generator, list) else [generator] * count:
        fresh = torch.Generator(entry.device).manual_seed(entry.initial_seed())
        seeds.append(entry.initial_seed() if torch.equal(fresh.get_state(), entry.get_state()) else None)
    return seeds


def describe_model(pipeline: Any) -> dict[str, Any]:
    """Return what of a pipeline decides about its pictures: names and versions. Of a folder only its name is told."""
    source = str(pipeline.config.get("_name_or_path") or "")
    is_folder = os.path.isabs(source) or os.path.isdir(source)
    schedule = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    return {
        "model": Path(source).name if is_folder else source,
        "pipeline": type(pipeline).__name__,
        "scheduler": {"class": type(pipeline.scheduler).__name__, **schedule},
        "versions": {name: version(name) for name in ("diffusers-prx", "diffusers")} | {"torch": torch.__version__},
    }


def attach_settings(
    pipeline: Any, images: list[Image.Image], prompts: Any, negatives: Any, seeds: list[int | None], **settings: Any
) -> None:
    """Put the settings of a call into `info["prx"]` of its images, as JSON.

    Args:
        pipeline: pipeline that drew.
        images: B images, in the order p0, p0, p1, p1.
        prompts, negatives: a text for all, or a list of P; None if unknown.
        seeds: result of `find_seeds`. With several images of one seed, `image_of_batch` says which one it is.
        settings: arguments of the call that all images have in common; None is left out.
    """
    shared = {name: value for name, value in settings.items() if value is not None}
    for name in shared.keys() & {"sigmas", "timesteps"}:
        shared[name] = [float(level) for level in shared[name]]
    if guider := shared.get("guider"):
        shared["guider"] = {"class": type(guider).__name__, **guider.config}
    if adapters := pipeline.get_active_adapters():
        shared["adapters"] = adapters
    shared.update(describe_model(pipeline))
    one_seed = len(images) > 1 and len(set(seeds)) == 1 and seeds[0] is not None
    for index, (image, seed) in enumerate(zip(images, seeds)):
        own: dict[str, Any] = {"prompt": _entry(prompts, index, len(images)), "seed": seed}
        own["negative_prompt"] = _entry(negatives, index, len(images))
        if one_seed:
            own["image_of_batch"] = [index, len(images)]
        text = json.dumps({**own, **shared}, default=str)
        image.info[KEY] = text
        if len(text) <= LONGEST_COMMENT:
            image.info["comment"] = text.encode()  # the one entry that PIL writes by itself, in JPEG


def _entry(texts: Any, index: int, count: int) -> str | None:
    """Return the text of image `index` out of a text for all of them, or a list that divides them evenly."""
    return texts[index * len(texts) // count] if isinstance(texts, list) else texts


def save_with_settings(image: Image.Image, path: str | os.PathLike, **kwargs: Any) -> None:
    """Save a picture with its settings, which `image.save` alone writes only into JPEG files.

    PNG files have them as text (`prx`) and, as JPEG, WebP, TIFF and AVIF files, as the EXIF comment of the user.

    Args:
        image: picture of a pipeline.
        path: file to write; its ending decides about the format.
        kwargs: other arguments of `Image.save`.

    Raises:
        ValueError: if the picture has no settings.

    Example:
        >>> save_with_settings(pipe("a red cat").images[0], "cat.png")
        >>> read_settings("cat.png")["prompt"]
        'a red cat'
    """
    settings = read_settings(image)
    if settings is None:
        raise ValueError(
            "`image` has no settings: it must be a picture of a pipeline, drawn without `settings_in_image=False`."
        )
    text = json.dumps(settings)
    exif = Image.Exif()
    exif.load(image.getexif().tobytes())
    # assigned as a whole: Pillow 10 does not write what was only put into the result of `get_ifd`
    exif[EXIF_PART] = exif.get_ifd(EXIF_PART) | {USER_COMMENT: ASCII + text.encode("ascii")}
    metadata = PngInfo()
    metadata.add_text(KEY, text)
    image.save(path, **{"exif": exif.tobytes(), "pnginfo": metadata, **kwargs})


def read_settings(image: Image.Image | str | os.PathLike) -> dict[str, Any] | None:
    """Return the settings that a picture was made with, or None if it has none.

    Args:
        image: picture, or a file.

    Example:
        >>> settings = read_settings("cat.png")
        >>> settings["prompt"], settings["seed"]
    """
    if not isinstance(image, Image.Image):
        with Image.open(image) as opened:
            return read_settings(opened)
    comment = image.getexif().get_ifd(EXIF_PART).get(USER_COMMENT, b"")
    for text in (image.info.get(KEY), comment, image.info.get("comment")):
        if isinstance(text, bytes):
            text = text.removeprefix(ASCII).decode("ascii", "ignore")
        try:
            settings = json.loads(text or "")
        except ValueError:
            continue
        if isinstance(settings, dict):
            return settings
    return None
