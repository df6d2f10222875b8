"""Requests: accepted values, error messages, links."""

from dataclasses import replace
from urllib.parse import parse_qsl

import pytest

from settings import MAX_PROMPT, MAX_SEED, NO_LORA, Request, parse_request, read_link, read_picture_settings

SIZES = {"small": ("32 x 32",), "large": ("640 x 384", "512 x 512")}
VALID = {
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


def parse(**changes):
    return parse_request(VALID | changes, SIZES, ["style"])


def test_valid_values_make_a_request():
    request = parse(steps=28.0, seed=MAX_SEED, images=3)  # the page sends 28.0 for 28
    assert request.steps == 28
    assert isinstance(request.steps, int)
    assert request.height_width == (384, 640)
    assert request.seeds == [MAX_SEED, 0, 1]
    assert request.for_image(2) == replace(request, seed=1, images=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  "}, "The prompt"),
        ({"prompt": None}, "The prompt"),
        ({"prompt": "x" * (MAX_PROMPT + 1)}, "The prompt .*1001.* 1000"),
        ({"prompt": "\ud800"}, "The prompt"),
        ({"negative_prompt": ["x"]}, "The negative prompt"),
        ({"model": "../small"}, "Model .*: small, large"),
        ({"model": {}}, "Model"),
        ({"model": "small"}, "Size .of small.* '640 x 384'.*: 32 x 32"),
        ({"size": "10000 x 10000"}, "Size .of large."),
        ({"preset": "slow"}, "Preset .*: exact, fast, fastest"),
        ({"steps": 51}, "Steps .* 1 to 50"),
        ({"steps": 2.5}, "Steps"),
        ({"steps": True}, "Steps"),
        ({"steps": float("nan")}, "Steps"),
        ({"steps": float("inf")}, "Steps"),
        ({"steps": "9" * 1000}, "Steps .*'9{36}[.]{3};"),
        ({"guidance_scale": 0.5}, "Guidance .* 1 to 15"),
        ({"guidance_scale": float("nan")}, "Guidance"),
        ({"seed": -1}, "Seed .* 0 to 2147483647"),
        ({"seed": None}, "Seed"),
        ({"seed": int("9" * 400)}, "Seed .*9{37}[.]{3};"),  # more than a float can be
        ({"guidance_scale": int("9" * 400)}, "Guidance .*9{37}[.]{3};"),
        ({"images": 5}, "Number of images .* 1 to 4"),
        ({"lora": "other"}, "LoRA .*: none, style"),
        ({"lora": "style", "lora_weight": 2.1}, "LoRA weight .* 0 to 2"),
    ],
)
def test_an_invalid_value_is_named_in_one_short_line(changes, message):
    with pytest.raises(ValueError, match=message) as raised:
        parse(**changes)
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
def test_a_link_restores_its_request(changes):
    request = parse(**changes)
    link = request.link()
    assert link.startswith("?")
    assert ("lora" in link) == (request.lora != NO_LORA)
    values = read_link(
        dict(parse_qsl(link[1:])), {"negative_prompt": "", "images": 1, "lora": NO_LORA} | dict.fromkeys(VALID)
    )
    values["negative_prompt"], values["images"] = values["negative_prompt"] or "", values["images"] or 1
    assert parse_request(values, SIZES, ["style"]) == request


def test_a_link_has_the_limits_of_the_page():
    numbers = ({"steps": "900"}, {"steps": "1e400"}, {"steps": "9" * 5000}, {"seed": "9" * 400}, {"seed": "x"})
    for query in (*numbers, {"model": "../etc"}):
        with pytest.raises(ValueError, match="accepted"):
            parse_request(read_link(query, VALID), SIZES, [])
    assert read_link({"__theme": "dark", "__class__": "x"}, VALID) == VALID


def test_every_field_is_checked():
    for name in Request.__dataclass_fields__:
        with pytest.raises(ValueError, match="accepted"):
            parse(**{name: object()})


STEPS = {"exact": 28, "fast": 14, "fastest": 7}


def test_settings_of_a_picture_make_its_request_again():
    request = parse(lora="style", lora_weight=0.35, negative_prompt="día")
    settings = {"link": request.link(), "adapters": ["style"]}
    values = read_picture_settings(settings, "large", STEPS, VALID | {"lora": NO_LORA})
    assert parse_request(values, SIZES, ["style"]) == request


@pytest.mark.parametrize(
    ("scheduler", "steps", "preset"),
    [("UniPCMultistepScheduler", 7, "fast"), ("PRXFlowMatchScheduler", 7, "fastest"), ("other", 20, "exact")],
)
def test_settings_of_a_pipeline_call_make_a_request(scheduler, steps, preset):
    settings = {"prompt": "a dog", "negative_prompt": None, "seed": 3, "guidance_scale": 2.0, "height": 384}
    settings |= {"width": 640, "num_inference_steps": steps, "scheduler": {"class": scheduler}}
    request = parse_request(read_picture_settings(settings, "large", STEPS, VALID), SIZES, [])
    expected = parse(prompt="a dog", seed=3, guidance_scale=2.0, steps=steps, preset=preset)
    assert request == expected
    with pytest.raises(ValueError, match="LoRA"):
        read_picture_settings(settings | {"adapters": ["style"]}, "large", STEPS, VALID)
    with pytest.raises(ValueError, match="Seed"):
        parse_request(read_picture_settings(settings | {"seed": None}, "large", STEPS, VALID), SIZES, [])
