"""The Edit tab: image to image, or inpainting where a picture is painted over."""

from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image, ImageChops, ImageOps

import handlers as shared
import page_parts as parts
from draw_tab import DrawTab
from drawing import Edit
from handlers import REQUEST_FIELDS, Handlers, Picture, open_upload, to_user_error
from pictures import MIN_EDITOR_SIDE, enlarge, open_picture
from settings import MIN_STRENGTH, NO_LORA, parse_strength
from tab_parts import AFTER_STEPS, KEPT_SECONDS, UNQUEUED, Workspace, picture_gallery


class EditTab:
    """Change a picture.

    Args:
        handlers: handlers of the page.
        drawing: the Draw tab, whose controls and history it shares.
        tabs: tabs of the page.
        tab: the one that this fills.
    """

    def __init__(self, handlers: Handlers, drawing: DrawTab, tabs: gr.Tabs, tab: gr.Tab):
        self.handlers, work, first = handlers, Workspace(), handlers.first_example
        side = max(MIN_EDITOR_SIDE, *map(int, handlers.initial_model.default_size.split(" x ")))
        with gr.Row(elem_classes="workspace"):
            with gr.Column(elem_classes="ask", min_width=280):
                editor = gr.ImageEditor(
                    label="Paint here",
                    sources=("upload", "clipboard"), transforms=(), layers=False,
                    brush=gr.Brush(colors=["#6366f1"], color_mode="fixed", default_size=side // 8), eraser=gr.Eraser(),
                    format="png", canvas_size=(side, side), fixed_canvas=True, height=420, buttons=[],
                )  # fmt: skip
                work.ask("Change", "edit", first)
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
        filled = gr.State(False, time_to_live=KEPT_SECONDS)  # the editor has had a picture
        inputs = [editor, strength, work.prompt, *drawing.inputs[1:]]
        editing = work.on_start(self.edit, inputs, [gallery, details, drawn], drawing.seed, drawing.keep, "edit")
        editing.success(shared.add_to_history, [drawn, drawing.history], drawing.history_outputs, **AFTER_STEPS)
        editing.success(lambda: gr.Button(visible=True), None, again, **AFTER_STEPS)
        gallery.select(shared.settings_of_selected, drawn, details, **UNQUEUED)
        if first:
            # an editor in a hidden tab does not show its initial value
            tab.select(
                lambda filled: (gr.skip() if filled else editor_value(first[1]), True),
                filled,
                [editor, filled],
                **UNQUEUED,
            )
        to_edit = {"fn": to_editor, "outputs": [editor, work.prompt, tabs, filled], **UNQUEUED}
        again.click(inputs=drawn, **to_edit)
        drawing.to_edit.click(inputs=drawing.drawn, **to_edit)

    def edit(
        self, picture: Any, strength: Any, prompt: Any, negative_prompt: Any, model: Any, size: Any, preset: Any,
        steps: Any, guidance_scale: Any, seed: Any, images: Any, lora: Any = NO_LORA, lora_weight: Any = 1.0,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Change a picture, where its layers are painted or everywhere: status, preview, pictures, settings."""
        values = (prompt, negative_prompt, model, size, preset, steps, guidance_scale, seed, images, lora, lora_weight)
        request = self.handlers.parse(dict(zip(REQUEST_FIELDS, values)))
        try:
            edit = read_edit(picture, parse_strength(strength), request.height_width)
        except ValueError as error:
            raise to_user_error(error) from error
        yield from self.handlers.show(request, edit)


def read_edit(value: Any, strength: float, height_width: tuple[int, int]) -> Edit:
    """Read the value of the editor: a picture, and a mask of what is painted over it.

    Raises:
        ValueError: if the editor is empty, or its picture cannot be read.
    """
    background = value.get("background") if isinstance(value, dict) else None
    if not isinstance(background, dict):
        raise ValueError("The editor is empty: put a picture into it.")
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


def to_editor(pictures: list[Picture]) -> tuple[Any, ...]:
    """Return the first picture for the editor, its prompt, the tab to open, and that the editor has had a picture."""
    if not pictures:  # the next ones are being drawn
        return gr.skip(), gr.skip(), gr.skip(), gr.skip()
    picture = pictures[0]
    return editor_value(picture.file), picture.request.prompt, gr.Tabs(selected="edit"), True


def editor_value(file: str) -> dict[str, Any]:
    image = enlarge(open_picture(file).convert("RGB"))
    return {"background": image, "layers": [], "composite": image}
