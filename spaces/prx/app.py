"""Gradio page for PRX, on a laptop (`make demo`) and as a Hugging Face Space."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import argparse
import json
import traceback
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import Any

try:
    from spaces import GPU  # only on ZeroGPU, where it must be imported before torch
except ImportError:
    GPU = None
import gradio as gr
import torch
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image, ImageChops, ImageOps

import page_parts as parts
from diffusers_prx import PromptEnhancer, read_settings
from diffusers_prx.pipelines.check_inputs import DEFAULT_GUIDANCE_SCALE
from diffusers_prx.pipelines.picture_settings import KEY
from drawing import CONCURRENCY, Edit, Update, draw
from model_cache import CAPACITY, ModelCache, ModelInfo, find_loras, find_models, report_skipped
from pictures import MIN_EDITOR_SIDE, enlarge, open_picture, share_image
from serving import Page, launch
from settings import (
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_LORA_WEIGHT,
    MAX_PROMPT,
    MAX_SEED,
    MAX_STEPS,
    MIN_STRENGTH,
    NO_LORA,
    Request,
    parse_prompt,
    parse_request,
    parse_strength,
    read_link,
    read_picture_settings,
)
from showcase import read_showcase

REQUEST_FIELDS = tuple(field.name for field in fields(Request))  # also the order of the inputs of `draw`
QUEUE_SIZE = 24  # waiting requests; further ones are refused
HISTORY = 12  # pictures of a session that can be found again
KEPT_SECONDS = 3600  # time after which pictures and sessions are forgotten

NO_MODEL = """# PRX
**There is no model here yet.** Do one of these, then start the demo again:

