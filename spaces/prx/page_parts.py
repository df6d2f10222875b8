"""Theme, styles, example prompts and HTML of the page. User text is always escaped."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import gradio as gr
from PIL import Image

from drawing import Update
from settings import NO_LORA, Request
from showcase import Showcase

MAX_PIXELATED_SIDE = 128  # pixels; smaller pictures are scaled up without smoothing

CODE = "https://github.com/Photoroom/PRX"
PAPER = "https://huggingface.co/blog/Photoroom/prx-part2"
PRESET_WORDS = {"exact": "Best", "fast": "Fast", "fastest": "Preview"}
WAITING = '<p>Waiting for the model</p><progress aria-label="Waiting for the model"></progress>'
EDIT_HINT = """<ol><li>Put a picture in, or choose "Change this picture" below a drawing.</li>
<li>Paint over what should change.</li>
<li>Describe the whole picture as it should be.</li></ol>
<p>The picture is cut to the size of the Draw tab, whose model and quality draw it.</p>"""

# Orange buttons and light gray hints of the default theme have a contrast below 4.5, which WCAG 2 asks for small text.
THEME = gr.themes.Default(primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate").set(
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_hover_dark="*primary_600",
    button_cancel_background_fill="#b91c1c",
    button_cancel_background_fill_dark="#b91c1c",
    button_cancel_background_fill_hover="#991b1b",
    button_cancel_background_fill_hover_dark="#991b1b",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    block_label_text_color="*neutral_700",
    block_label_text_color_dark="*neutral_200",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
    link_text_color="*primary_700",
    link_text_color_dark="*primary_300",
)
CSS = """
/* focus ring and progress bar: WCAG 2 asks for a contrast of 3 */
body { --mark: #4338ca; }
body.dark { --mark: #a5b4fc; }
.gradio-container > .main { width: 100%; max-width: 1140px; }
.header h1 { margin: 0; font-size: 1.6rem; }
.header p { margin: 0.1rem 0 0; font-size: 1rem; }
.header a { text-decoration: underline; margin-left: 0.6rem; }
/* prompt, picture and options: side by side, or in this order on a phone */
.workspace { display: grid !important; grid-template: auto 1fr / repeat(2, minmax(0, 1fr)); align-items: start; }
.workspace .answer { grid-area: 1 / 2 / span 2; }
@media (max-width: 700px) {
  .workspace { grid-template: none / minmax(0, 1fr); gap: 0.6rem; }
  .workspace .answer { grid-area: auto; }
}
/* the Draw tab has examples and the place for a dropped picture above, on a phone the latter is last */
.with-examples { grid-template-rows: auto auto 1fr; }
.with-examples .examples { grid-area: 1 / 1; }
.with-examples .restore { grid-area: 1 / 2; align-self: stretch; }
.restore .icon-wrap { display: none; }
.workspace .restore .wrap { padding-top: 1.8rem; } /* below the label */
.with-examples .ask { grid-area: 2 / 1; }
.with-examples .options { grid-area: 3 / 1; }
.with-examples .answer { grid-area: 2 / 2 / span 2; }
@media (min-width: 701px) { .with-examples:not(:has(.examples)) .restore { grid-area: 1 / 1 / auto / span 2; } }
@media (max-width: 700px) {
  .workspace.with-examples { grid-template: none / minmax(0, 1fr); }
  .with-examples > :is(.examples, .restore, .ask, .options, .answer) { grid-area: auto; }
}
.workspace:not(:has(progress)) .stop { display: none !important; }
.progress { min-height: 2.4rem; }
.preview-image img { width: min(100%, 440px); margin: 0 auto; display: block; border-radius: 8px; }
:is(.picture, .thumbnails) .grid-wrap { min-height: 0; max-height: none; overflow: visible; }
.picture .grid-container { max-width: 440px; margin: 0 auto; }
.thumbnails .grid-container { max-width: 680px; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 0.4rem; }
.thumbnails .grid-container { grid-auto-rows: auto; grid-template-rows: auto; }
.thumbnails .grid-wrap { padding-top: 1.8rem; } /* below the label */
.thumbnails .thumbnail-item { aspect-ratio: 1; height: auto; min-height: 0; }
@media (max-width: 700px) { /* prompt and picture in the first screen of a phone */
  .gradio-container > .main { padding: 0.4rem 0.8rem; }
  .header h1 { font-size: 1.2rem; }
  .header p { font-size: 0.85rem; }
  .progress { min-height: 0; }
  .progress:not(:has(p)) { display: none; }
  .preview-image img { width: min(100%, 270px); }
  .picture .grid-container { max-width: 270px; }
}
:is(.picture, .thumbnails) .caption-label { display: none; }
img.pixelated, .pixelated img { image-rendering: pixelated; }
.progress progress { width: 100%; height: 0.7rem; appearance: none; border: 0; border-radius: 6px; overflow: hidden; }
.progress progress, .progress progress::-webkit-progress-bar { background: var(--border-color-primary); }
.progress progress::-webkit-progress-value { background: var(--mark); }
.progress progress::-moz-progress-bar { background: var(--mark); }
.progress p { margin: 0 0 0.3rem; }
.details table { width: 100%; border-collapse: collapse; table-layout: fixed; }
.details th { width: 6rem; text-align: left; vertical-align: top; font-weight: 600; padding: 0.15rem 0; }
.details td { overflow-wrap: anywhere; padding: 0.15rem 0; }
.details :is(table, th, td) { border: 0 !important; font-size: var(--text-sm); }
.details tr { border: solid var(--border-color-primary); border-width: 0 0 1px; }
/* errors have their own message; gradio also writes "Error" over these after a Stop */
:is(.progress, .preview-image, .details) > [data-testid="status-tracker"] { display: none; }
/* opaque, or the thumbnails show through a large picture */
.gallery-container .preview { background: var(--background-fill-primary); backdrop-filter: none; }
[data-testid="slider"] .icon { color: black; } /* arrows on the line between two pictures */
.tabs button.selected { color: var(--primary-700); }
.dark .tabs button.selected { color: var(--primary-300); }
.details a { text-decoration: underline; }
:focus-visible { outline: 3px solid var(--mark) !important; outline-offset: 2px; }
"""


def header(showcase: Showcase) -> str:
    """Return title, sentence and links of a model."""
    links = {"Model": showcase.url, "Code": CODE, "Paper": PAPER}
    anchors = [
        f'<a href="{escape(url)}" target="_blank" rel="noopener">{name}</a>' for name, url in links.items() if url
    ]
    title, description = escape(showcase.title), escape(showcase.description)
    return f"<h1>{title}</h1><p>{description} <span>{' '.join(anchors)}</span></p>"


def is_pixelated(size: str) -> bool:
    return max(map(int, size.split(" x "))) <= MAX_PIXELATED_SIDE


def picture_class(size: str) -> str:
    return "pixelated" if is_pixelated(size) else "smooth"


def progress_bar(update: Update, prefix: str = "") -> str:
    if update.step == 0:
        text = f"{prefix}Getting ready" + (f" ({update.seconds:.0f} s)" if update.seconds >= 1 else "")
    else:
        text = f"{prefix}Step {update.step} of {update.steps}"
    bar = f'<progress max="{update.steps}" value="{update.step}" aria-label="{escape(text)}"></progress>'
    return f"<p>{escape(text)}</p>{bar}"


def status_line(text: str) -> str:
    """Return a line that screen readers announce; the progress bar changes too often for that."""
    return f'<p role="status">{escape(text)}</p>'


def preview(update: Update, pixelated: bool) -> str:
    """Return the preview as an image with its data inside: the server would keep a file for every step."""
    if update.preview is None:
        return ""
    kind, options = ("PNG", {}) if pixelated else ("JPEG", {"quality": 85})
    source = f"data:image/{kind.lower()};base64,{_encoded(update.preview, kind, **options)}"
    description = f"The picture as predicted after step {update.step} of {update.steps}"
    return f'<img class="{"pixelated" if pixelated else "smooth"}" src="{source}" alt="{description}">'


def _encoded(image: Image.Image, kind: str, **options: int) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


def settings_table(request: Request, has_link: bool = True) -> str:
    """Return the settings of one picture, and the link that draws it again."""
    rows = {
        "Prompt": [request.prompt],
        "Negative": [request.negative_prompt],
        "Model": [request.model],
        "LoRA": [_lora(request)],
        "Size": [f"{request.size} pixels"],
        "Quality": [_quality(request)],
        "Guidance": [f"{request.guidance_scale:g}"],
        "Seed": [str(request.seed)],
    }
    link = f'<a href="{escape(request.link())}" target="_blank" rel="noopener">Link that draws this picture again</a>'
    return f"<details><summary>How it was made</summary>{_table(rows)}{link if has_link else ''}</details>"


def comparison_table(requests: Sequence[Request], seconds: Sequence[float]) -> str:
    """Return what differs between two pictures, and the seconds that each took."""
    rows = {
        "Time": [f"{number:.1f} seconds" for number in seconds],
        "Quality": [_quality(request) for request in requests],
        "Model": [request.model for request in requests],
        "LoRA": [_lora(request) for request in requests],
        "Guidance": [f"{request.guidance_scale:g}" for request in requests],
        "Seed": [str(request.seed) for request in requests],
    }
    return _table(rows, '<tr><td></td><th scope="col">Left</th><th scope="col">Right</th></tr>')


def compare_hint(steps: Mapping[str, int], drawn: bool) -> str:
    """Return what the Compare tab shows before it is used: what its `drawn` pair is, or what to do."""
    left, right = (f"{PRESET_WORDS[name]}, {steps.get(name, steps['exact'])} steps" for name in ("exact", "fast"))
    if drawn:
        return (
            f"<p>One prompt, drawn twice. <b>Left: {left}. Right: {right}.</b> Move the line, then try your words.</p>"
        )
    return (
        f"<p>Press <b>Compare</b>: your words are drawn twice from one seed, left {left}, right {right}. Then move the"
        " line between the two pictures: how much does the faster one lose?</p>"
    )


def compared_seconds(left: float, right: float) -> str:
    faster, ratio = ("Right", left / right) if right < left else ("Left", right / left)
    return f"Done. Left took {left:.1f} seconds, right {right:.1f}: {faster.lower()} was {ratio:.1f} times as fast."


def _lora(request: Request) -> str:
    return "" if request.lora == NO_LORA else f"{request.lora}, weight {request.lora_weight:g}"


def _quality(request: Request) -> str:
    return f"{PRESET_WORDS[request.preset]}, {request.steps} steps"


def _table(rows: Mapping[str, Sequence[str]], head: str = "") -> str:
    """Return a table of the rows that hold a text."""
    for name, texts in rows.items():
        if any(texts):
            head += f'<tr><th scope="row">{name}</th>{"".join(f"<td>{escape(text)}</td>" for text in texts)}</tr>'
    return f"<table>{head}</table>"
