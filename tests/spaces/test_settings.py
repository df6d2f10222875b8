"""What can be asked for, in words for a person, and the link that asks for it again."""

from dataclasses import replace
from urllib.parse import parse_qsl

import pytest

from settings import MAX_PROMPT, MAX_SEED, NO_LORA, Request, check_request, read_link

SIZES = {"small": ("32 x 32",), "large": ("640 x 384", "512 x 512")}
RIGHT = {
    "prompt": "a red cat",
    "negative_prompt": "",
    "model": "large",
    "size": "640 x 384",
    "preset": "exact",
    "steps": 28,
    "guidance_scale": 4.0,
    "seed": 0,
    "images": 1,
}


def check(**changes):
    return check_request(RIGHT | changes, SIZES, ["style"])


def test_a_right_request():
    request = check(steps=28.0, seed=MAX_SEED, images=3)  # the page sends 28.0 for 28
    assert request.steps == 28
    assert isinstance(request.steps, int)
    assert request.height_width == (384, 640)
    assert request.seeds == [MAX_SEED, 0, 1]
    assert request.of_image(2) == replace(request, seed=1, images=1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": "  "}, "There is no prompt yet"),
        ({"prompt": None}, "The prompt has to be a text"),
        ({"prompt": "x" * (MAX_PROMPT + 1)}, "The prompt has 1001 characters; at most 1000 are accepted"),
        ({"prompt": "\ud800"}, "characters that are no text"),
        ({"negative_prompt": ["x"]}, "The negative prompt has to be a text"),
        ({"model": "../small"}, "Model: '../small' is not there; accepted: small, large"),
        ({"model": {}}, "Model: {} is not there"),
        ({"model": "small"}, "Size .of small.: '640 x 384' is not there; accepted: 32 x 32"),
        ({"size": "10000 x 10000"}, "Size .of large.: '10000 x 10000' is not there"),
        ({"preset": "slow"}, "Preset: 'slow' is not there; accepted: exact, fast, fastest"),
        ({"steps": 51}, "Steps: 51 came; a whole number from 1 to 50"),
        ({"steps": 2.5}, "Steps: 2.5 came"),
        ({"steps": True}, "Steps: True came"),
        ({"steps": float("nan")}, "Steps: nan came"),
        ({"steps": float("inf")}, "Steps: inf came"),
        ({"steps": "9" * 1000}, "Steps: '9{36}[.]{3} came"),
        ({"guidance_scale": 0.5}, "Guidance: 0.5 came; a number from 1 to 15"),
        ({"guidance_scale": float("nan")}, "Guidance: nan came"),
        ({"seed": -1}, "Seed: -1 came; a whole number from 0 to 2147483647"),
        ({"seed": None}, "Seed: None came"),
        ({"seed": int("9" * 400)}, "Seed: 9{37}[.]{3} came"),  # more than a float can be
        ({"guidance_scale": int("9" * 400)}, "Guidance: 9{37}[.]{3} came"),
        ({"images": 5}, "Number of images: 5 came; a whole number from 1 to 4"),
        ({"lora": "other"}, "LoRA: 'other' is not there; accepted: none, style"),
        ({"lora": "style", "lora_weight": 2.1}, "LoRA weight: 2.1 came; a number from 0 to 2"),
    ],
)
def test_what_is_not_accepted_is_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence) as raised:
        check(**changes)
    assert len(str(raised.value)) < 200
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prompt": "ä & b=c #1 <i>+%20\n?", "negative_prompt": "día", "guidance_scale": 1.1, "seed": MAX_SEED},
        {"lora": "style", "lora_weight": 0.35},
    ],
)
def test_a_link_asks_for_the_same_again(changes):
    request = check(**changes)
    link = request.link()
    assert link.startswith("?")
    assert ("lora" in link) == (request.lora != NO_LORA)
    values = read_link(
        dict(parse_qsl(link[1:])), {"negative_prompt": "", "images": 1, "lora": NO_LORA} | dict.fromkeys(RIGHT)
    )
    values["negative_prompt"], values["images"] = values["negative_prompt"] or "", values["images"] or 1
    assert check_request(values, SIZES, ["style"]) == request


def test_a_link_cannot_ask_for_more_than_the_page():
    numbers = ({"steps": "900"}, {"steps": "1e400"}, {"steps": "9" * 5000}, {"seed": "9" * 400}, {"seed": "x"})
    for query in (*numbers, {"model": "../etc"}):
        with pytest.raises(ValueError, match="accepted"):
            check_request(read_link(query, RIGHT), SIZES, [])
    assert read_link({"__theme": "dark", "__class__": "x"}, RIGHT) == RIGHT


def test_every_field_has_a_limit():
    """A new field of a request that nobody checks would show here: nothing of a wrong type goes through."""
    for name in Request.__dataclass_fields__:
        with pytest.raises(ValueError, match=r"accepted|has to be|no prompt"):
            check(**{name: object()})