- `make quickstart` trains a small model on this machine in about ten minutes and saves it in `outputs/quickstart`;
- `PRX_MODELS=/path/to/folder` names a folder with saved pipelines (folders with a `model_index.json`);
- `PRX_HUB_MODELS=Photoroom/prx-512-t2i-sft` names models on the Hugging Face Hub, which need a GPU.
"""
CLICK_DRAW = """() => document.querySelector("#draw").click()"""
CLICK_DRAW_IF_LINKED = """(linked) => { if (linked) document.querySelector("#draw").click(); }"""
# a new seed unless it is kept, and an answer before the server has one
BEGIN = f"(seed, keep) => [keep ? seed : Math.floor(Math.random() * 2147483648), `{parts.WAITING}`]"
# a stopped request counts as failed too: "Stopped." stays
END_PROGRESS = """(status) => (status || "").includes("<progress") ? "" : status"""
COPY_LINK = """() => {
    const link = document.querySelector("#made a");
    if (!link) return "A changed picture has no link";
    navigator.clipboard.writeText(link.href);
    return "Link copied";
}"""

# events that change the page only: not queued, and no endpoints
PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}
UNQUEUED = {"queue": False, **PRIVATE}
# comes through the same stream as the steps, so after those that are on their way
AFTER_STEPS = {"concurrency_limit": None, **PRIVATE}
# all endpoints share one queue; values are not preprocessed, since `parse_request` checks them
QUEUED = {
    "concurrency_limit": CONCURRENCY,
    "concurrency_id": "draw",
    "preprocess": False,
    "show_progress": "hidden",
}


def seconds_needed(request: Request, edit: Edit | None = None) -> int:
    """Return the ZeroGPU time to request: a generous estimate, not measured there."""
    height, width = request.height_width
    forwards = request.steps * request.images * (2 if request.guidance_scale > 1 else 1)
    return min(120, 15 + round(0.06 * forwards * height * width / 512**2))


def to_user_error(error: Exception) -> gr.Error:
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
        text = "Drawing failed because of an error on the server; its log has the details."
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


class Handlers:
    """Functions that the events of the page call.

    Args:
        models: models on offer, by name; the page opens on the first.
        cache: cache over the same models, and the LoRAs.
        enhancer: function that rewrites prompts, or None.
    """

    def __init__(self, models: Mapping[str, ModelInfo], cache: ModelCache, enhancer: PromptEnhancer | None = None):
        self.models = models
        self.sizes = {name: model.sizes for name, model in models.items()}
        self.loras = list(cache.loras)
        self.initial_model = next(iter(models.values()))
        self.showcases = {name: read_showcase(model) for name, model in models.items()}
        self.enhancer = enhancer

        def draw_in_worker(request: Request, edit: Edit | None = None) -> Iterator[Update]:
            # converted here: from a ZeroGPU worker only gr.Error arrives whole, of other errors the class name
            try:
                yield from draw(request, cache, edit)
            except Exception as error:
                raise to_user_error(error) from error

        self._draw_in_worker = draw_in_worker if GPU is None else GPU(duration=seconds_needed)(draw_in_worker)

    def _draw(self, request: Request, edit: Edit | None = None) -> Iterator[Update]:
        try:
            yield from self._draw_in_worker(request, edit)
        except Exception as error:  # from ZeroGPU itself
            raise to_user_error(error) from None

    def _parse(self, values: Mapping[str, Any]) -> Request:
        try:
            return parse_request(values, self.sizes, self.loras)
        except ValueError as error:
            raise to_user_error(error) from error

    def draw_one(
        self, prompt: Any, negative_prompt: Any, model: Any, size: Any, preset: Any, steps: Any, guidance_scale: Any,
        seed: Any, images: Any, lora: Any = NO_LORA, lora_weight: Any = 1.0,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Draw 1 to 4 pictures of a prompt: status, preview, pictures, settings of the first."""
        values = (prompt, negative_prompt, model, size, preset, steps, guidance_scale, seed, images, lora, lora_weight)
        yield from self._show(self._parse(dict(zip(REQUEST_FIELDS, values))))

    def edit(
        self, picture: Any, strength: Any, prompt: Any, negative_prompt: Any, model: Any, size: Any, preset: Any,
        steps: Any, guidance_scale: Any, seed: Any, images: Any, lora: Any = NO_LORA, lora_weight: Any = 1.0,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Change a picture, where its layers are painted or everywhere: status, preview, pictures, settings."""
        values = (prompt, negative_prompt, model, size, preset, steps, guidance_scale, seed, images, lora, lora_weight)
        request = self._parse(dict(zip(REQUEST_FIELDS, values)))
        try:
            edit = read_edit(picture, parse_strength(strength), request.height_width)
        except ValueError as error:
            raise to_user_error(error) from error
        yield from self._show(request, edit)

    def _show(self, request: Request, edit: Edit | None = None) -> Iterator[tuple[Any, ...]]:
        pixelated = parts.is_pixelated(request.size)
        preview = pictures_before = gr.skip()
        for update in self._draw(request, edit):
            if update.images:
                pictures = [
                    Picture(save_picture(image, request.for_image(index)), request.for_image(index), edit is not None)
                    for index, image in enumerate(update.images)
                ]
                status = parts.status_line(f"Done in {update.seconds:.1f} seconds.")
                table = parts.settings_table(request.for_image(0), has_link=edit is None)
                yield status, gr.HTML("", visible=False), show_pictures(pictures), table, pictures
                return
            if update.preview:
                preview = gr.HTML(parts.preview(update, pixelated), visible=True)
                pictures_before = gr.Gallery(visible=False)
            yield parts.progress_bar(update), preview, pictures_before, "", []
            preview = pictures_before = gr.skip()

    def compare(
        self, prompt: Any, negative_prompt: Any, seed: Any, model: Any, preset: Any, steps: Any, guidance_scale: Any,
        second_model: Any, second_preset: Any, second_steps: Any, second_guidance_scale: Any, lora: Any = NO_LORA,
        lora_weight: Any = 1.0, second_lora: Any = NO_LORA, second_lora_weight: Any = 1.0,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Draw one prompt with one seed in two ways: status, preview, both pictures, their settings and seconds."""
        common = {"prompt": prompt, "negative_prompt": negative_prompt, "seed": seed}
        names = ("model", "preset", "steps", "guidance_scale", "lora", "lora_weight")
        requests = []
        for values in (
            (model, preset, steps, guidance_scale, lora, lora_weight),
            (second_model, second_preset, second_steps, second_guidance_scale, second_lora, second_lora_weight),
        ):
            known = isinstance(values[0], str) and values[0] in self.models
            size = self.models[values[0]].default_size if known else None
            requests.append(self._parse(common | dict(zip(names, values)) | {"size": size}))
        finished: list[Update] = []
        for side, request in zip(("Left: ", "Right: "), requests):
            pixelated = parts.is_pixelated(request.size)
            for update in self._draw(request):
                preview = gr.HTML(parts.preview(update, pixelated), visible=True) if update.preview else gr.skip()
                hidden = gr.ImageSlider(visible=False) if update.preview else gr.skip()
                yield parts.progress_bar(update, side), preview, hidden, ""
            finished.append(update)
        left, right = (update.images[0] for update in finished)
        files = [save_picture(image, request) for image, request in zip((left, right), requests)]
        classes = [picture_class(requests[0].size)]
        seconds = [update.seconds for update in finished]
        slider = gr.ImageSlider((files[0], files[1]), visible=True, elem_classes=classes)
        table = parts.comparison_table(requests, seconds)
        yield parts.status_line(parts.compared_seconds(*seconds)), gr.HTML("", visible=False), slider, table

    def enhance(self, prompt: Any) -> tuple[str, str]:
        """Rewrite a prompt as a long caption; return it with the status."""
        assert self.enhancer is not None
        try:
            [caption] = self.enhancer([parse_prompt(prompt)])
        except Exception as error:
            raise to_user_error(error) from error
        if len(caption) > MAX_PROMPT:
            return caption[:MAX_PROMPT], parts.status_line(f"The prompt was cut to {MAX_PROMPT} characters.")
        return caption, parts.status_line("The prompt has more detail now. Change it as you like, then draw.")

    def open_link(self, request: gr.Request) -> list[Any]:
        """Return "yes" if the link holds a valid request, the status, and the values of the controls."""
        if "prompt" not in request.query_params:
            return ["", "", *self._unchanged()]
        try:
            values = read_link(request.query_params, self._defaults())
            return ["yes", "", *self.fill(self._parse_restored(values))]
        except ValueError as error:  # raised, it would cover the whole page
            return ["", parts.status_line(f"The link cannot be drawn. {error}"), *self._unchanged()]

    def restore(self, file: str | None) -> list[Any]:
        """Return the status and the values of the controls that drew a picture."""
        if file is None:
            return ["", *self._unchanged()]
        try:
            settings = read_settings(open_upload({"path": file}))
            if settings is None:
                raise ValueError("It has no settings: only pictures of this page and of diffusers-prx have them.")
            model = self._model_of(settings)
            values = read_picture_settings(settings, model, self.models[model].preset_steps, self._defaults())
            request = self._parse_restored(values)
        except ValueError as error:
            text = f"The settings of the picture could not be restored. {error}"
            return [parts.status_line(text), *self._unchanged()]
        edited = " It was made from another picture, which you need too." if "strength" in settings else ""
        return [parts.status_line(f"These are the settings of your picture.{edited}"), *self.fill(request)]

    def _model_of(self, settings: Mapping[str, Any]) -> str:
        name = settings.get("model")
        for model in self.models.values():
            if name in (model.source, os.path.basename(model.source)):
                return model.name
        raise ValueError(f"Its model is {str(name)[:40]!r}; here are {', '.join(self.models)}.")

    def _defaults(self) -> dict[str, Any]:
        model = self.initial_model
        defaults = {"prompt": "", "negative_prompt": "", "model": model.name, "preset": "exact", "size": None}
        defaults |= {"steps": None, "guidance_scale": DEFAULT_GUIDANCE_SCALE, "seed": 0, "images": 1}
        return {**defaults, "lora": NO_LORA, "lora_weight": 1.0}

    def _parse_restored(self, values: dict[str, Any]) -> Request:
        model = self.models.get(values["model"])
        if model is not None:
            values["size"] = values["size"] or model.default_size
            values["steps"] = model.preset_steps.get(values["preset"]) if values["steps"] is None else values["steps"]
        return parse_request(values, self.sizes, self.loras)

    def _names(self) -> tuple[str, ...]:
        return REQUEST_FIELDS if self.loras else REQUEST_FIELDS[:-2]

    def _unchanged(self) -> list[Any]:
        return [gr.skip()] * (len(self._names()) + 1)

    def fill(self, request: Request) -> list[Any]:
        """Return the values of the controls for a request; its seed is kept."""
        filled = [getattr(request, name) for name in self._names()]
        choices = preset_choices(self.models[request.model])
        filled[REQUEST_FIELDS.index("size")] = gr.Dropdown(list(self.sizes[request.model]), value=request.size)
        filled[REQUEST_FIELDS.index("preset")] = gr.Radio(choices, value=request.preset)
        return [*filled, True]

    def find_again(self, event: gr.SelectData, history: list[Picture]) -> list[Any]:
        """Return a picture of the session, its settings, and the values of the controls."""
        picture = history[event.index]
        table = parts.settings_table(picture.request, has_link=not picture.is_edit)
        return [show_pictures([picture]), table, [picture], *self.fill(picture.request)]

    def change_model(self, name: str) -> tuple[Any, Any, int]:
        """Return sizes, presets and steps of a model."""
        model = self.models[name]
        size = gr.Dropdown(list(model.sizes), value=model.default_size, info=size_hint(model))
        return size, gr.Radio(preset_choices(model), value="exact"), model.preset_steps["exact"]

    def introduce(self, name: str) -> tuple[str, Any]:
        """Return header and example pictures of a model."""
        return parts.header(self.showcases[name]), gr.Gallery(**self.example_gallery(name))

    def example_gallery(self, name: str) -> dict[str, Any]:
        """Return settings of the gallery with the example pictures of a model."""
        examples = [(file, prompt) for prompt, file in self.showcases[name].examples]
        classes = ["thumbnails", picture_class(self.models[name].default_size)]
        return {"value": examples, "visible": bool(examples), "elem_classes": classes}

    def example_prompt(self, event: gr.SelectData, model: str) -> str:
        return self.showcases[model].examples[event.index][0]

    def change_preset(self, preset: str, model: str) -> int:
        return self.models[model].preset_steps[preset]

    def change_side(self, name: str, preset: str) -> tuple[Any, int]:
        """Return presets and steps of a model in a comparison."""
        model = self.models[name]
        return gr.Radio(preset_choices(model), value=preset), model.preset_steps[preset]


def save_picture(image: Image.Image, request: Request) -> str:
    """Save a picture with its settings and link in gradio's cache, which forgets it later; return its file."""
    settings = json.loads(image.info[KEY]) | {"link": request.link()}
    image.info[KEY] = json.dumps(settings)
    return save_pil_to_cache(image, cache_dir=get_upload_folder(), name=f"seed-{request.seed}", format="png")


def show_pictures(pictures: list[Picture]) -> gr.Gallery:
    """Return the gallery with pictures: one, or a grid of two columns."""
    classes = ["picture", picture_class(pictures[0].request.size)]
    captioned = [(picture.file, f"Seed {picture.request.seed}") for picture in pictures]
    columns = min(2, len(pictures))
    return gr.Gallery(captioned, visible=True, elem_classes=classes, columns=columns, selected_index=None)


def read_edit(value: Any, strength: float, height_width: tuple[int, int]) -> Edit:
    """Read the value of the editor: a picture, and a mask of what is painted over it.

    Raises:
        ValueError: if the editor is empty, or its picture cannot be read.
    """
    background = value.get("background") if isinstance(value, dict) else None
    if not isinstance(background, dict):
        raise ValueError("There is no picture to change: put one into the editor.")
    size = height_width[::-1]
    whole = open_upload(background).convert("RGBA")
    mask = Image.new("L", whole.size)
    for layer in value.get("layers") or []:
        if isinstance(layer, dict):
            painted = open_upload(layer).convert("RGBA").getchannel("A").resize(whole.size)
            mask = ImageChops.lighter(mask, painted)
    white = Image.new("RGBA", whole.size, "white")
    image = ImageOps.fit(Image.alpha_composite(white, whole).convert("RGB"), size, Image.Resampling.BOX)
    mask = ImageOps.fit(mask, size, Image.Resampling.BOX).point(lambda share: 255 * (share >= 64))
    return Edit(image, mask if mask.getbbox() else None, strength)


def open_upload(value: dict[str, Any]) -> Image.Image:
    """Open a picture that was uploaded, or drawn here. gradio checks the paths of values in its own form only.

    Raises:
        ValueError: if it is another file, or no picture.
    """
    file = Path(str(value.get("path"))).resolve()
    if not file.is_relative_to(Path(get_upload_folder()).resolve()):
        raise ValueError("The picture was not uploaded here.")
    return open_picture(file)


def settings_of_selected(event: gr.SelectData, pictures: list[Picture]) -> Any:
    if event.index >= len(pictures):  # an example picture
        return gr.skip()
    picture = pictures[event.index]
    return parts.settings_table(picture.request, has_link=not picture.is_edit)


def add_to_history(drawn: list[Picture], history: list[Picture]) -> tuple[Any, ...]:
    """Return the pictures of the session, and their gallery."""
    history = [*drawn, *history][:HISTORY]
    captioned = [(picture.file, picture.request.prompt) for picture in history]
    return history, gr.Gallery(captioned, visible=True)


def offer_actions() -> tuple[Any, str]:
    """Return the row of actions for a new picture, and the label of "Copy link"."""
    return gr.Row(visible=True), "Copy link"


def to_editor(pictures: list[Picture]) -> tuple[Any, ...]:
    """Return the first picture for the editor, its prompt, and the tab to open."""
    if not pictures:  # the next ones are being drawn
        return gr.skip(), gr.skip(), gr.skip()
    picture = pictures[0]
    return editor_value(picture.file), picture.request.prompt, gr.Tabs(selected="edit")


def editor_value(file: str) -> dict[str, Any]:
    image = enlarge(open_picture(file).convert("RGB"))
    return {"background": image, "layers": [], "composite": image}


def picture_class(size: str) -> str:
    return "pixelated" if parts.is_pixelated(size) else "smooth"


def stopped_status() -> str:
    return parts.status_line("Stopped.")


def size_hint(model: ModelInfo) -> str:
    return "The only size this model was trained at." if len(model.sizes) == 1 else "Width x height in pixels."


def preset_choices(model: ModelInfo) -> list[tuple[str, str]]:
    return [(f"{parts.PRESET_WORDS[name]} ({steps} steps)", name) for name, steps in model.preset_steps.items()]


class Controls:
    """Controls for how a picture is drawn; the Compare tab has two sets.

    Args:
        handlers: handlers of the page.
        side: suffix of the labels in a comparison.
        preset: preset that is selected first.
    """

    def __init__(self, handlers: Handlers, side: str = "", preset: str = "exact"):
        suffix = f" ({side})" if side else ""
        model, several = handlers.initial_model, len(handlers.models) > 1
        self.model = gr.Dropdown(list(handlers.models), value=model.name, label=f"Model{suffix}", visible=several)
        self.preset = gr.Radio(preset_choices(model), value=preset, label=f"Quality{suffix}")
        with nullcontext() if side else gr.Accordion("Advanced", open=False):
            if not side:
                self.size = gr.Dropdown(
                    list(model.sizes), value=model.default_size, label="Size", info=size_hint(model)
                )
            self.steps = gr.Slider(1, MAX_STEPS, model.preset_steps[preset], step=1, label=f"Steps{suffix}")
            self.guidance = gr.Slider(
                1, MAX_GUIDANCE, DEFAULT_GUIDANCE_SCALE, step=0.1, label=f"Guidance{suffix}",
                info="How closely the picture follows the prompt; 1 turns it off.",
            )  # fmt: skip
            if not side:
                self.negative = gr.Textbox(
                    label="Negative prompt", max_lines=3, max_length=MAX_PROMPT,
                    placeholder="What the picture should not show",
                )  # fmt: skip
            self.loras: list[Any] = []
            if handlers.loras:
                choice = gr.Dropdown([NO_LORA, *handlers.loras], value=NO_LORA, label=f"LoRA{suffix}")
                weight = gr.Slider(0, MAX_LORA_WEIGHT, 1.0, step=0.05, label=f"LoRA weight{suffix}")
                self.loras = [choice, weight]
        # `input`, not `change`: a link sets preset and steps itself
        self.preset.input(handlers.change_preset, [self.preset, self.model], self.steps, **UNQUEUED)


class Workspace:
    """Parts of every tab: a prompt with its buttons, the progress, and the preview while a picture is drawn.

    Build it in two columns: `ask` in one, `answer` in the other.
    """

    prompt: gr.Textbox
    start: gr.Button
    stop: gr.Button
    status: gr.HTML
    preview: gr.HTML

    def ask(self, label: str, elem_id: str, prompt: str) -> None:
        """Make the prompt and its buttons."""
        hint = "What the picture should show"
        self.prompt = gr.Textbox(prompt, label="Prompt", lines=1, max_lines=5, max_length=MAX_PROMPT, placeholder=hint)
        with gr.Row():
            self.start = gr.Button(label, variant="primary", elem_id=elem_id, min_width=120)
            self.stop = gr.Button("Stop", variant="stop", elem_classes="stop", min_width=120)

    def answer(self) -> None:
        """Make the progress and the preview."""
        self.status = gr.HTML(elem_classes="progress")
        self.preview = gr.HTML(elem_classes="preview-image", visible=False)

    def on_start(self, function: Any, inputs: list[Any], outputs: list[Any], seed: Any, keep: Any, name: str) -> Any:
        """Connect the buttons; return the event of drawing."""
        triggers = [self.start.click, self.prompt.submit]
        begin = gr.on(triggers, None, [seed, keep], [seed, self.status], js=BEGIN, **PRIVATE)
        drawing = begin.then(function, inputs, [self.status, self.preview, *outputs], api_name=name, **QUEUED)
        drawing.failure(None, self.status, self.status, js=END_PROGRESS, **PRIVATE)
        # `then`: a step that ends while it is canceled would overwrite the status
        self.stop.click(None, cancels=drawing).then(stopped_status, None, self.status, **AFTER_STEPS)
        return drawing


def seed_controls() -> tuple[gr.Number, gr.Checkbox]:
    """Return the seed, and whether it is kept."""
    with gr.Row(equal_height=True):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=120)
        keep = gr.Checkbox(False, label="Keep this seed", info="Off: a new picture every time.", min_width=160)
    return seed, keep


