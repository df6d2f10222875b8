"""The page: PRX in a browser, on a laptop (`make demo`) and as a Hugging Face Space."""

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
    from spaces import GPU  # on ZeroGPU, and there it has to come before torch
except ImportError:
    GPU = None
import gradio as gr
import torch

import page_parts as parts
from diffusers_prx.pipelines.check_inputs import DEFAULT_GUIDANCE_SCALE
from drawing import CONCURRENCY, Update, draw
from model_cache import CAPACITY, Model, ModelCache, find_loras, find_models, print_left_out
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
    check_request,
    read_link,
)

FIELDS = tuple(field.name for field in fields(Request))  # also the order of the inputs of `draw`
QUEUE_SIZE = 24  # requests that wait; one more is told to come back later

NO_MODEL = """# PRX
**There is no model here yet.** One of these makes one:

- `make quickstart` trains a small one on this machine, in about ten minutes, and leaves it in `outputs/quickstart`;
- `PRX_MODELS=/path/to/folder` names a folder that holds saved pipelines (folders with a `model_index.json`);
- `PRX_HUB_MODELS=Photoroom/prx-512-t2i-sft` names models on the Hugging Face Hub, which want a GPU.

Then start the demo again.
"""
PRESET_CHOICES = [
    (f"exact ({PRESETS['exact']} steps)", "exact"),
    (f"fast, about the same picture ({PRESETS['fast']})", "fast"),
    (f"fastest, a preview ({PRESETS['fastest']})", "fastest"),
]
# A link has filled in the page; what is drawn is what the page shows then.
DRAW_IF_LINKED = """(linked) => { if (linked) document.querySelector("#draw").click(); }"""


def seconds_needed(request: Request) -> int:
    """Time on a ZeroGPU to ask for. A guess on the safe side: nothing of it was measured there."""
    height, width = request.height_width
    forwards = request.steps * request.images * (2 if request.guidance_scale > 1 else 1)
    return min(120, 15 + round(0.06 * forwards * height * width / 512**2))


def as_sentence(error: Exception) -> gr.Error:
    """What a person is told; the server's log has the rest, unless the person did it."""
    if isinstance(error, gr.Error):  # a sentence already, ours or ZeroGPU's; it is a ValueError too
        return error
    if not isinstance(error, ValueError):
        traceback.print_exception(error)
    if isinstance(error, ValueError):
        text = str(error).splitlines()[0][:400]
    elif isinstance(error, torch.OutOfMemoryError):
        text = "The memory of the GPU is not enough for this: choose fewer images or a smaller size."
    elif isinstance(error, OSError):
        text = "The model or the LoRA could not be loaded here. Choose another one."
    else:
        text = "Drawing failed, and it is not your fault. The log of the server says why."
    return gr.Error(escape(text), print_exception=False, title="Not drawn")


class Controls:
    """The controls that say how to draw: the same on the page of one picture and on both sides of a comparison."""

    def __init__(self, models: Mapping[str, Model], loras: list[str], opened: Model, side: str = ""):
        suffix = f" ({side})" if side else ""
        self.model = gr.Dropdown(list(models), value=opened.name, label=f"Model{suffix}")
        if not side:  # two models may have no size in common: a comparison draws each at its own
            self.size = gr.Dropdown(
                list(opened.sizes), value=opened.default_size, label="Size", info=sizes_info(opened)
            )
        self.preset = gr.Radio(PRESET_CHOICES, value="exact", label=f"Preset{suffix}")
        self.steps = gr.Slider(1, MAX_STEPS, PRESETS["exact"], step=1, label=f"Steps{suffix}")
        self.guidance = gr.Slider(
            1, MAX_GUIDANCE, DEFAULT_GUIDANCE_SCALE, step=0.1, label=f"Guidance{suffix}", info="1 is none."
        )
        self.loras: list[Any] = []
        if loras:
            choice = gr.Dropdown([NO_LORA, *loras], value=NO_LORA, label=f"LoRA{suffix}")
            weight = gr.Slider(0, MAX_LORA_WEIGHT, 1.0, step=0.05, label=f"LoRA weight{suffix}")
            self.loras = [choice, weight]
        # `input` is a person's choice alone: a link sets the controls by itself
        self.preset.input(PRESETS.get, self.preset, self.steps, queue=False, api_visibility="private")


def sizes_info(model: Model) -> str:
    return "The only size this model was trained at." if len(model.sizes) == 1 else "Width x height in pixels."


def seed_controls() -> gr.Number:
    with gr.Row(equal_height=True):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, scale=3, min_width=120)
        dice = gr.Button("⚄ Roll the dice", scale=1, min_width=140)
    dice.click(lambda: random.randint(0, MAX_SEED), None, seed, queue=False, api_visibility="private")
    return seed


def prompt_controls(names: tuple[str, str]) -> tuple[Any, Any, Any, Any]:
    prompt = gr.Textbox(
        label="Prompt", lines=1, max_lines=5, max_length=MAX_PROMPT, placeholder="What the picture should show"
    )
    negative = gr.Textbox(
        label="Negative prompt", lines=1, max_lines=3, max_length=MAX_PROMPT, placeholder="What it should not show"
    )
    with gr.Row():
        go = gr.Button(names[0], variant="primary", elem_id=names[1], min_width=120)
        stop = gr.Button("Stop", variant="stop", elem_id=f"stop-{names[1]}", min_width=120)
    return prompt, negative, go, stop


