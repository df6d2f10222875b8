"""Theme, styles, example prompts and HTML of the page. User text is always escaped."""

import base64
import io
from html import escape

import gradio as gr
from PIL import Image

from drawing import Update
from model_cache import ModelInfo
from settings import NO_LORA, Request

MAX_PIXELATED_SIDE = 128  # pixels; smaller pictures are scaled up without smoothing

SCENE_PROMPTS = (
    "a big red circle at the top left and a small blue square in the lower right corner on a white background.",
    "a large green triangle in the upper right corner on a black background.",
    "a small yellow cross at the bottom left and a large purple circle at the top right on a black background.",
)
PHOTO_PROMPTS = (
    "A front-facing portrait of a lion in the golden savanna at sunset",
    "A digital painting of a rusty, vintage tram on a sandy beach",
    "A cup of coffee on a wooden table by a rainy window, soft morning light",
)

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
.preview-image img { width: min(100%, 512px); margin: 0 auto; display: block; border-radius: 8px; }
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
.tabs button.selected { color: var(--primary-700); }
.dark .tabs button.selected { color: var(--primary-300); }
.details a { text-decoration: underline; }
:focus-visible { outline: 3px solid var(--mark) !important; outline-offset: 2px; }
"""


def example_prompts(model: ModelInfo) -> list[list[str]]:
    """Return prompts as samples of a gr.Dataset; small models are trained on drawn scenes."""
    return [[prompt] for prompt in (SCENE_PROMPTS if is_pixelated(model.default_size) else PHOTO_PROMPTS)]


def is_pixelated(size: str) -> bool:
    return max(map(int, size.split(" x "))) <= MAX_PIXELATED_SIDE


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


def preview(update: Update, pixelated: bool, final: bool = False) -> str:
    """Return the preview as an image with its data inside: the server would keep a file for every step."""
    if update.preview is None:
        return ""
    kind, options = ("PNG", {}) if pixelated or final else ("JPEG", {"quality": 85})
    source = f"data:image/{kind.lower()};base64,{_encoded(update.preview, kind, **options)}"
    description = "The picture" if final else f"The picture as predicted after step {update.step} of {update.steps}"
    return f'<img class="{"pixelated" if pixelated else "smooth"}" src="{source}" alt="{description}">'


def _encoded(image: Image.Image, kind: str, **options: int) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


def settings_table(request: Request) -> str:
    """Return the settings of one picture, and the link that draws it again."""
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
