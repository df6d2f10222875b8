"""The page in a real browser: draw, watch, stop, go back, restore, edit, compare, open a link, on a phone."""

import io
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

from space_tools import becomes_idle, count_calls

pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")
pytest.importorskip("playwright", reason="playwright is not installed: pip install -e '.[dev]'")

from playwright.sync_api import expect, sync_playwright

import app
import page_parts
import serving
import tiny
from diffusers_prx import PromptEnhancer, PRXPixelPipeline
from drawing import Update
from model_cache import LORA_FILE, ModelCache, find_models

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser is installed: apt-get install chromium")

ROOT = Path(__file__).resolve().parents[2]
PHONE = {"width": 390, "height": 844}
TIMEOUT = 60_000  # milliseconds
expect.set_options(timeout=TIMEOUT)

# contrast of two colors by WCAG 2, and the color behind an element
CONTRAST = """
    const numbers = color => [...color.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
    const light = rgb => rgb.slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = element => {
        for (let e = element; e; e = e.parentElement) {
            const color = numbers(getComputedStyle(e).backgroundColor);
            if (color[3] === 1) return color;
        }
        return [255, 255, 255];
    };
    const contrast = (one, other) => {
        const [a, b] = [one, other].map(light);
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    };"""
# texts below the contrast of 4.5 that WCAG 2 asks for normal text
LOW_CONTRAST = (
    "() => {"
    + CONTRAST
    + """
    const low = [];
    for (const element of document.querySelectorAll("body *")) {
        const text = [...element.childNodes].filter(n => n.nodeType === 3).map(n => n.textContent.trim()).join("");
        if (!text || !element.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true })) continue;
        const ratio = contrast(numbers(getComputedStyle(element).color), behind(element));
        if (ratio < 4.5) low.push(`${text}: ${ratio.toFixed(2)}`);
    }
    return low;
}"""
)
# focusable elements, and the contrast of their focus ring
FOCUS_RINGS = (
    "() => {"
    + CONTRAST
    + """
    const rings = {};
    for (const element of document.querySelectorAll("input, textarea, button, a[href]")) {
        if (!element.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true })) continue;
        element.focus();
        const style = getComputedStyle(element);
        if (document.activeElement !== element || style.outlineStyle !== "solid") continue;
        rings[element.outerHTML.slice(0, 200)] = contrast(numbers(style.outlineColor), behind(element.parentElement));
    }
    return rings;
}"""
)
UNLABELED = """() => [...document.querySelectorAll("input, textarea, select, button")]
    .filter(e => e.checkVisibility())
    .filter(e => ![e.ariaLabel, e.title, e.innerText, e.getAttribute("aria-labelledby"),
        ...[...(e.labels || [])].map(label => label.innerText)].some(name => name && name.trim()))
    .map(e => e.outerHTML.slice(0, 200))"""


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(cache, browser, colors: str = "light", enhancer=None):
    """Serve a page and open it in light or dark mode; at the end, fail on errors and requests to other hosts."""
    # the page opens on the first
    models = {name: cache.models[name] for name in sorted(cache.models, key=lambda name: name == "latents")}
    served = app.build(models, cache, enhancer)
    _, url, _ = serving.launch(served, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    context = browser.new_context(viewport={"width": 1280, "height": 900}, base_url=url, color_scheme=colors)
    context.set_default_timeout(TIMEOUT)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    problems: list[str] = []
    context.on("weberror", lambda error: problems.append(str(error.error)))
    context.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
    own = ("http://127.0.0.1", "http://localhost", "data:", "blob:")
    context.on("request", lambda request: request.url.startswith(own) or problems.append(request.url))
    yield context.new_page()
    assert problems == []
    context.close()
    served.close()


@pytest.fixture
def page(cache, browser):
    with opened(cache, browser) as page:
        yield page


def fill(page, prompt: str, steps: int) -> None:
    page.get_by_label("Prompt", exact=True).first.fill(prompt)
    steps_control = page.get_by_label(re.compile("^number input for Steps")).first
    if not steps_control.is_visible():
        page.get_by_role("button", name="Advanced").click()
    slider = page.get_by_label(re.compile("^range slider for Steps")).first
    for _ in range(20):  # a control that has just been unfolded may take its first value again
        steps_control.fill(str(steps))
        page.keyboard.press("Tab")
        page.wait_for_timeout(200)
        if slider.input_value() == str(steps):
            return
    raise AssertionError(f"Steps stay at {slider.input_value()}.")


def picture_bytes(page) -> bytes:
    """Return the file of the first picture in the gallery."""
    return page.request.get(page.locator(".picture img").first.get_attribute("src")).body()


def drawn_link(page) -> str:
    return page.locator("#made a").get_attribute("href")


def paint(page) -> None:
    """Paint over the middle of the picture in the editor."""
    box = page.locator("canvas").first.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 40, middle[1] + 40, steps=5)
    page.mouse.up()


