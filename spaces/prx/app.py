"""Gradio page for PRX, on a laptop (`make demo`) and as a Hugging Face Space."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import argparse
import random
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import fields
from html import escape
from typing import Any

try:
    from spaces import GPU  # only on ZeroGPU, where it must be imported before torch
except ImportError:
    GPU = None
import gradio as gr
import torch

import page_parts as parts
from diffusers_prx.pipelines.check_inputs import DEFAULT_GUIDANCE_SCALE
from drawing import CONCURRENCY, Update, draw
from model_cache import CAPACITY, ModelCache, ModelInfo, find_loras, find_models, report_skipped
from serving import Page, launch
from settings import (
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_LORA_WEIGHT,
    MAX_PROMPT,
    MAX_SEED,
    MAX_STEPS,
    NO_LORA,
    PRESETS,
    Request,
    parse_request,
    read_link,
)

REQUEST_FIELDS = tuple(field.name for field in fields(Request))  # also the order of the inputs of `draw`
QUEUE_SIZE = 24  # waiting requests; further ones are refused

NO_MODEL = """# PRX
**There is no model here yet.** Do one of these, then start the demo again:

- `make quickstart` trains a small model on this machine in about ten minutes and saves it in `outputs/quickstart`;
- `PRX_MODELS=/path/to/folder` names a folder with saved pipelines (folders with a `model_index.json`);
- `PRX_HUB_MODELS=Photoroom/prx-512-t2i-sft` names models on the Hugging Face Hub, which need a GPU.
"""
PRESET_CHOICES = [
    (f"exact ({PRESETS['exact']} steps)", "exact"),
    (f"fast, about the same picture ({PRESETS['fast']})", "fast"),
    (f"fastest, a preview ({PRESETS['fastest']})", "fastest"),
]
DRAW_IF_LINKED = """(linked) => { if (linked) document.querySelector("#draw").click(); }"""

# events that change the page only: not queued, and no endpoints
UNQUEUED = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
# comes through the same stream as the steps, so after those that are on their way
AFTER_STEPS = {"concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden"}
# both endpoints share one queue; values are not preprocessed, since `parse_request` checks them
QUEUED = {
    "concurrency_limit": CONCURRENCY,
    "concurrency_id": "draw",
    "preprocess": False,
    "show_progress": "hidden",
}


def seconds_needed(request: Request) -> int:
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


class Handlers:
    """Functions that the events of the page call.

    Args:
        models: models on offer, by name; the page opens on the first.
        cache: cache over the same models, and the LoRAs.
    """

    def __init__(self, models: Mapping[str, ModelInfo], cache: ModelCache):
        self.models = models
        self.sizes = {name: model.sizes for name, model in models.items()}
        self.loras = list(cache.loras)
        self.initial_model = next(iter(models.values()))

        def draw_in_worker(request: Request) -> Iterator[Update]:
            # converted here: from a ZeroGPU worker only gr.Error arrives whole, of other errors the class name
            try:
                yield from draw(request, cache)
            except Exception as error:
                raise to_user_error(error) from error

        self._draw_in_worker = draw_in_worker if GPU is None else GPU(duration=seconds_needed)(draw_in_worker)

    def _draw(self, request: Request) -> Iterator[Update]:
        try:
            yield from self._draw_in_worker(request)
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
        request = self._parse(dict(zip(REQUEST_FIELDS, values)))
        pixelated = parts.is_pixelated(request.size)
        preview = gr.skip()
        for update in self._draw(request):
            if update.images:
                pictures = [(image, f"Seed {seed}") for image, seed in zip(update.images, request.seeds)]
                status = parts.status_line(f"Done in {update.seconds:.1f} seconds.")
                classes = ["pixelated"] if pixelated else []
                gallery = gr.Gallery(pictures, visible=True, elem_classes=classes, selected_index=0)
                yield status, gr.HTML("", visible=False), gallery, parts.settings_table(request.for_image(0)), request
                return
            if update.preview:
                preview = gr.HTML(parts.preview(update, pixelated), visible=True)
            yield parts.progress_bar(update), preview, gr.Gallery(visible=False), "", None
            preview = gr.skip()

    def compare(
        self, prompt: Any, negative_prompt: Any, seed: Any, model: Any, preset: Any, steps: Any, guidance_scale: Any,
        second_model: Any, second_preset: Any, second_steps: Any, second_guidance_scale: Any, lora: Any = NO_LORA,
        lora_weight: Any = 1.0, second_lora: Any = NO_LORA, second_lora_weight: Any = 1.0,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Draw one prompt with one seed in two ways: status, then picture and settings of each."""
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
        panels: list[Any] = ["", "", "", ""]
        for side, request in enumerate(requests):
            pixelated = parts.is_pixelated(request.size)
            for update in self._draw(request):
                if update.images:
                    finished = Update(update.steps, update.steps, update.seconds, preview=update.images[0])
                    panels[2 * side] = parts.preview(finished, pixelated, final=True)
                    panels[2 * side + 1] = parts.settings_table(request)
                elif update.preview:
                    panels[2 * side] = parts.preview(update, pixelated)
                yield (parts.progress_bar(update, ("First: ", "Second: ")[side]), *panels)
        yield (parts.status_line("Done."), *panels)

    def open_link(self, request: gr.Request) -> list[Any]:
        """Return "yes" if the link holds a valid request, the status, and the values of the controls."""
        names = REQUEST_FIELDS if self.loras else REQUEST_FIELDS[:-2]
        unchanged = [gr.skip()] * len(names)
        if "prompt" not in request.query_params:
            return ["", "", *unchanged]
        defaults = {"negative_prompt": "", "model": self.initial_model.name, "preset": "exact", "size": None}
        defaults |= {"steps": PRESETS["exact"], "guidance_scale": DEFAULT_GUIDANCE_SCALE, "seed": 0, "images": 1}
        values = read_link(request.query_params, defaults | {"prompt": "", "lora": NO_LORA, "lora_weight": 1.0})
        if values["size"] is None and values["model"] in self.models:
            values["size"] = self.models[values["model"]].default_size
        try:
            linked = parse_request(values, self.sizes, self.loras)
        except ValueError as error:  # raised, it would cover the whole page
            return ["", parts.status_line(f"The link cannot be drawn. {error}"), *unchanged]
        filled = [getattr(linked, name) for name in names]
        filled[names.index("size")] = gr.Dropdown(list(self.sizes[linked.model]), value=linked.size)
        return ["yes", "", *filled]

    def change_model(self, name: str) -> tuple[Any, Any]:
        """Return the sizes and example prompts of a model."""
        model = self.models[name]
        size = gr.Dropdown(list(model.sizes), value=model.default_size, info=size_hint(model))
        return size, gr.Dataset(samples=parts.example_prompts(model))


