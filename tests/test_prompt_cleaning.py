"""Prompt cleaning, against stock on ordinary prompts, difficult ones, and random mixtures of difficult pieces."""

import html
import importlib.metadata
import logging
import random
import time

import diffusers
import pytest
import torch
from diffusers.pipelines.prx.pipeline_prx import TextPreprocessor

import tiny
from diffusers_prx.prompt_cleaning import CLEANERS, clean_prompt, repair_prompt

# separated by |, with odd signs written as escapes
PIECES = """A cat|https://foo.com/bar?x=1|www.x.ru|me@mail.com|@user_1|\u6f22\u5b57|\u3400|\u2013\u2014\u2010|\xabq\xbb
\u201csmart\u201d|\u2018s\u2019|`b`|\"\"\"X\"\"\"|''|&quot;|&amp;|&amp|192.168.0.1|1:23 |\\n|#12|#12345|1234567|#1234
file.png|a b.jpeg|...| . |.|***SALE***|#AUS|(x)|[y]|{z}|\\|/|a-b-c-d-e|x_y_z_w_v|jc6640|jc6640vc|6640vc231
free shipping|worldwide free shipping|download free|click for more|png images|page 12|j2d1a2a|100x200|3.5\u04454
 : |a,b|a.b|'quoted'|\"whole\"|%20|50%+|+|\xc3\u0178|&lt;person&gt;|<person>|LOUD|\xe9|\t|\xbd|~|\u2122|_|-|:|;|!
caf\xc3\xa9|http:|www:|a.b|.com|.co|a.com/|a.com@|.com_x|-|/|@|_|a.com\xe9|.jpg|a.|1.|.5x2|1x2.|a1|1a|  . |&#65;|&#0065
"""
PIECES = [piece for line in PIECES.split("\n") for piece in line.split("|")] + ["|", "\n"]


def difficult_prompts():
    rng = random.Random(0)
    for _ in range(1500):
        yield rng.choice([" ", "", "  "]).join(rng.choice(PIECES) for _ in range(rng.randint(0, 8)))
        yield "".join(chr(rng.choice([rng.randint(32, 255), rng.randint(0x2000, 0xA000)])) for _ in range(30))


def test_same_as_stock():
    stock = TextPreprocessor()
    for prompt in difficult_prompts():
        assert clean_prompt(prompt, "full_v1") == stock.clean_text(prompt), repr(prompt)
        assert repair_prompt(prompt) == stock.basic_clean(prompt), repr(prompt)


@pytest.mark.parametrize(
    ("prompt", "current", "first"),
    [
        ("\u201c\u201d a cat", '" a cat', '"" a cat'),  # a pair of quotes becomes one
        ("it\u2019\u2019s a cat", 'it"s a cat', "it''s a cat"),
        ("free shipping - a cat", "a cat", "- a cat"),  # the removed words leave a space before the sign
        ("'a cat' free shipping", "a cat", "a cat'"),
        ("a cat", "a cat", "a cat"),
    ],
)
def test_full_and_full_v1_differ_in_curly_quotes_and_at_the_ends(prompt, current, first):
    assert clean_prompt(prompt) == CLEANERS["full"](prompt) == current
    assert CLEANERS["full_v1"](prompt) == TextPreprocessor().clean_text(prompt) == first


# pieces whose repetitions could make a regular expression quadratic
REPEATED = [
    *". -_/@:;'\"#&%<(a1\u00e9\u6f22\u2013x\u00d7\u00c3\n\t!",
    *("a.", "a-", "a.com", ".com@", "a.com/", "a.com@", "_.com", "www:", "https://", ".png", "a.png", "&amp;amp;"),
    *("&#1", "free ", "worldwide free ", "page 1", "1x", "1.1", "a1", "1:23 ", "#1", "\u00c3\u00a9", "\u00c3\u0192"),
    *(". ", " .a", "'a"),
]


