"""Words of a prompt: windows of long prompts, weights, regions and a language model that rewrites prompts."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import PRXTransformer2DModel as StockPRXTransformer2DModel

import tiny
from diffusers_prx.pipelines.prompt_enhancer import PromptEnhancer
from diffusers_prx.pipelines.words import parse_weights, region_tokens

PROMPTS = ["a red cat on the beach", "sunset"]
LONG = "a red cat and a blue dog on the green tram with two small red lion and one big circle in the sunset"
KINDS = ["latent", "pixel"]  # velocity and x-prediction
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
HALVES = [("two blue lion", LEFT), ("one small green tram", RIGHT)]


def pipeline(kind, cls=tiny.RecordingTransformer):
    if kind == "latent":
        return tiny.latent_pipeline(transformer=tiny.transformer(cls=cls))
    return tiny.pixel_pipeline(transformer=tiny.transformer(cls=cls, **tiny.PIXEL_SETTINGS))


def draw(pipe, prompt=PROMPTS, **kwargs):
    settings = {"num_inference_steps": 2, "output_type": "latent", "negative_prompt": "one small circle"}
    count = 1 if isinstance(prompt, str) else len(prompt)
    return pipe(prompt, generator=tiny.generators(*range(count)), **settings | kwargs).images


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# --- weights


@pytest.mark.parametrize(
    ("prompt", "text", "spans"),
    [
        ("a (red:1.3) cat", "a red cat", ((2, 5, 1.3),)),
        ("(a red cat: 0.5 )(, big:2)", "a red cat, big", ((0, 9, 0.5), (9, 14, 2.0))),
        (r"a cat (asleep) \(red:1.3\)", "a cat (asleep) (red:1.3)", ()),
        ("at 9:30 (photo", "at 9:30 (photo", ()),
    ],
)
def test_weights_are_parsed(prompt, text, spans):
    parsed = parse_weights(prompt)
    assert (parsed.text, parsed.spans) == (text, spans)


@pytest.mark.parametrize("prompt", ["(red:much)", "(red:-1)", "(red:11)", "(:1.3)", "(red:1.3", "((red:2) cat:1.3)"])
def test_wrong_weight_is_refused(prompt):
    with pytest.raises(ValueError, match=r"`prompt`.*weight"):
        parse_weights(f"a {prompt} dog")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_one_equal_the_plain_prompt(kind):
    pipe = pipeline(kind)
    expected = draw(pipe)
    weighted = ["a (red:1) cat (on the:1.0) beach", "(sunset:1)"]
    assert torch.equal(draw(pipe, weighted, prompt_weights=True), expected)
    assert torch.equal(draw(pipe, prompt_weights=True), expected)
    assert relative_error(draw(pipe, weighted), expected) > 1e-3  # without the option, parentheses are text


def test_weight_belongs_to_its_tokens():
    """Cleaning changes case and signs before the word; the negative prompt has weights of its own."""
    pipe = pipeline("latent")
    draw(pipe, "@user A  (RED) [the] (Big cat:1.5) red", negative_prompt="(one:0) dog", prompt_weights=True)
    negative, positive = pipe.transformer.weights
    assert positive.tolist() == [[1, 1, 1, 1, 1.5, 1.5, 1]]  # <bos> a red the big cat red
    assert negative.tolist() == [[1, 0, 1]]
    with pytest.raises(ValueError, match=r"`prompt`.*skip_text_cleaning"):
        draw(pipe, "a (@user:2) cat", prompt_weights=True)


def test_weights_without_contexts():
    """Under group offloading the text goes into every forward."""
    prompts = ["a (red:1.8) cat", "(sunset:0.2)"]
    expected = draw(pipeline("latent"), prompts, prompt_weights=True)
    other = tiny.latent_pipeline()
    other.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert relative_error(draw(other, prompts, prompt_weights=True), expected) < 1e-5
    assert relative_error(draw(other, ["a red cat", "sunset"]), expected) > 1e-3


# --- long prompts


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_encoded_one_by_one_and_joined(kind):
    pipe, words = pipeline(kind), LONG.split()
    size = tiny.MAX_TOKENS - 1  # each window starts with <bos>
    windows = [" ".join(words[start : start + size]) for start in range(0, len(words), size)]
    assert len(windows) == 3
    expected = [pipe.encode_prompt(window, do_classifier_free_guidance=False)[0] for window in windows]
    embeds, mask, _, negative_mask = pipe.encode_prompt([LONG, "sunset"], long_prompts="windows")
    assert relative_error(embeds[:1][mask[:1]], torch.cat(expected, dim=1)[0]) < 1e-5
    assert mask.sum(dim=1).tolist() == [len(words) + 3, 2]
    assert negative_mask.sum(dim=1).tolist() == [1, 1]
    short = pipe.encode_prompt(PROMPTS, long_prompts="windows")
    assert all(torch.equal(a, b) for a, b in zip(short, pipe.encode_prompt(PROMPTS)))
    assert relative_error(draw(pipe, LONG, long_prompts="windows"), draw(pipe, LONG)) > 1e-3


def test_weights_reach_into_later_windows():
    pipe = pipeline("latent")
    weighted = LONG.replace("circle", "(circle:3)")
    draw(pipe, weighted, long_prompts="windows", prompt_weights=True)
    weights = pipe.transformer.weights[-1][0]
    place = LONG.split().index("circle")  # in the second window, after two <bos>
    assert weights.nonzero().numel() == len(weights)
    assert (weights != 1).nonzero().flatten().tolist() == [place + 2]


def test_wrong_handling_of_long_prompts_is_refused():
    with pytest.raises(ValueError, match="`long_prompts`"):
        draw(pipeline("latent"), long_prompts="whole")


# --- regions


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_each_region_reads_its_own_text(kind):
    """One step, against the network with a mask that is written token by token."""
    pipe = pipeline(kind)
    areas = [("two blue lion", LEFT), ("one small green tram", (0.5, 0.0, 1.0, 0.5))]
    images = draw(pipe, "sunset", num_inference_steps=1, guidance_scale=1, regions=areas)
    rows = columns = 32 // 4  # pixels per token: a patch of 4, or a patch of 2 latents of 2
    texts = [pipe.encode_prompt(text, do_classifier_free_guidance=False)[0] for text in ("sunset", *dict(areas))]
    owners = [index for index, text in enumerate(texts) for _ in range(text.shape[1])]
    counts = torch.zeros(1, rows * columns, len(owners), dtype=torch.bool)
    for row in range(rows):
        for column in range(columns):
            own = 1 if column < columns // 2 else 2 if row < rows // 2 else 0
            counts[0, row * columns + column] = torch.tensor([owner == own for owner in owners])
    settings = tiny.PIXEL_SETTINGS if kind == "pixel" else {}
    noise = torch.randn(images.shape, generator=tiny.generators(0)[0]) * pipe.config["noise_scale"]
    output = tiny.transformer(**settings)(noise, torch.ones(1), torch.cat(texts, dim=1), counts).sample
    expected = output if kind == "pixel" else noise - output
    assert relative_error(images, expected) < 1e-5
    assert relative_error(draw(pipe, "sunset", num_inference_steps=1, guidance_scale=1), expected) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_region_that_covers_everything_equals_one_prompt(kind):
    """The prompt has no keys left, so that the same kernels run; only the text encoder has another batch (1e-7)."""
    pipe = pipeline(kind)
    expected = draw(pipe, ["a red cat"] * 2)
    images = draw(pipe, PROMPTS, regions=[("a red cat", (0, 0, 1, 1))])
    assert relative_error(images, expected) < 1e-5
    assert pipe.transformer.texts[-1] == (1, 4, False)  # one row, no mask


def test_regions_in_a_batch_with_guidance():
    """Prompt by prompt and all at once, with masks or boxes, and with the text in every forward."""
    pipe = pipeline("latent")
    images = draw(pipe, regions=HALVES)
    for index, prompt in enumerate(PROMPTS):
        generator = tiny.generators(index)[0]
        alone = pipe(
            prompt,
            "one small circle",
            num_inference_steps=2,
            output_type="latent",
            generator=generator,
            regions=HALVES,
        ).images
        assert relative_error(images[[index]], alone) < 1e-5
    right = np.zeros((64, 64))
    right[:, 32:] = 1
    left = PIL.Image.fromarray(np.uint8(255 * (1 - right)))
    masks = [(HALVES[0][0], left), (HALVES[1][0], torch.tensor(right))]
    assert torch.equal(draw(pipe, regions=masks), images)
    other = tiny.latent_pipeline()
    other.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert relative_error(draw(other, regions=HALVES), images) < 1e-5


def test_regions_follow_the_crop_of_the_picture():
    """A picture of 64 x 32 out of 64 x 64: the rows above and below are cropped away and belong to the edges."""
    members = region_tokens([("top", (0, 0, 1, 0.25))], (8, 8), (32, 64), (64, 64)).reshape(8, 8)
    assert members.all(dim=1).tolist() == [True, True, True, False, False, False, False, False]
    scaled = region_tokens([("right", (0.75, 0, 1, 1))], (8, 8), (128, 128), (64, 64)).reshape(8, 8)
    assert scaled.all(dim=0).tolist() == [False] * 6 + [True] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"regions": []}, "`regions`"),
        ({"regions": [("a cat", (0, 0, 0.5))]}, r"`regions\[0\]`"),
        ({"regions": [("a cat", (0, 0, 32, 32))]}, r"`regions\[0\]`.*fractions"),
        ({"regions": [(LEFT, "a cat")]}, r"`regions\[0\]`"),
        ({"regions": [("a cat", (0, 0, 0.01, 0.01))]}, r"`regions\[0\]`.*token"),
        ({"prompt_weights": 1.5}, "`prompt_weights`"),
        ({"prompt_enhancer": "a model"}, "`prompt_enhancer`"),
        ({"prompt_enhancer": lambda prompts: prompts[:1]}, "`prompt_enhancer`.*2 strings"),
    ],
)
def test_wrong_words_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(pipeline("latent"), **arguments)


def test_stock_transformer_has_no_regions_and_weights():
    pipe = tiny.latent_pipeline()
    stock = StockPRXTransformer2DModel.from_config(pipe.transformer.config).eval()
    pipe = tiny.latent_pipeline(transformer=stock)
    for arguments in ({"regions": HALVES}, {"prompt_weights": True}):
        with pytest.raises(ValueError, match=r"diffusers_prx\.PRXTransformer2DModel"):
            draw(pipe, ["a (red:2) cat", "sunset"], **arguments)


# --- a language model that rewrites prompts


def test_enhancer_rewrites_by_seed_alone():
    model, tokenizer = tiny.language_model(), tiny.tokenizer(max_length=64)
    settings = {"template": "a big {prompt} on the", "max_new_tokens": 8}
    enhancer = PromptEnhancer(model, tokenizer, **settings)
    state = torch.get_rng_state()
    first, second = enhancer(["red cat", "sunset"])
    assert torch.equal(torch.get_rng_state(), state)
    assert enhancer(["sunset"]) == [second]
    assert PromptEnhancer(model, tokenizer, **settings, seed=1)(["red cat"]) != [first]
    likely = PromptEnhancer(model, tokenizer, **settings, seed=None)
    assert likely(["red cat"]) == likely(["red cat"])
    with pytest.raises(ValueError, match="`template`"):
        PromptEnhancer(model, tokenizer, template="a picture")


def test_enhanced_prompts_are_drawn():
    pipe = pipeline("latent")
    enhancer = lambda prompts: [f"{prompt} and two small red lion" for prompt in prompts]  # noqa: E731
    expected = draw(pipe, enhancer(PROMPTS))
    assert torch.equal(draw(pipe, prompt_enhancer=enhancer), expected)
    encoded = pipe.encode_prompt(PROMPTS[0], prompt_enhancer=enhancer)
    assert all(torch.equal(a, b) for a, b in zip(encoded, pipe.encode_prompt(enhancer(PROMPTS[:1])[0])))
