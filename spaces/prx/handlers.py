"""Handlers that all tabs share: requests, drawing, values of the controls, and pictures of a session."""

import json
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image

import page_parts as parts
from diffusers_prx.pipelines.check_inputs import DEFAULT_GUIDANCE_SCALE
from diffusers_prx.pipelines.picture_settings import KEY
from drawing import Edit, Update, draw
from model_cache import ModelCache, ModelInfo
from pictures import open_picture
from settings import NO_LORA, Request, parse_request
from showcase import read_showcase

REQUEST_FIELDS = tuple(field.name for field in fields(Request))  # also the order of the inputs of `draw`
HISTORY = 12  # pictures of a session that can be found again


def seconds_needed(request: Request, edit: Edit | None = None) -> int:
    """Return the ZeroGPU time to request: a generous estimate, not measured there."""
    height, width = request.height_width
    forwards = request.steps * request.images * (2 if request.guidance_scale > 1 else 1)
    return min(120, 15 + round(0.06 * forwards * height * width / 512**2))


def to_user_error(error: Exception, task: str = "Drawing") -> gr.Error:
    """Return the sentence that the user reads; print the traceback unless the request caused the error."""
    if isinstance(error, gr.Error):  # a sentence already, ours or ZeroGPU's; it is a ValueError too
        return error
    if not isinstance(error, ValueError):
        traceback.print_exception(error)
    if isinstance(error, ValueError):
        text = str(error).splitlines()[0][:400]
    elif isinstance(error, torch.OutOfMemoryError):
        text = "The GPU ran out of memory: choose fewer images or a smaller size."
    elif isinstance(error, OSError):
        text = "The model or the LoRA could not be loaded. Choose another one."
    else:
        text = f"{task} failed because of an error on the server; its log has the details."
    return gr.Error(escape(text), print_exception=False, title="Not drawn")


@dataclass(frozen=True)
class Picture:
    """A picture that was drawn in this session.

    Args:
        file: file in gradio's cache.
        request: request that draws it alone.
        is_edit: True if it was made from another picture, so that the request does not draw it again.
    """

    file: str
    request: Request
    is_edit: bool = False

    def table(self) -> str:
        return parts.settings_table(self.request, has_link=not self.is_edit)