def fits_width(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_whole_visit(page, cache, tmp_path):
    transformer = count_calls(cache, "pixels", 0.05)
    page.goto("/")
    draw = page.get_by_role("button", name="Draw", exact=True)
    stop = page.get_by_role("button", name="Stop").first
    expect(stop).to_be_hidden()
    # type, draw with the keyboard, watch
    bad = "a red cat ${alert(1)} {{7*7}} <img src=x onerror=alert(2)>"
    fill(page, bad, 8)
    page.get_by_label("Prompt", exact=True).first.press("Enter")
    expect(page.locator(".preview-image img").first).to_be_visible(timeout=TIMEOUT)
    expect(stop).to_be_visible()
    expect(page.get_by_text("Done in").first).to_be_visible(timeout=TIMEOUT)
    expect(stop).to_be_hidden()
    page.get_by_text("How it was made").first.click()
    expect(page.locator("#made td").first).to_have_text(bad)
    link, drawn = drawn_link(page), picture_bytes(page)
    (tmp_path / "drawn.png").write_bytes(drawn)
    page.get_by_role("button", name="Copy link").click()
    expect(page.get_by_role("button", name="Link copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()").endswith(link)
    for check in (LOW_CONTRAST, UNLABELED):
        assert page.evaluate(check) == []
    # again: another seed, four pictures; then back to the first
    page.get_by_label("4", exact=True).check()
    draw.click()
    expect(page.locator(".picture img").nth(3)).to_be_visible(timeout=TIMEOUT)
    assert drawn_link(page) != link
    page.locator(".thumbnails").last.get_by_role("button").nth(4).click()
    expect(page.locator("#made a")).to_have_attribute("href", link)
    assert picture_bytes(page) == drawn
    # stop
    fill(page, "a blue dog", 50)
    draw.click()
    expect(page.get_by_text(re.compile("Step [0-9]+ of 50"))).to_be_visible(timeout=TIMEOUT)
    before = transformer.calls
    stop.click()
    expect(page.get_by_text("Stopped.")).to_be_visible(timeout=TIMEOUT)
    assert becomes_idle(transformer)
    assert transformer.calls < before + 30
    # an error is a sentence
    fill(page, "", 2)
    draw.click()
    expect(page.get_by_text("The prompt is empty")).to_be_visible(timeout=TIMEOUT)
    expect(stop).to_be_hidden()
    # another model; then the settings of the first picture
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name="latents").click()
    expect(page.get_by_role("heading", name="latents")).to_be_visible()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "drawn.png")
    expect(page.get_by_text("settings of your picture")).to_be_visible(timeout=TIMEOUT)
    expect(page.get_by_role("heading", name="pixels")).to_be_visible()
    draw.click()
    expect(page.get_by_text("Done in").first).to_be_visible(timeout=TIMEOUT)
    assert drawn_link(page) == link
    assert picture_bytes(page) == drawn
    # change the picture: paint over its middle
    page.get_by_role("button", name="Change this picture").click()
    panel = page.get_by_role("tabpanel").filter(has=page.get_by_role("button", name="Change", exact=True))
    expect(panel.locator("canvas").first).to_be_visible(timeout=TIMEOUT)
    expect(panel.get_by_label("Prompt", exact=True)).to_have_value(bad)
    paint(page)
    panel.get_by_role("button", name="Change", exact=True).click()
    expect(panel.get_by_text("Done in")).to_be_visible(timeout=2 * TIMEOUT)  # a browser without a GPU is slow here
    changed = Image.open(io.BytesIO(page.request.get(panel.locator(".picture img").get_attribute("src")).body()))
    same = ImageChops.difference(changed.convert("RGB"), Image.open(io.BytesIO(drawn)).convert("RGB"))
    assert same.getpixel((0, 0)) == same.getpixel((31, 31)) == (0, 0, 0)
    assert same.crop((12, 12, 24, 24)).getbbox() is not None
    # compare
    page.get_by_role("tab", name="Compare").click()
    panel = page.get_by_role("tabpanel").filter(has=page.get_by_role("button", name="Compare"))
    panel.get_by_label("Prompt", exact=True).fill("a lion")
    panel.get_by_role("button", name="What is compared").click()
    for side in ("left", "right"):
        panel.get_by_label(f"number input for Steps ({side})").fill("2")
    panel.get_by_role("button", name="Compare", exact=True).click()
    expect(panel.get_by_text("times as fast")).to_be_visible(timeout=TIMEOUT)
    expect(panel.locator(".details td").filter(has_text="Fast, 2 steps")).to_be_visible()
    assert page.evaluate(LOW_CONTRAST) == []
    # the link, on a phone: the same picture, no horizontal scrolling
    page.set_viewport_size(PHONE)
    page.goto("/" + link)
    expect(page.get_by_text("Done in").first).to_be_visible(timeout=TIMEOUT)
    assert drawn_link(page) == link
    assert picture_bytes(page) == drawn
    for tab in ("Draw", "Edit", "Compare"):
        page.get_by_role("tab", name=tab).click()
        assert fits_width(page)