@pytest.mark.parametrize("cleaning", ["full", "light"])
def test_time_is_linear_in_the_length(cleaning):
    """About 5 ms each; a quadratic rule takes seconds for one of them (`"." * 50_000` took 83 s)."""
    for piece in REPEATED:
        text = piece * (10_000 // len(piece)) + "@"
        began = time.process_time()
        CLEANERS[cleaning](text)
        assert time.process_time() - began < 0.5, repr(piece)


@pytest.mark.parametrize("number", ["0" * 5000 + "65", "0" * 9, "9" * 5000, "1114112", "65", "x41"])
def test_long_character_references(number):
    """`html.unescape` raises for more than 4300 digits."""
    short = number.lstrip("0")[:9] or "0"
    assert repair_prompt(f"a &#{number}; b") == repair_prompt(html.unescape(f"a &#{short}; b"))


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("A Digital Painting", "a digital painting"),
        ("a cat, see https://cats.com/1", "a cat, see"),
        ("well-lit, half-open, red-hot, ice-cold", "well lit, half open, red hot, ice cold"),
        ("一只猫 a cat", "a cat"),
        ("", ""),
    ],
)
def test_full_cleaning(prompt, cleaned):
    assert clean_prompt(prompt) == cleaned


def test_light_cleaning_only_repairs():
    assert repair_prompt(" A Cat (&amp;lt;3) - cafÃ© ") == "A Cat (<3) - café"


def test_ftfy_comes_with_the_package():
    """Stock fails without it, and does not require it."""
    assert any(line.startswith("ftfy") for line in importlib.metadata.requires("diffusers-prx") or [])


# --- `caption_cleaning` of a pipeline


@pytest.fixture
def warned(caplog):
    """Capture the warnings of this package and of diffusers, whose loggers do not propagate."""
    logging.getLogger("diffusers").addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    logging.getLogger("diffusers").removeHandler(caplog.handler)


def embeds(pipe, prompt, **arguments):
    return pipe.encode_prompt(prompt, do_classifier_free_guidance=False, **arguments)[0]


@pytest.mark.parametrize("make", [tiny.latent_pipeline, tiny.pixel_pipeline])
def test_pipeline_uses_its_caption_cleaning(make, tmp_path):
    prompt = "free shipping - a RED cat"
    for cleaning, clean in CLEANERS.items():
        pipe = make(caption_cleaning=cleaning)
        assert torch.equal(embeds(pipe, prompt), embeds(pipe, clean(prompt), skip_text_cleaning=True))
        assert torch.equal(
            embeds(pipe, prompt, skip_text_cleaning=True), embeds(make(), prompt, skip_text_cleaning=True)
        )
        full = clean_prompt(prompt, "full_v1" if cleaning == "light" else cleaning)
        assert torch.equal(embeds(pipe, prompt, skip_text_cleaning=False), embeds(pipe, full, skip_text_cleaning=True))
        pipe.save_pretrained(tmp_path / cleaning)
        assert type(pipe).from_pretrained(tmp_path / cleaning).caption_cleaning == cleaning


@pytest.mark.parametrize(
    ("make", "stock_class", "default"),
    [
        (tiny.latent_pipeline, diffusers.PRXPipeline, "full_v1"),
        (tiny.pixel_pipeline, diffusers.PRXPixelPipeline, "light"),
    ],
)
def test_stock_warns_of_a_cleaning_that_is_not_its_own(make, stock_class, default, tmp_path, warned, caplog):
    assert make().caption_cleaning == default  # a pipeline without the setting
    for cleaning in CLEANERS:
        folder = tmp_path / cleaning
        make(caption_cleaning=cleaning).save_pretrained(folder)
        assert ("caption_cleaning" in (folder / "model_index.json").read_text()) == (cleaning != default)
        caplog.clear()
        assert type(stock_class.from_pretrained(folder)) is stock_class
        assert any("caption_cleaning" in text for text in warned()) == (cleaning != default)


@pytest.mark.parametrize("value", ["none", "FULL", True, 1])
def test_unknown_cleaning_is_refused(value):
    with pytest.raises(ValueError, match=r"`caption_cleaning`.*full_v1"):
        tiny.pixel_pipeline(caption_cleaning=value)


@pytest.mark.parametrize("prompt", ["\u4e00\u53ea\u732b", "\u6f22\u5b57", "abc123def"])
def test_prompt_that_cleaning_empties_is_named(prompt, warned, caplog):
    pipe = tiny.latent_pipeline(caption_cleaning="full")
    embeds(pipe, [prompt, "a cat", prompt, "", " "])
    (warning,) = warned()
    assert repr(prompt) in warning
    assert "skip_text_cleaning=True" in warning
    caplog.clear()
    assert not torch.equal(
        embeds(pipe, prompt, skip_text_cleaning=True), embeds(pipe, "")
    )  # the fix in the warning works
    assert warned() == []
    embeds(pipe, "&nbsp;" * 500, skip_text_cleaning=True)
    (warning,) = warned()
    assert "skip_text_cleaning" not in warning  # it would not help
    assert len(warning) < 300
