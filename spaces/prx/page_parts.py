"""The HTML that the page is filled with, its colors and its examples. Everything a person wrote is escaped."""

import base64
import io
from html import escape

import gradio as gr
from PIL import Image

from drawing import Update
from model_cache import Model
from settings import NO_LORA, Request

SMALL = 128  # pictures of at most so many pixels are shown as the pixels they are, not smeared over the screen

SCENES = (
    "a big red circle at the top left and a small blue square in the lower right corner on a white background.",
    "a large green triangle in the upper right corner on a black background.",
    "a small yellow cross at the bottom left and a large purple circle at the top right on a black background.",
)
PICTURES = (
    "A front-facing portrait of a lion in the golden savanna at sunset",
    "A digital painting of a rusty, vintage tram on a sandy beach",
    "A cup of coffee on a wooden table by a rainy window, soft morning light",
)

# The default theme's orange buttons and light grey hints are below the contrast of 4.5 that small text needs.
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
/* the ring of the focus and the bar: 3 to what is behind them is what WCAG 2 asks */
body { --mark: #4338ca; }
body.dark { --mark: #a5b4fc; }
.expected img { width: min(100%, 512px); margin: 0 auto; display: block; border-radius: 8px; }
img.small, .small img { image-rendering: pixelated; }
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
/* errors are said in a message of their own; gradio writes "Error" over these after a Stop, too */
:is(.progress, .expected, .details) > [data-testid="status-tracker"] { display: none; }
/* behind a large picture the small ones would shine through */
.gallery-container .preview { background: var(--background-fill-primary); backdrop-filter: none; }
.tabs button.selected { color: var(--primary-700); }
.dark .tabs button.selected { color: var(--primary-300); }
.details a { text-decoration: underline; }
:focus-visible { outline: 3px solid var(--mark) !important; outline-offset: 2px; }
"""


def examples_for(model: Model) -> list[list[str]]:
    """Prompts that a model can be expected to know: one this small knows drawn scenes."""
    return [[prompt] for prompt in (SCENES if is_small(model.default_size) else PICTURES)]


def is_small(size: str) -> bool:
    return max(map(int, size.split(" x "))) <= SMALL


def progress(update: Update, what: str = "") -> str:
    """A bar, and how far it is in words."""
    if update.step == 0:
        text = f"{what}Getting ready" + (f" ({update.seconds:.0f} s)" if update.seconds >= 1 else "")
    else:
        text = f"{what}Step {update.step} of {update.steps}"
    bar = f'<progress max="{update.steps}" value="{update.step}" aria-label="{escape(text)}"></progress>'
    return f"<p>{escape(text)}</p>{bar}"


def said(text: str) -> str:
    """A line that a screen reader reads out; the bar changes too often for that."""
    return f'<p role="status">{escape(text)}</p>'


def preview(update: Update, small: bool, final: bool = False) -> str:
    """The preview inside the page itself: a file for every step would stay on the server's disk."""
    if update.preview is None:
        return ""
    kind, options = ("PNG", {}) if small or final else ("JPEG", {"quality": 85})
    source = f"data:image/{kind.lower()};base64,{_encoded(update.preview, kind, **options)}"
    described = "The picture" if final else f"The picture as expected after step {update.step} of {update.steps}"
    return f'<img class="{"small" if small else "large"}" src="{source}" alt="{described}">'


def _encoded(image: Image.Image, kind: str, **options: int) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


def details(request: Request) -> str:
    """The settings of one picture, and the link that draws it again."""
    rows = {
        "Prompt": request.prompt,
        "Negative": request.negative_prompt,
        "Model": request.model,
        "LoRA": "" if request.lora == NO_LORA else f"{request.lora}, weight {request.lora_weight:g}",
        "Size": f"{request.size} pixels",
        "Preset": f"{request.preset}, {request.steps} steps",
        "Guidance": f"{request.guidance_scale:g}",
        "Seed": str(request.seed),
    }
    cells = [f'<tr><th scope="row">{name}</th><td>{escape(text)}</td></tr>' for name, text in rows.items() if text]
    link = f'<a href="{escape(request.link())}" target="_blank" rel="noopener">Link that draws this picture again</a>'
    return f"<table><caption hidden>Settings of the picture</caption>{''.join(cells)}</table><p>{link}</p>"