def settings_of_selected(event: gr.SelectData, request: Request | None) -> Any:
    return gr.skip() if request is None else parts.settings_table(request.for_image(event.index))


def stopped_status() -> str:
    return parts.status_line("Stopped.")


def size_hint(model: ModelInfo) -> str:
    return "The only size this model was trained at." if len(model.sizes) == 1 else "Width x height in pixels."


class Controls:
    """Controls for the settings of a request; the Compare tab has two sets.

    Args:
        handlers: handlers of the page.
        model: model that is selected first.
        side: suffix of the labels in a comparison, where each model draws at its default size.
    """

    def __init__(self, handlers: Handlers, model: ModelInfo, side: str = ""):
        suffix = f" ({side})" if side else ""
        self.model = gr.Dropdown(list(handlers.models), value=model.name, label=f"Model{suffix}")
        if not side:
            self.size = gr.Dropdown(list(model.sizes), value=model.default_size, label="Size", info=size_hint(model))
        self.preset = gr.Radio(PRESET_CHOICES, value="exact", label=f"Preset{suffix}")
        self.steps = gr.Slider(1, MAX_STEPS, PRESETS["exact"], step=1, label=f"Steps{suffix}")
        self.guidance = gr.Slider(
            1, MAX_GUIDANCE, DEFAULT_GUIDANCE_SCALE, step=0.1, label=f"Guidance{suffix}", info="1 turns it off."
        )
        self.loras: list[Any] = []
        if handlers.loras:
            choice = gr.Dropdown([NO_LORA, *handlers.loras], value=NO_LORA, label=f"LoRA{suffix}")
            weight = gr.Slider(0, MAX_LORA_WEIGHT, 1.0, step=0.05, label=f"LoRA weight{suffix}")
            self.loras = [choice, weight]
        # `input`, not `change`: a link sets preset and steps itself
        self.preset.input(PRESETS.get, self.preset, self.steps, queue=False, api_visibility="private")


def seed_control() -> gr.Number:
    with gr.Row(equal_height=True):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, scale=3, min_width=120)
        dice = gr.Button("⚄ Roll the dice", scale=1, min_width=140)
    dice.click(lambda: random.randint(0, MAX_SEED), None, seed, queue=False, api_visibility="private")
    return seed


