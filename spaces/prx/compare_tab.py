"""The Compare tab: one prompt drawn in two ways, at first exact and fast."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

import page_parts as parts
from drawing import Update
from handlers import Handlers, save_picture
from settings import MAX_PROMPT, NO_LORA
from tab_parts import Controls, Workspace, seed_controls


class CompareTab:
    """Draw one prompt with one seed in two ways.

    It opens on a pair that was drawn in advance, if the model has an adapter with an example of the same prompt.

    Args:
        handlers: handlers of the page.
    """

    def __init__(self, handlers: Handlers):
        self.handlers, work = handlers, Workspace()
        model, first = handlers.initial_model, handlers.first_example
        pair = handlers.showcases[model.name].compared
        with gr.Row(elem_classes="workspace"):
            with gr.Column(elem_classes="ask", min_width=280):
                work.ask("Compare", "compare", pair or first)
                seed, keep = seed_controls()
            with gr.Column(elem_classes="answer", min_width=280):
                work.answer()
                slider = gr.ImageSlider(
                    pair[1:] if pair else None, label="Left and right: move the line", visible=bool(pair),
                    format="png", buttons=["fullscreen"], interactive=False,
                    elem_classes=[parts.picture_class(model.default_size)],
                )  # fmt: skip
                table = gr.HTML(parts.compare_hint(model.preset_steps, bool(pair)), elem_classes="details")
            with gr.Column(elem_classes="options", min_width=280), gr.Accordion("What is compared", open=False):
                with gr.Row():
                    with gr.Column(min_width=200):
                        left = Controls(handlers, "left")
                    with gr.Column(min_width=200):
                        right = Controls(handlers, "right", "fast")
                negative = gr.Textbox(label="Negative prompt", max_length=MAX_PROMPT, lines=1)
        settings = [value for side in (left, right) for value in (side.model, side.preset, side.steps, side.guidance)]
        inputs = [work.prompt, negative, seed, *settings, *left.loras, *right.loras]
        work.on_start(self.compare, inputs, [slider, table], seed, keep, "compare")

    def compare(
        self, prompt: Any, negative_prompt: Any, seed: Any, model: Any, preset: Any, steps: Any, guidance_scale: Any,
        second_model: Any, second_preset: Any, second_steps: Any, second_guidance_scale: Any, lora: Any = NO_LORA,
        lora_weight: Any = 1.0, second_lora: Any = NO_LORA, second_lora_weight: Any = 1.0,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Draw one prompt with one seed in two ways: status, preview, both pictures, their settings and seconds."""
        common = {"prompt": prompt, "negative_prompt": negative_prompt, "seed": seed}
        names = ("model", "preset", "steps", "guidance_scale", "lora", "lora_weight")
        models = self.handlers.models
        requests = []
        for values in (
            (model, preset, steps, guidance_scale, lora, lora_weight),
            (second_model, second_preset, second_steps, second_guidance_scale, second_lora, second_lora_weight),
        ):
            size = models[values[0]].default_size if isinstance(values[0], str) and values[0] in models else None
            requests.append(self.handlers.parse(common | dict(zip(names, values)) | {"size": size}))
        finished: list[Update] = []
        for side, request in zip(("Left: ", "Right: "), requests):
            pixelated = parts.is_pixelated(request.size)
            for update in self.handlers.draw(request):
                preview = gr.HTML(parts.preview(update, pixelated), visible=True) if update.preview else gr.skip()
                hidden = gr.ImageSlider(visible=False) if update.preview else gr.skip()
                yield parts.progress_bar(update, side), preview, hidden, ""
            finished.append(update)
        left, right = (save_picture(update.images[0], request) for update, request in zip(finished, requests))
        seconds = [update.seconds for update in finished]
        slider = gr.ImageSlider((left, right), visible=True, elem_classes=[parts.picture_class(requests[0].size)])
        status = parts.status_line(parts.compared_seconds(*seconds))
        yield status, gr.HTML("", visible=False), slider, parts.comparison_table(requests, seconds)
