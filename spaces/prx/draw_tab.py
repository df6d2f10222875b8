"""The Draw tab: a prompt, its pictures, those of the session, and the ways back to a picture's settings."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import gradio as gr

import handlers as shared
import page_parts as parts
import tab_parts as tab
from diffusers_prx import PromptEnhancer, read_settings
from handlers import REQUEST_FIELDS, Handlers, Picture, to_user_error
from settings import MAX_IMAGES, MAX_PROMPT, NO_LORA, parse_prompt, read_link, read_picture_settings
from tab_parts import AFTER_STEPS, KEPT_SECONDS, PRIVATE, UNQUEUED

CLICK_DRAW = """() => document.querySelector("#draw").click()"""
CLICK_DRAW_IF_LINKED = """(linked) => { if (linked) document.querySelector("#draw").click(); }"""
COPY_LINK = """() => {
    const link = document.querySelector("#made a");
    if (!link) return "A changed picture has no link";
    navigator.clipboard.writeText(link.href);
    return "Link copied";
}"""


class DrawTab:
    """Draw a prompt. Its controls serve the Edit tab too.

    Args:
        page: page that it is on.
        handlers: handlers of the page.
        header: header of the page, which shows the model.
        enhancer: function that rewrites prompts, or None.
    """

    def __init__(self, page: gr.Blocks, handlers: Handlers, header: gr.HTML, enhancer: PromptEnhancer | None):
        self.handlers, self.enhancer, self.work = handlers, enhancer, tab.Workspace()
        first, work = handlers.first_example, self.work
        with gr.Row(elem_classes=["workspace", "with-examples"]):
            self.examples = tab.thumbnails(
                "Examples: choose one to draw its like", **self.example_gallery(handlers.initial_model.name)
            )
            with gr.Column(elem_classes="ask", min_width=280):
                work.ask("Draw", "draw", first)
                enhance = gr.Button("Enhance the prompt", visible=enhancer is not None)
            with gr.Column(elem_classes="answer", min_width=280):
                work.answer()
                self.gallery = tab.picture_gallery(handlers, "Picture", [(first[1], first[0])] if first else None)
                with gr.Row(visible=False) as actions:
                    self.to_edit = gr.Button("Change this picture", size="sm")
                    copy = gr.Button("Copy link", size="sm", elem_id="copy-link")
                self.details = gr.HTML(elem_classes="details", elem_id="made")
                self.history_gallery = tab.thumbnails(
                    "Your pictures: choose one to go back to it", visible=False,
                    elem_classes=["thumbnails", parts.picture_class(handlers.initial_model.default_size)],
                )  # fmt: skip
            with gr.Column(elem_classes="options", min_width=280):
                self.images = gr.Radio(list(range(1, MAX_IMAGES + 1)), value=1, label="Number of pictures")
                self.seed, self.keep = tab.seed_controls()
                self.controls = controls = tab.Controls(handlers)
            restored = gr.File(
                label="Drop a picture of this page to get its settings back", file_types=["image"], height=100,
                elem_classes="restore",
            )  # fmt: skip
        self.drawn = gr.State([], time_to_live=KEPT_SECONDS)  # pictures in the gallery
        self.history = gr.State([], time_to_live=KEPT_SECONDS)
        self.inputs = [work.prompt, controls.negative, controls.model, controls.size, controls.preset, controls.steps]
        self.inputs += [controls.guidance, self.seed, self.images, *controls.loras]
        self.history_outputs = [self.history, self.history_gallery]
        filled = [*self.inputs, self.keep]

        drawing = work.on_start(
            self.draw, self.inputs, [self.gallery, self.details, self.drawn], self.seed, self.keep, "draw"
        )
        drawing.success(shared.add_to_history, [self.drawn, self.history], self.history_outputs, **AFTER_STEPS)
        drawing.success(offer_actions, None, [actions, copy], **AFTER_STEPS)
        # `change`: also when a link or a picture chooses the model
        controls.model.change(self.introduce, controls.model, [header, self.examples], **UNQUEUED)
        controls.model.input(self.sizes_of, controls.model, controls.size, **UNQUEUED)
        chosen = self.examples.select(self.example_prompt, controls.model, work.prompt, **UNQUEUED)
        chosen.success(None, None, None, js=CLICK_DRAW)
        self.gallery.select(shared.settings_of_selected, self.drawn, self.details, **UNQUEUED)
        found = [self.gallery, self.details, self.drawn, *filled]
        finding = self.history_gallery.select(self.find_again, self.history, found, **UNQUEUED)
        finding.success(offer_actions, None, [actions, copy], **UNQUEUED)
        copy.click(None, None, copy, js=COPY_LINK)
        restored.upload(self.restore, restored, [work.status, *filled], **UNQUEUED)
        if enhancer is not None:
            begin = enhance.click(None, None, work.status, js=f"() => `{parts.WAITING}`", **PRIVATE)
            outputs = [work.prompt, work.status]
            enhancing = begin.then(self.enhance, work.prompt, outputs, concurrency_limit=1, **PRIVATE)
            enhancing.failure(lambda: "", None, work.status, **PRIVATE)
        linked = gr.Textbox(visible=False)
        opening = page.load(self.open_link, None, [linked, work.status, *filled], **UNQUEUED)
        opening.success(None, linked, js=CLICK_DRAW_IF_LINKED)

    def draw(
        self, prompt: Any, negative_prompt: Any, model: Any, size: Any, preset: Any, steps: Any, guidance_scale: Any,
        seed: Any, images: Any, lora: Any = NO_LORA, lora_weight: Any = 1.0,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Draw 1 to 4 pictures of a prompt: status, preview, pictures, settings of the first."""
        values = (prompt, negative_prompt, model, size, preset, steps, guidance_scale, seed, images, lora, lora_weight)
        yield from self.handlers.show(self.handlers.parse(dict(zip(REQUEST_FIELDS, values))))

    def enhance(self, prompt: Any) -> tuple[str, str]:
        """Rewrite a prompt as a long caption; return it with the status."""
        assert self.enhancer is not None
        try:
            [caption] = self.enhancer([parse_prompt(prompt)])
        except Exception as error:
            raise to_user_error(error, "Rewriting the prompt") from error
        if len(caption) > MAX_PROMPT:
            return caption[:MAX_PROMPT], parts.status_line(f"The prompt was cut to {MAX_PROMPT} characters.")
        return caption, parts.status_line("The prompt has more detail now. Change it as you like, then draw.")

    # --- ways back to the settings of a picture

    def open_link(self, request: gr.Request) -> list[Any]:
        """Return "yes" if the link holds a valid request, the status, and the values of the controls."""
        if "prompt" not in request.query_params:
            return ["", "", *self.handlers.unchanged()]
        try:
            values = read_link(request.query_params, self.handlers.defaults())
            return ["yes", "", *self.handlers.fill(self.handlers.parse_restored(values))]
        except ValueError as error:  # raised, it would cover the whole page
            return ["", parts.status_line(f"The link cannot be drawn. {error}"), *self.handlers.unchanged()]

    def restore(self, file: str | None) -> list[Any]:
        """Return the status and the values of the controls that drew a picture."""
        handlers = self.handlers
        if file is None:
            return ["", *handlers.unchanged()]
        try:
            settings = read_settings(shared.open_upload({"path": file}))
            if settings is None:
                raise ValueError("It has no settings: only pictures of this page and of diffusers-prx have them.")
            model = self._model_of(settings)
            steps = handlers.models[model].preset_steps
            request = handlers.parse_restored(read_picture_settings(settings, model, steps, handlers.defaults()))
        except ValueError as error:
            text = f"The settings of the picture could not be restored. {error}"
            return [parts.status_line(text), *handlers.unchanged()]
        edited = " It was made from another picture, which you need too." if "strength" in settings else ""
        return [parts.status_line(f"These are the settings of your picture.{edited}"), *handlers.fill(request)]

    def _model_of(self, settings: Mapping[str, Any]) -> str:
        name = settings.get("model")
        for model in self.handlers.models.values():
            if name in (model.source, os.path.basename(model.source)):
                return model.name
        raise ValueError(f"Its model is {str(name)[:40]!r}; here are {', '.join(self.handlers.models)}.")

    def find_again(self, event: gr.SelectData, history: list[Picture]) -> list[Any]:
        """Return a picture of the session, its settings, and the values of the controls."""
        picture = history[event.index]
        return [shared.show_pictures([picture]), picture.table(), [picture], *self.handlers.fill(picture.request)]

    # --- the model

    def introduce(self, name: str) -> tuple[str, Any]:
        """Return header and example pictures of a model."""
        return parts.header(self.handlers.showcases[name]), gr.Gallery(**self.example_gallery(name))

    def sizes_of(self, name: str) -> gr.Dropdown:
        model = self.handlers.models[name]
        return gr.Dropdown(list(model.sizes), value=model.default_size, info=tab.size_hint(model))

    def example_gallery(self, name: str) -> dict[str, Any]:
        """Return settings of the gallery with the example pictures of a model."""
        examples = [(file, prompt) for prompt, file in self.handlers.showcases[name].examples]
        classes = ["thumbnails", "examples", parts.picture_class(self.handlers.models[name].default_size)]
        return {"value": examples, "visible": bool(examples), "elem_classes": classes}

    def example_prompt(self, event: gr.SelectData, model: str) -> str:
        return self.handlers.showcases[model].examples[event.index][0]


def offer_actions() -> tuple[Any, str]:
    """Return the row of actions for a new picture, and the label of "Copy link"."""
    return gr.Row(visible=True), "Copy link"