class Handlers:
    """Functions that the events of several tabs call.

    Args:
        models: models on offer, by name; the page opens on the first.
        cache: cache over the same models, and the LoRAs.
        gpu: decorator of ZeroGPU, or None.
    """

    def __init__(self, models: Mapping[str, ModelInfo], cache: ModelCache, gpu: Callable[..., Any] | None = None):
        self.models = models
        self.sizes = {name: model.sizes for name, model in models.items()}
        self.loras = list(cache.loras)
        self.initial_model = next(iter(models.values()))
        self.showcases = {name: read_showcase(model) for name, model in models.items()}

        def draw_in_worker(request: Request, edit: Edit | None = None) -> Iterator[Update]:
            # converted here: from a ZeroGPU worker only gr.Error arrives whole, of other errors the class name
            try:
                yield from draw(request, cache, edit)
            except Exception as error:
                raise to_user_error(error) from error

        self._draw_in_worker = draw_in_worker if gpu is None else gpu(duration=seconds_needed)(draw_in_worker)

    @property
    def first_example(self) -> tuple[str, str] | None:
        """Prompt and picture that the page opens with, or None."""
        return next(iter(self.showcases[self.initial_model.name].examples), None)

    def draw(self, request: Request, edit: Edit | None = None) -> Iterator[Update]:
        try:
            yield from self._draw_in_worker(request, edit)
        except Exception as error:  # from ZeroGPU itself
            raise to_user_error(error) from None

    def parse(self, values: Mapping[str, Any]) -> Request:
        try:
            return parse_request(values, self.sizes, self.loras)
        except ValueError as error:
            raise to_user_error(error) from error

    def show(self, request: Request, edit: Edit | None = None) -> Iterator[tuple[Any, ...]]:
        """Draw a request, or change a picture: status, preview, gallery, settings of the first picture, pictures."""
        pixelated = parts.is_pixelated(request.size)
        preview = pictures_before = gr.skip()
        for update in self.draw(request, edit):
            if update.images:
                pictures = [
                    Picture(save_picture(image, request.for_image(index)), request.for_image(index), edit is not None)
                    for index, image in enumerate(update.images)
                ]
                status = parts.status_line(f"Done in {update.seconds:.1f} seconds.")
                yield status, gr.HTML("", visible=False), show_pictures(pictures), pictures[0].table(), pictures
                return
            if update.preview:
                preview = gr.HTML(parts.preview(update, pixelated), visible=True)
                pictures_before = gr.Gallery(visible=False)
            yield parts.progress_bar(update), preview, pictures_before, "", []
            preview = pictures_before = gr.skip()

    # --- values of the controls

    def defaults(self) -> dict[str, Any]:
        model = self.initial_model
        values = {"prompt": "", "negative_prompt": "", "model": model.name, "preset": "exact", "size": None}
        values |= {"steps": None, "guidance_scale": DEFAULT_GUIDANCE_SCALE, "seed": 0, "images": 1}
        return {**values, "lora": NO_LORA, "lora_weight": 1.0}

    def parse_restored(self, values: dict[str, Any]) -> Request:
        """Check the values of a link or a picture; size and steps that they lack are those of the model."""
        model = self.models.get(values["model"])
        if model is not None:
            values["size"] = values["size"] or model.default_size
            values["steps"] = model.preset_steps.get(values["preset"]) if values["steps"] is None else values["steps"]
        return parse_request(values, self.sizes, self.loras)

    def _names(self) -> tuple[str, ...]:
        return REQUEST_FIELDS if self.loras else REQUEST_FIELDS[:-2]

    def unchanged(self) -> list[Any]:
        return [gr.skip()] * (len(self._names()) + 1)

    def fill(self, request: Request) -> list[Any]:
        """Return the values of the controls for a request; its seed is kept."""
        model = self.models[request.model]
        filled = [getattr(request, name) for name in self._names()]
        filled[REQUEST_FIELDS.index("size")] = gr.Dropdown(list(model.sizes), value=request.size)
        filled[REQUEST_FIELDS.index("preset")] = gr.Radio(**preset_choice(model, request.preset))
        return [*filled, True]

    def change_preset(self, preset: str, name: str) -> tuple[int, Any]:
        """Return steps and guidance of a preset; if all have the same guidance, yours stays."""
        model = self.models[name]
        differ = len(set(model.preset_guidance.values())) > 1
        return model.preset_steps[preset], model.preset_guidance[preset] if differ else gr.skip()

    def change_model(self, name: str, preset: str = "exact") -> tuple[Any, int, float]:
        """Return presets of a model, and the steps and guidance of one."""
        model = self.models[name]
        radio = preset_choice(model, preset)
        return gr.Radio(**radio), model.preset_steps[radio["value"]], model.preset_guidance[radio["value"]]


def preset_choice(model: ModelInfo, preset: str) -> dict[str, Any]:
    """Return choices and value of a radio of presets; "exact" draws like one that the model does not offer."""
    choices = [(f"{parts.PRESET_WORDS[name]} ({steps} steps)", name) for name, steps in model.preset_steps.items()]
    return {"choices": choices, "value": preset if preset in model.preset_steps else "exact"}


def save_picture(image: Image.Image, request: Request) -> str:
    """Save a picture with its settings and link in gradio's cache, which forgets it later; return its file."""
    settings = json.loads(image.info[KEY]) | {"link": request.link()}
    image.info[KEY] = json.dumps(settings)
    return save_pil_to_cache(image, cache_dir=get_upload_folder(), name=f"seed-{request.seed}", format="png")


def open_upload(value: dict[str, Any]) -> Image.Image:
    """Open a picture that was uploaded, or drawn here. gradio checks the paths of values in its own form only.

    Raises:
        ValueError: if it is another file, or no picture.
    """
    file = Path(str(value.get("path"))).resolve()
    if not file.is_relative_to(Path(get_upload_folder()).resolve()):
        raise ValueError("The picture was not uploaded here.")
    return open_picture(file)


def show_pictures(pictures: list[Picture]) -> gr.Gallery:
    """Return the gallery with pictures: one, or a grid of two columns."""
    classes = ["picture", parts.picture_class(pictures[0].request.size)]
    captioned = [(picture.file, f"Seed {picture.request.seed}") for picture in pictures]
    columns = min(2, len(pictures))
    return gr.Gallery(captioned, visible=True, elem_classes=classes, columns=columns, selected_index=None)


def settings_of_selected(event: gr.SelectData, pictures: list[Picture]) -> Any:
    # an example picture has none
    return pictures[event.index].table() if event.index < len(pictures) else gr.skip()


def add_to_history(drawn: list[Picture], history: list[Picture]) -> tuple[Any, ...]:
    """Return the pictures of the session, and their gallery."""
    history = [*drawn, *history][:HISTORY]
    captioned = [(picture.file, picture.request.prompt) for picture in history]
    return history, gr.Gallery(captioned, visible=True)