def thumbnails(label: str, **options: Any) -> gr.Gallery:
    """Return a gallery in which choosing a picture is an event, and shows nothing by itself."""
    return gr.Gallery(
        label=label, columns=6, height="auto", allow_preview=False, interactive=False, buttons=[], object_fit="cover",
        **options,
    )  # fmt: skip


def picture_gallery(handlers: Handlers, label: str, value: Any = None) -> gr.Gallery:
    return gr.Gallery(
        value, label=label, show_label=False, columns=1, object_fit="contain", format="png", interactive=False,
        height="auto", buttons=["download", "fullscreen"],
        elem_classes=["picture", picture_class(handlers.initial_model.default_size)],
    )  # fmt: skip


class DrawTab:
    """Draw a prompt. Its controls serve the Edit tab too.

    Args:
        page: page that it is on.
        handlers: handlers of the page.
        header: header of the page, which shows the model.
    """

    def __init__(self, page: gr.Blocks, handlers: Handlers, header: gr.HTML):
        self.work = work = Workspace()
        first = handlers.showcases[handlers.initial_model.name].examples[:1]
        self.examples = thumbnails(
            "Examples: choose one to draw its like", **handlers.example_gallery(handlers.initial_model.name)
        )
        with gr.Row(elem_classes="workspace"):
            with gr.Column(elem_classes="ask", min_width=280):
                work.ask("Draw", "draw", first[0][0] if first else "")
                enhance = gr.Button("Enhance the prompt", visible=handlers.enhancer is not None)
            with gr.Column(elem_classes="answer", min_width=280):
                work.answer()
                self.gallery = picture_gallery(handlers, "Picture", [(file, prompt) for prompt, file in first])
                with gr.Row(visible=False) as actions:
                    to_edit = gr.Button("Change this picture", size="sm")
                    copy = gr.Button("Copy link", size="sm", elem_id="copy-link")
                self.details = gr.HTML(elem_classes="details", elem_id="made")
                self.history_gallery = thumbnails(
                    "Your pictures: choose one to go back to it", visible=False,
                    elem_classes=["thumbnails", picture_class(handlers.initial_model.default_size)],
                )  # fmt: skip
            with gr.Column(elem_classes="options", min_width=280):
                self.images = gr.Radio(list(range(1, MAX_IMAGES + 1)), value=1, label="Number of pictures")
                self.seed, self.keep = seed_controls()
                self.controls = controls = Controls(handlers)
                restored = gr.File(
                    label="Drop a picture of this page here to get its settings back", file_types=["image"], height=150
                )
        self.drawn = gr.State([], time_to_live=KEPT_SECONDS)  # pictures in the gallery
        self.history = gr.State([], time_to_live=KEPT_SECONDS)
        self.to_edit = to_edit
        self.inputs = [work.prompt, controls.negative, controls.model, controls.size, controls.preset, controls.steps]
        self.inputs += [controls.guidance, self.seed, self.images, *controls.loras]
        self.history_outputs = [self.history, self.history_gallery]
        filled = [*self.inputs, self.keep]

        drawing = work.on_start(
            handlers.draw_one, self.inputs, [self.gallery, self.details, self.drawn], self.seed, self.keep, "draw"
        )
        drawing.success(add_to_history, [self.drawn, self.history], self.history_outputs, **AFTER_STEPS)
        drawing.success(offer_actions, None, [actions, copy], **AFTER_STEPS)
        # `change`: also when a link or a picture chooses the model
        controls.model.change(handlers.introduce, controls.model, [header, self.examples], **UNQUEUED)
        model_outputs = [controls.size, controls.preset, controls.steps]
        controls.model.input(handlers.change_model, controls.model, model_outputs, **UNQUEUED)
        chosen = self.examples.select(handlers.example_prompt, controls.model, work.prompt, **UNQUEUED)
        chosen.success(None, None, None, js=CLICK_DRAW)
        self.gallery.select(settings_of_selected, self.drawn, self.details, **UNQUEUED)
        found = [self.gallery, self.details, self.drawn, *filled]
        finding = self.history_gallery.select(handlers.find_again, self.history, found, **UNQUEUED)
        finding.success(offer_actions, None, [actions, copy], **UNQUEUED)
        copy.click(None, None, copy, js=COPY_LINK)
        restored.upload(handlers.restore, restored, [work.status, *filled], **UNQUEUED)
        if handlers.enhancer is not None:
            outputs = [work.prompt, work.status]
            enhance.click(handlers.enhance, work.prompt, outputs, concurrency_limit=1, **PRIVATE)
        linked = gr.Textbox(visible=False)
        opening = page.load(handlers.open_link, None, [linked, work.status, *filled], **UNQUEUED)
        opening.success(None, linked, js=CLICK_DRAW_IF_LINKED)


