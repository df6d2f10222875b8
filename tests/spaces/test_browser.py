"""The page in a real browser: type, draw, watch, stop, change the model, compare, open a link, on a phone."""

import io
import re
import shutil
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from space_tools import becomes_idle, count_calls

pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")
pytest.importorskip("playwright", reason="playwright is not installed: pip install -e '.[dev]'")

from playwright.sync_api import expect, sync_playwright

import app
import page_parts
import serving
import tiny
from diffusers_prx import PRXPixelPipeline
from drawing import Update
from model_cache import LORA_FILE, ModelCache

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser is installed: apt-get install chromium")

PHONE = {"width": 390, "height": 844}
TIMEOUT = 60_000  # milliseconds

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
def opened(cache, browser, colors: str = "light"):
    """Serve a page and open it in light or dark mode; at the end, fail on errors and requests to other hosts."""
    models = {name: cache.models[name] for name in ("pixels", "latents")}  # the page opens on the first
    served = app.build(models, cache)
    _, url, _ = serving.launch(served, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    context = browser.new_context(viewport={"width": 1280, "height": 900}, base_url=url, color_scheme=colors)
    context.set_default_timeout(TIMEOUT)
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
    page.get_by_label(re.compile("^number input for Steps")).first.fill(str(steps))
    page.keyboard.press("Tab")


def picture_bytes(page) -> bytes:
    """Return the file of the first picture in the gallery."""
    return page.request.get(page.locator(".gallery-container img").first.get_attribute("src")).body()


def fits_width(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_whole_visit(page, cache):
    transformer = count_calls(cache, "pixels", 0.05)
    page.goto("/")
    # type, draw with the keyboard, watch
    bad = "a red cat ${alert(1)} {{7*7}} <img src=x onerror=alert(2)>"
    fill(page, bad, 8)
    page.get_by_label("Prompt", exact=True).first.press("Enter")
    expect(page.locator(".preview-image img")).to_be_visible(timeout=TIMEOUT)
    expect(page.get_by_text("Done in").first).to_be_visible(timeout=TIMEOUT)
    expect(page.locator(".details td").first).to_have_text(bad)
    link = page.locator(".details a").get_attribute("href")
    picture = page.locator(".gallery-container img").first
    expect(picture).to_be_visible()
    drawn = picture_bytes(page)
    for check in (LOW_CONTRAST, UNLABELED):
        assert page.evaluate(check) == []
    # stop
    fill(page, "a blue dog", 50)
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.get_by_text(re.compile("Step [0-9]+ of 50"))).to_be_visible(timeout=TIMEOUT)
    before = transformer.calls
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("Stopped.")).to_be_visible(timeout=TIMEOUT)
    assert becomes_idle(transformer)
    assert transformer.calls < before + 30
    # an error is a sentence
    fill(page, "", 2)
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.get_by_text("The prompt is empty")).to_be_visible(timeout=TIMEOUT)
    # another model, the dice, an example
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name="latents").click()
    page.get_by_role("button", name="Roll the dice").first.click()
    expect(page.get_by_label("Seed").first).not_to_have_value("0")
    page.get_by_role("button", name=re.compile("green triangle")).click()
    expect(page.get_by_label("Prompt", exact=True).first).to_have_value(re.compile("green triangle"))
    fill(page, "a green triangle", 2)
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator(".details").get_by_text("latents", exact=True)).to_be_visible(timeout=TIMEOUT)
    # compare
    page.get_by_role("tab", name="Compare").click()
    panel = page.get_by_role("tabpanel").filter(has=page.get_by_role("button", name="Compare"))
    panel.get_by_label("Prompt", exact=True).fill("a lion")
    for side in ("first", "second"):
        panel.get_by_label(f"number input for Steps ({side})").fill("2")
    panel.get_by_role("button", name="Compare").click()
    expect(panel.get_by_text("Done.", exact=True)).to_be_visible(timeout=TIMEOUT)
    expect(panel.locator(".preview-image img")).to_have_count(2)
    assert page.evaluate(LOW_CONTRAST) == []
    # the link, on a phone: the same picture, no horizontal scrolling
    page.set_viewport_size(PHONE)
    page.goto("/" + link)
    expect(page.get_by_text("Done in").first).to_be_visible(timeout=TIMEOUT)
    expect(page.locator(".details td").first).to_have_text(bad)
    assert page.locator(".details a").get_attribute("href") == link
    assert picture_bytes(page) == drawn
    assert fits_width(page)
    page.get_by_role("tab", name="Compare").click()
    assert fits_width(page)


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


def test_lora_and_weight_controls_work(cache, browser, tmp_path):
    layer = tiny.transformer(**tiny.PIXEL_SETTINGS).blocks[0].up_proj
    parts = {"lora_A": torch.full((1, layer.in_features), 0.5), "lora_B": torch.full((layer.out_features, 1), 0.5)}
    layers = {f"blocks.0.up_proj.{part}.weight": value for part, value in parts.items()}
    PRXPixelPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)

    with opened(ModelCache(cache.models, {"style": tmp_path / LORA_FILE}), browser) as page:
        page.goto("/")

        def draw(lora: str, weight: str) -> list[int]:
            fill(page, "a red cat", 2)
            page.get_by_label("LoRA", exact=True).first.click()
            page.get_by_role("option", name=lora).click()
            page.get_by_label(re.compile("^number input for LoRA weight")).first.fill(weight)
            page.keyboard.press("Tab")
            page.get_by_role("button", name="Draw", exact=True).click()
            expect(page.get_by_text("Done in").first).to_be_visible(timeout=TIMEOUT)
            expected = [] if lora == "none" else [f"style, weight {weight}"]
            expect(page.locator(".details tr").filter(has_text="LoRA").locator("td")).to_have_text(expected)
            picture = Image.open(io.BytesIO(picture_bytes(page)))  # its metadata name the LoRA
            return list(picture.convert("RGB").tobytes())

        without = draw("none", "1")
        assert draw("style", "1") != without
        assert draw("style", "0") == without