def prompt_controls(label: str, elem_id: str) -> tuple[gr.Textbox, gr.Textbox, gr.Button, gr.Button]:
    """Return prompt, negative prompt, start button and stop button."""
    prompt = gr.Textbox(
        label="Prompt", lines=1, max_lines=5, max_length=MAX_PROMPT, placeholder="What the picture should show"
    )
    negative = gr.Textbox(
        label="Negative prompt", lines=1, max_lines=3, max_length=MAX_PROMPT, placeholder="What it should not show"
    )
    with gr.Row():
        start = gr.Button(label, variant="primary", elem_id=elem_id, min_width=120)
        stop = gr.Button("Stop", variant="stop", elem_id=f"stop-{elem_id}", min_width=120)
    return prompt, negative, start, stop


def add_draw_tab(page: gr.Blocks, handlers: Handlers) -> None:
    prompt, negative, start, stop = prompt_controls("Draw", "draw")
    examples = gr.Dataset(
        label="Examples",
        components=[gr.Textbox(visible=False)],
        samples=parts.example_prompts(handlers.initial_model),
    )
    with gr.Row():
        with gr.Column(scale=3, min_width=280):
            status = gr.HTML(elem_classes="progress")
            preview = gr.HTML(elem_classes="preview-image", visible=False)
            gallery = gr.Gallery(
                label="Pictures",
                preview=True,
                buttons=["download", "fullscreen"],
                object_fit="contain",
                format="png",
                interactive=False,
                height="auto",
            )
            details = gr.HTML(elem_classes="details")
        with gr.Column(scale=2, min_width=280):
            controls = Controls(handlers, handlers.initial_model)
            seed = seed_control()
            images = gr.Slider(1, MAX_IMAGES, 1, step=1, label="Number of images")
    drawn = gr.State(time_to_live=3600)  # request of the pictures in the gallery
    inputs = [prompt, negative, controls.model, controls.size, controls.preset, controls.steps]
    inputs += [controls.guidance, seed, images, *controls.loras]
    drawing = gr.on(
        [start.click, prompt.submit], handlers.draw_one, inputs, [status, preview, gallery, details, drawn],
        api_name="draw", **QUEUED,
    )  # fmt: skip
    # `then`: a step that ends while it is canceled would overwrite the status
    stop.click(None, cancels=drawing).then(stopped_status, None, status, **AFTER_STEPS)
    controls.model.input(handlers.change_model, controls.model, [controls.size, examples], **UNQUEUED)
    examples.click(lambda sample: sample[0], examples, prompt, **UNQUEUED)
    gallery.select(settings_of_selected, drawn, details, **UNQUEUED)
    linked = gr.Textbox(visible=False)
    opening = page.load(handlers.open_link, None, [linked, status, *inputs], **UNQUEUED)
    opening.success(None, linked, js=DRAW_IF_LINKED)


def add_compare_tab(handlers: Handlers) -> None:
    gr.Markdown("The same prompt and seed, drawn in two ways, each at the default size of its model.")
    prompt, negative, start, stop = prompt_controls("Compare", "compare")
    seed = seed_control()
    status = gr.HTML(elem_classes="progress")
    panels: list[gr.HTML] = []
    controls: list[Controls] = []
    models = list(handlers.models.values())
    with gr.Row():
        for side, model in (("first", models[0]), ("second", models[min(1, len(models) - 1)])):
            with gr.Column(min_width=280):
                panels += [gr.HTML(elem_classes="preview-image"), gr.HTML(elem_classes="details")]
                controls.append(Controls(handlers, model, side))
    settings = [value for side in controls for value in (side.model, side.preset, side.steps, side.guidance)]
    loras = [value for side in controls for value in side.loras]
    comparing = gr.on(
        [start.click, prompt.submit], handlers.compare, [prompt, negative, seed, *settings, *loras],
        [status, *panels], api_name="compare", **QUEUED,
    )  # fmt: skip
    stop.click(None, cancels=comparing).then(stopped_status, None, status, **AFTER_STEPS)


def build(models: Mapping[str, ModelInfo], cache: ModelCache) -> gr.Blocks:
    """Build the page.

    Args:
        models: models on offer, by name.
        cache: cache over the same models, and the LoRAs.
    """
    if not models:
        with gr.Blocks(title="PRX", analytics_enabled=False) as page:
            gr.Markdown(NO_MODEL)
        return page
    handlers = Handlers(models, cache)
    with Page(title="PRX: text to image", analytics_enabled=False, delete_cache=(600, 1800)) as page:
        gr.Markdown("# PRX: text to image")
        with gr.Tab("Draw"):
            add_draw_tab(page, handlers)
        with gr.Tab("Compare"):
            add_compare_tab(handlers)
    return page.queue(max_size=QUEUE_SIZE, api_open=False)


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
    launch(build(models, cache))


if __name__ == "__main__":
    main()