def add_edit_tab(handlers: Handlers, drawing: DrawTab, tabs: gr.Tabs) -> None:
    """Change a picture: image to image, or inpainting where it is painted over."""
    work = Workspace()
    first = handlers.showcases[handlers.initial_model.name].examples[:1]
    side = max(MIN_EDITOR_SIDE, *map(int, handlers.initial_model.default_size.split(" x ")))
    with gr.Row(elem_classes="workspace"):
        with gr.Column(elem_classes="ask", min_width=280):
            editor = gr.ImageEditor(
                editor_value(first[0][1]) if first else None, label="Paint here",
                sources=("upload", "clipboard"), transforms=(), layers=False,
                brush=gr.Brush(colors=["#6366f1"], color_mode="fixed", default_size=side // 8), eraser=gr.Eraser(),
                format="png", canvas_size=(side, side), fixed_canvas=True, height=420, buttons=[],
            )  # fmt: skip
            work.ask("Change", "edit", first[0][0] if first else "")
            strength = gr.Slider(
                MIN_STRENGTH, 1, 0.8, step=0.05, label="How much to change",
                info="Used when nothing is painted: the whole picture changes then. 1 draws a new picture.",
            )  # fmt: skip
        with gr.Column(elem_classes="answer", min_width=280):
            gr.HTML(parts.EDIT_HINT)
            work.answer()
            gallery = picture_gallery(handlers, "Changed picture")
            again = gr.Button("Change the result further", size="sm", visible=False)
            details = gr.HTML(elem_classes="details")
    drawn = gr.State([], time_to_live=KEPT_SECONDS)
    inputs = [editor, strength, work.prompt, *drawing.inputs[1:]]
    editing = work.on_start(handlers.edit, inputs, [gallery, details, drawn], drawing.seed, drawing.keep, "edit")
    editing.success(add_to_history, [drawn, drawing.history], drawing.history_outputs, **AFTER_STEPS)
    editing.success(lambda: gr.Button(visible=True), None, again, **AFTER_STEPS)
    gallery.select(settings_of_selected, drawn, details, **UNQUEUED)
    again.click(to_editor, drawn, [editor, work.prompt, tabs], **UNQUEUED)
    drawing.to_edit.click(to_editor, drawing.drawn, [editor, work.prompt, tabs], **UNQUEUED)


def add_compare_tab(handlers: Handlers) -> None:
    """Draw one prompt in two ways, at first exact and fast."""
    work = Workspace()
    first = handlers.showcases[handlers.initial_model.name].examples[:1]
    with gr.Row(elem_classes="workspace"):
        with gr.Column(elem_classes="ask", min_width=280):
            work.ask("Compare", "compare", first[0][0] if first else "")
            seed, keep = seed_controls()
        with gr.Column(elem_classes="answer", min_width=280):
            work.answer()
            slider = gr.ImageSlider(
                label="Left and right: move the line", format="png", buttons=["fullscreen"], interactive=False
            )
            table = gr.HTML(parts.COMPARE_HINT, elem_classes="details")
        with gr.Column(elem_classes="options", min_width=280), gr.Accordion("What is compared", open=False):
            with gr.Row():
                with gr.Column(min_width=200):
                    left = Controls(handlers, "left")
                with gr.Column(min_width=200):
                    right = Controls(handlers, "right", "fast")
            negative = gr.Textbox(label="Negative prompt", max_length=MAX_PROMPT, lines=1)
    settings = [value for side in (left, right) for value in (side.model, side.preset, side.steps, side.guidance)]
    inputs = [work.prompt, negative, seed, *settings, *left.loras, *right.loras]
    work.on_start(handlers.compare, inputs, [slider, table], seed, keep, "compare")
    for side in (left, right):
        side.model.input(handlers.change_side, [side.model, side.preset], [side.preset, side.steps], **UNQUEUED)


def build(models: Mapping[str, ModelInfo], cache: ModelCache, enhancer: PromptEnhancer | None = None) -> gr.Blocks:
    """Build the page.

    Args:
        models: models on offer, by name.
        cache: cache over the same models, and the LoRAs.
        enhancer: function that rewrites prompts; None for a page without its button.
    """
    if not models:
        with Page("Text to image with PRX", title="PRX", analytics_enabled=False) as page:
            gr.Markdown(NO_MODEL)
        return page
    handlers = Handlers(models, cache, enhancer)
    showcase = handlers.showcases[handlers.initial_model.name]
    with Page(
        showcase.description,
        share_image([file for _, file in showcase.examples]) if showcase.examples else b"",
        title=showcase.title,
        analytics_enabled=False,
        delete_cache=(600, KEPT_SECONDS),
    ) as page:
        header = gr.HTML(parts.header(showcase), elem_classes="header")
        with gr.Tabs() as tabs:
            with gr.Tab("Draw", id="draw"):
                drawing = DrawTab(page, handlers, header)
            with gr.Tab("Edit", id="edit"):
                add_edit_tab(handlers, drawing, tabs)
            with gr.Tab("Compare", id="compare"):
                add_compare_tab(handlers)
    return page.queue(max_size=QUEUE_SIZE, api_open=False)


def load_enhancer() -> PromptEnhancer | None:
    """Load the language model that `PRX_ENHANCER` names, if it is set."""
    name = os.environ.get("PRX_ENHANCER")
    if not name:
        return None
    # ZeroGPU gives CUDA to requests that draw only
    return PromptEnhancer.from_pretrained(name, device="cuda" if torch.cuda.is_available() and GPU is None else None)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()  # configured by environment variables, see README.md
    models = find_models()
    if GPU is None:
        cache = ModelCache(models, find_loras())
    else:
        # ZeroGPU provides CUDA to the main thread only, and `launch` packs what is loaded by then for its workers.
        # These are forks that are reused: each loads the LoRAs that it needs, and keeps them.
        cache = ModelCache(models, find_loras(), capacity=max(CAPACITY, len(models) + 1))
        for name in list(models):
            try:
                cache.get(name)
            except Exception as error:  # one broken model must not stop the page
                report_skipped(models.pop(name).source, error)
    launch(build(models, cache, load_enhancer()))


if __name__ == "__main__":
    main()