def build(models: Mapping[str, Model], cache: ModelCache) -> gr.Blocks:
    """The page over these models; `cache` holds the same ones, and the LoRAs."""
    if not models:
        with gr.Blocks(title="PRX", analytics_enabled=False) as demo:
            gr.Markdown(NO_MODEL)
        return demo
    sizes = {name: model.sizes for name, model in models.items()}
    loras = list(cache.loras)
    opened = next(iter(models.values()))

    def compute(request: Request) -> Iterator[Update]:
        """As `draw`; what goes wrong is a sentence. It is made here, in ZeroGPU's worker: from there gradio's errors
        arrive whole, and of any other only the name of its class."""
        try:
            yield from draw(request, cache)
        except Exception as error:
            raise as_sentence(error) from error

    if GPU is not None:
        compute = GPU(duration=seconds_needed)(compute)

    def draw_on(request: Request) -> Iterator[Update]:
        """As `compute`; what goes wrong with ZeroGPU itself is a sentence too."""
        try:
            yield from compute(request)
        except Exception as error:
            raise as_sentence(error) from None

    def checked(values: dict[str, Any]) -> Request:
        try:
            return check_request(values, sizes, loras)
        except ValueError as error:
            raise as_sentence(error) from error

    def draw_one(
        prompt: Any, negative_prompt: Any, model: Any, size: Any, preset: Any, steps: Any, guidance_scale: Any,
        seed: Any, images: Any, lora: Any = NO_LORA, lora_weight: Any = 1.0,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Draw 1 to 4 pictures of a prompt: status, preview, pictures, settings of the first."""
        values = (prompt, negative_prompt, model, size, preset, steps, guidance_scale, seed, images, lora, lora_weight)
        request = checked(dict(zip(FIELDS, values)))
        small = parts.is_small(request.size)
        shown = gr.skip()
        for update in draw_on(request):
            if update.images:
                pictures = [(image, f"Seed {seed}") for image, seed in zip(update.images, request.seeds)]
                done = parts.said(f"Done in {update.seconds:.1f} seconds.")
                classes = ["small"] if small else []
                gallery = gr.Gallery(pictures, visible=True, elem_classes=classes, selected_index=0)
                yield done, gr.HTML("", visible=False), gallery, parts.details(request.of_image(0)), request
                return
            shown = gr.HTML(parts.preview(update, small), visible=True) if update.preview else shown
            yield parts.progress(update), shown, gr.Gallery(visible=False), "", None
            shown = gr.skip()

    def compare(
        prompt: Any, negative_prompt: Any, seed: Any, model: Any, preset: Any, steps: Any, guidance_scale: Any,
        second_model: Any, second_preset: Any, second_steps: Any, second_guidance_scale: Any, lora: Any = NO_LORA,
        lora_weight: Any = 1.0, second_lora: Any = NO_LORA, second_lora_weight: Any = 1.0,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Draw one prompt with one seed in two ways: status, then picture and settings of each."""
        common = {"prompt": prompt, "negative_prompt": negative_prompt, "seed": seed}
        ways = [
            (model, preset, steps, guidance_scale, lora, lora_weight),
            (second_model, second_preset, second_steps, second_guidance_scale, second_lora, second_lora_weight),
        ]
        names = ("model", "preset", "steps", "guidance_scale", "lora", "lora_weight")
        requests = []
        for way in ways:
            known = isinstance(way[0], str) and way[0] in models
            size = models[way[0]].default_size if known else None
            requests.append(checked(common | dict(zip(names, way)) | {"size": size}))
        panels: list[Any] = ["", "", "", ""]
        for side, request in enumerate(requests):
            small = parts.is_small(request.size)
            for update in draw_on(request):
                if update.images:
                    finished = Update(update.steps, update.steps, update.seconds, preview=update.images[0])
                    panels[2 * side] = parts.preview(finished, small, final=True)
                    panels[2 * side + 1] = parts.details(request)
                elif update.preview:
                    panels[2 * side] = parts.preview(update, small)
                yield (parts.progress(update, ("First: ", "Second: ")[side]), *panels)
        yield (parts.said("Done."), *panels)

    def open_link(request: gr.Request) -> list[Any]:
        """Fill the page with what a link asks for, and say whether there is something to draw."""
        nothing = [gr.skip()] * len(inputs)
        if "prompt" not in request.query_params:
            return ["", "", *nothing]
        defaults = {"negative_prompt": "", "model": opened.name, "preset": "exact", "steps": PRESETS["exact"]}
        defaults |= {"guidance_scale": DEFAULT_GUIDANCE_SCALE, "seed": 0, "images": 1, "size": None, "prompt": ""}
        values = read_link(request.query_params, defaults | {"lora": NO_LORA, "lora_weight": 1.0})
        if values["size"] is None and values["model"] in models:
            values["size"] = models[values["model"]].default_size
        try:
            asked = check_request(values, sizes, loras)
        except ValueError as error:  # as an error it would cover the whole page
            return ["", parts.said(f"The link asks for something that is not here. {error}"), *nothing]
        filled = [getattr(asked, name) for name in FIELDS[: len(inputs)]]
        filled[FIELDS.index("size")] = gr.Dropdown(list(sizes[asked.model]), value=asked.size)
        return ["yes", "", *filled]

    def change_model(name: str) -> tuple[Any, Any]:
        model = models[name]
        size = gr.Dropdown(list(model.sizes), value=model.default_size, info=sizes_info(model))
        return size, gr.Dataset(samples=parts.examples_for(model))

    def settings_of(event: gr.SelectData, request: Request | None) -> Any:
        return gr.skip() if request is None else parts.details(request.of_image(event.index))

    def stopped() -> str:  # comes after the canceling: a step on its way would overwrite it
        return parts.said("Stopped.")

    limits = {"concurrency_limit": CONCURRENCY, "concurrency_id": "draw"}  # one queue for both pages
    quick = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
    with Page(title="PRX: text to image", analytics_enabled=False, delete_cache=(600, 1800)) as demo:
        gr.Markdown("# PRX: text to image")
        with gr.Tab("Draw"):
            prompt, negative, go, stop = prompt_controls(("Draw", "draw"))
            examples = gr.Dataset(
                label="Examples", components=[gr.Textbox(visible=False)], samples=parts.examples_for(opened)
            )
            with gr.Row():
                with gr.Column(scale=3, min_width=280):
                    status = gr.HTML(elem_classes="progress")
                    view = gr.HTML(elem_classes="expected", visible=False)
                    gallery = gr.Gallery(
                        label="Pictures",
                        preview=True,
                        buttons=["download", "fullscreen"],
                        object_fit="contain",
                        format="png",
                        interactive=False,
                        height="auto",
                    )
                    about = gr.HTML(elem_classes="details")
                with gr.Column(scale=2, min_width=280):
                    controls = Controls(models, loras, opened)
                    seed = seed_controls()
                    images = gr.Slider(1, MAX_IMAGES, 1, step=1, label="Number of images")
            drawn = gr.State(time_to_live=3600)  # the request of the pictures in the gallery
            inputs = [prompt, negative, controls.model, controls.size, controls.preset, controls.steps]
            inputs += [controls.guidance, seed, images, *controls.loras]
            # unprocessed: `check_request` judges what came, in words for a person
            drawing = gr.on(
                [go.click, prompt.submit], draw_one, inputs, [status, view, gallery, about, drawn],
                api_name="draw", preprocess=False, show_progress="hidden", **limits,
            )  # fmt: skip
            stop.click(None, cancels=drawing).then(stopped, None, status, **quick)
            controls.model.input(change_model, controls.model, [controls.size, examples], **quick)
            examples.click(lambda sample: sample[0], examples, prompt, **quick)
            gallery.select(settings_of, drawn, about, **quick)
            linked = gr.Textbox(visible=False)
            opening = demo.load(open_link, None, [linked, status, *inputs], **quick)
            opening.success(None, linked, js=DRAW_IF_LINKED)
        with gr.Tab("Compare"):
            gr.Markdown("The same prompt and seed, drawn in two ways, each at its model's own size.")
            prompt, negative, go, stop = prompt_controls(("Compare", "compare"))
            seed = seed_controls()
            status = gr.HTML(elem_classes="progress")
            sides, panels = [], []
            second = list(models.values())[1 if len(models) > 1 else 0]
            with gr.Row():
                for side, model in (("first", opened), ("second", second)):
                    with gr.Column(min_width=280):
                        panels += [gr.HTML(elem_classes="expected"), gr.HTML(elem_classes="details")]
                        sides.append(Controls(models, loras, model, side))
            fields_of = [[side.model, side.preset, side.steps, side.guidance] for side in sides]
            comparing = gr.on(
                [go.click, prompt.submit], compare,
                [prompt, negative, seed, *fields_of[0], *fields_of[1], *sides[0].loras, *sides[1].loras],
                [status, *panels], api_name="compare", preprocess=False, show_progress="hidden", **limits,
            )  # fmt: skip
            stop.click(None, cancels=comparing).then(stopped, None, status, **quick)
    return demo.queue(max_size=QUEUE_SIZE, api_open=False)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()  # settings are variables, see README.md
    found = find_models()
    if GPU is None:
        cache = ModelCache(found, find_loras())
    else:
        # Here ZeroGPU has a CUDA for the main thread alone, and `launch` packs what is on it for the workers. They are
        # forks that are used again: a LoRA is made in each that needs it, and stays there while the worker lives.
        cache = ModelCache(found, find_loras(), capacity=max(CAPACITY, len(found) + 1))
        for name in list(found):
            try:
                cache.get(name)
            except Exception as error:  # one model that cannot be loaded must not keep the others from being served
                print_left_out(found.pop(name).source, error)
    launch(build(found, cache))


if __name__ == "__main__":
    main()
