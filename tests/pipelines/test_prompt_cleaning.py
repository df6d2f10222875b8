"""The cleaning against stock's on ordinary prompts, on nasty ones, and on random mixtures of nasty pieces."""

import importlib.metadata
import random

import pytest
from diffusers.pipelines.prx.pipeline_prx import TextPreprocessor

from diffusers_prx.pipelines.prompt_cleaning import clean_prompt, repair_prompt

# one to a line of text, with the odd signs written as escapes
PIECES = """A cat|https://foo.com/bar?x=1|www.x.ru|me@mail.com|@user_1|\u6f22\u5b57|\u3400|\u2013\u2014\u2010|\xabq\xbb
\u201csmart\u201d|\u2018s\u2019|`b`|\"\"\"X\"\"\"|''|&quot;|&amp;|&amp|192.168.0.1|1:23 |\\n|#12|#12345|1234567|#1234
file.png|a b.jpeg|...| . |.|***SALE***|#AUS|(x)|[y]|{z}|\\|/|a-b-c-d-e|x_y_z_w_v|jc6640|jc6640vc|6640vc231
free shipping|worldwide free shipping|download free|click for more|png images|page 12|j2d1a2a|100x200|3.5\u04454
 : |a,b|a.b|'quoted'|\"whole\"|%20|50%+|+|\xc3\u0178|&lt;person&gt;|<person>|LOUD|\xe9|\t|\xbd|~|\u2122|_|-|:|;|!
caf\xc3\xa9"""
PIECES = [piece for line in PIECES.split("\n") for piece in line.split("|")] + ["|", "\n"]


def nasty_prompts():
    rng = random.Random(0)
    for _ in range(1500):
        yield rng.choice([" ", "", "  "]).join(rng.choice(PIECES) for _ in range(rng.randint(0, 8)))
        yield "".join(chr(rng.choice([rng.randint(32, 255), rng.randint(0x2000, 0xA000)])) for _ in range(30))


def test_same_as_stock():
    stock = TextPreprocessor()
    for prompt in nasty_prompts():
        assert clean_prompt(prompt) == stock.clean_text(prompt), repr(prompt)
        assert repair_prompt(prompt) == stock.basic_clean(prompt), repr(prompt)


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
def test_examples(prompt, cleaned):
    assert clean_prompt(prompt) == cleaned


def test_light_cleaning_keeps_what_the_prompt_says():
    assert repair_prompt(" A Cat (&amp;lt;3) - cafÃ© ") == "A Cat (<3) - café"


def test_ftfy_comes_with_the_package():
    """Without it every prompt fails in stock, which does not ask for it."""
    assert any(line.startswith("ftfy") for line in importlib.metadata.requires("diffusers-prx") or [])
