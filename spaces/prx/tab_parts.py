"""Parts of several tabs: the prompt with its buttons, the controls, and galleries."""

from contextlib import nullcontext
from typing import Any

import gradio as gr

import page_parts as parts
from drawing import CONCURRENCY
from handlers import Handlers, preset_choice
from model_cache import ModelInfo
from settings import MAX_GUIDANCE, MAX_LORA_WEIGHT, MAX_PROMPT, MAX_SEED, MAX_STEPS, NO_LORA

KEPT_SECONDS = 3600  # time after which pictures and sessions are forgotten

# a new seed unless it is kept, and an answer before the server has one
BEGIN = f"(seed, keep) => [keep ? seed : Math.floor(Math.random() * 2147483648), `{parts.WAITING}`]"
# a stopped request counts as failed too: "Stopped." stays
END_PROGRESS = """(status) => (status || "").includes("<progress") ? "" : status"""

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
        presets = preset_choice(model, preset)
        self.preset = gr.Radio(**presets, label=f"Quality{suffix}")
        with nullcontext() if side else gr.Accordion("Advanced", open=False):
            if not side:
                self.size = gr.Dropdown(
                    list(model.sizes), value=model.default_size, label="Size", info=size_hint(model)
                )
            self.steps = gr.Slider(1, MAX_STEPS, model.preset_steps[presets["value"]], step=1, label=f"Steps{suffix}")
            self.guidance = gr.Slider(
                1, MAX_GUIDANCE, model.preset_guidance[presets["value"]], step=0.1, label=f"Guidance{suffix}",
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
        of_preset = [self.steps, self.guidance]
        self.preset.input(handlers.change_preset, [self.preset, self.model], of_preset, **UNQUEUED)
        kept = [self.preset] if side else []  # a comparison goes on with its presets
        self.model.input(handlers.change_model, [self.model, *kept], [self.preset, *of_preset], **UNQUEUED)


class Workspace:
    """Parts of every tab: a prompt with its buttons, the progress, and the preview while a picture is drawn.

    Build it in two columns: `ask` in one, `answer` in the other.
    """

    def ask(self, label: str, elem_id: str, example: tuple[str, ...] | None) -> None:
        """Make the prompt, with that of an example, and its buttons."""
        self.prompt = gr.Textbox(
            example[0] if example else "", label="Prompt", lines=1, max_lines=5, max_length=MAX_PROMPT,
            placeholder="What the picture should show",
        )  # fmt: skip
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


def stopped_status() -> str:
    return parts.status_line("Stopped.")


def size_hint(model: ModelInfo) -> str:
    return "The only size this model was trained at." if len(model.sizes) == 1 else "Width x height in pixels."


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
        elem_classes=["picture", parts.picture_class(handlers.initial_model.default_size)],
    )  # fmt: skip