@pytest.mark.parametrize("size", [{"width": 1280, "height": 900}, PHONE])
def test_prompt_and_picture_are_in_the_first_screen(browser, size):
    """With the examples of the repository's model: a click draws one, and the first is in the editor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRX_MODELS", str(ROOT / "model_cards" / "prx-scenes-small"))
        small = ModelCache(find_models(), {})
    with opened(small, browser) as page:
        page.set_viewport_size(size)
        page.goto("/")
        expect(page.get_by_role("heading", name="Shapes and colors")).to_be_visible()
        examples = page.locator(".thumbnails").first.get_by_role("button")
        expect(examples).to_have_count(6)
        picture = page.locator(".picture img").first
        expect(picture).to_be_visible(timeout=TIMEOUT)
        page.evaluate("document.fonts.ready")
        seen = [examples.last, page.get_by_label("Prompt", exact=True).first, picture]
        if size != PHONE:
            seen.append(page.get_by_text("Drop a picture"))
        for element in seen:
            box = element.bounding_box()
            assert box["y"] + box["height"] <= size["height"]
            assert box["x"] + box["width"] <= size["width"]
        examples.nth(1).click()
        expect(page.get_by_label("Prompt", exact=True).first).to_have_value(re.compile("green triangle"))
        expect(page.get_by_text("Done in").first).to_be_visible(timeout=TIMEOUT)
        assert "green+triangle" in drawn_link(page)
        # the editor opens with the example, once
        page.get_by_role("tab", name="Edit").click()
        panel = page.get_by_role("tabpanel").filter(has=page.get_by_role("button", name="Change", exact=True))
        expect(panel.locator("canvas").first).to_be_visible()
        expect(panel.get_by_role("button", name="Undo")).to_be_enabled()
        expect(panel.get_by_text("Upload an image")).to_be_hidden()
        panel.get_by_label("Clear canvas").click()
        expect(panel.get_by_text("Upload an image")).to_be_visible()
        page.get_by_role("tab", name="Draw").click()
        page.get_by_role("tab", name="Edit").click()
        page.wait_for_timeout(2000)  # longer than the answer that fills the editor takes
        expect(panel.get_by_text("Upload an image")).to_be_visible()


def luminance(color) -> float:
    """Return the relative luminance of WCAG 2 of a color from 0 to 255."""
    linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in color[:3])]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colors", ["light", "dark"])
def test_contrast_in_light_and_dark_mode(cache, browser, colors):
    with opened(cache, browser, colors) as page:
        page.goto("/")
        page.add_style_tag(content="* { transition: none !important; }")  # no intermediate colors
        fill(page, "a red cat", 2)
        page.get_by_role("button", name="Draw", exact=True).click()
        expect(page.get_by_text("Done in").first).to_be_visible(timeout=TIMEOUT)
        assert page.locator("body.dark").count() == (colors == "dark")
        assert page.evaluate(LOW_CONTRAST) == []
        # focus rings: browsers draw them around buttons after a key press only
        page.keyboard.press("Tab")
        rings = page.evaluate(FOCUS_RINGS)
        assert len(rings) > 15
        assert {element: ratio for element, ratio in rings.items() if ratio < 3} == {}
        # the painted bar: its two most frequent colors
        bar = page_parts.progress_bar(Update(1, 2, 0.0))
        page.locator(".progress .prose").first.evaluate("(element, bar) => { element.innerHTML = bar }", bar)
        painted = Image.open(io.BytesIO(page.locator("progress").first.screenshot())).convert("RGB")
        most = sorted(painted.getcolors(2**16), reverse=True)[:2]
        assert sum(count for count, _ in most) > 0.9 * painted.width * painted.height
        low, high = sorted(luminance(color) for _, color in most)
        assert (high + 0.05) / (low + 0.05) >= 3, most
        page.get_by_role("tab", name="Compare").click()
        expect(page.get_by_role("button", name="Compare", exact=True)).to_be_visible()
        assert page.evaluate(LOW_CONTRAST) == []


def test_a_language_model_rewrites_the_prompt(cache, browser):
    settings = {"template": "a big {prompt} on the", "max_new_tokens": 8}
    enhancer = PromptEnhancer(tiny.language_model(), tiny.tokenizer(max_length=64), **settings)
    with opened(cache, browser, enhancer=enhancer) as page:
        page.goto("/")
        prompt = page.get_by_label("Prompt", exact=True).first
        prompt.fill("red cat")
        page.get_by_role("button", name="Enhance the prompt").click()
        expect(page.get_by_text("more detail")).to_be_visible()
        [expected] = enhancer(["red cat"])
        expect(prompt).to_have_value(expected)
        prompt.fill("red cat " * 30)  # more than the model's window
        page.get_by_role("button", name="Enhance the prompt").click()
        expect(page.get_by_text("Rewriting the prompt failed")).to_be_visible()
        expect(page.locator("progress")).to_have_count(0)


def test_lora_and_weight_controls_work(cache, browser, tmp_path):
    layer = tiny.transformer(**tiny.PIXEL_SETTINGS).blocks[0].up_proj
    parts = {"lora_A": torch.full((1, layer.in_features), 0.5), "lora_B": torch.full((layer.out_features, 1), 0.5)}
    layers = {f"blocks.0.up_proj.{part}.weight": value for part, value in parts.items()}
    PRXPixelPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)

    with opened(ModelCache(cache.models, {"style": tmp_path / LORA_FILE}), browser) as page:
        page.goto("/")
        page.get_by_label("Keep this seed").first.check()

        def draw(lora: str, weight: str) -> list[int]:
            shown = page.locator(".picture img").first
            before = shown.get_attribute("src") if shown.count() else ""
            fill(page, "a red cat", 2)
            page.get_by_label("LoRA", exact=True).first.click()
            page.get_by_role("option", name=lora).click()
            page.get_by_label(re.compile("^number input for LoRA weight")).first.fill(weight)
            page.keyboard.press("Tab")
            page.get_by_role("button", name="Draw", exact=True).click()
            expect(page.get_by_text("Done in").first).to_be_visible(timeout=TIMEOUT)
            expected = [] if lora == "none" else [f"style, weight {weight}"]
            expect(page.locator("#made tr").filter(has_text="LoRA").locator("td")).to_have_text(expected)
            expect(shown).not_to_have_attribute("src", before)  # the picture may be shown later than its settings
            picture = Image.open(io.BytesIO(picture_bytes(page)))  # its metadata name the LoRA
            assert '"num_inference_steps": 2,' in picture.info["prx"]
            return list(picture.convert("RGB").tobytes())

        without = draw("none", "1")
        assert draw("style", "1") != without
        assert draw("style", "0") == without
