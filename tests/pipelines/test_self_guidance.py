"""TREAD's self-guidance, against a loop written by hand, image by image."""

import copy
import itertools
import logging

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    PyramidAttentionBroadcastConfig,
    UniPCMultistepScheduler,
)

import tiny
from diffusers_prx.models.token_routing import TokenRoute
from diffusers_prx.models.transformer_prx import PRXTransformer2DModel
from diffusers_prx.pipelines import PRXPipeline
from diffusers_prx.schedulers import PRXXPredictionScheduler

PROMPTS = ["a red cat on the beach", "sunset"]  # of different lengths: the second is padded
SHIFT, STEPS = 3.0, 4
ROUTE = (1, 3, 0.75)
DEEP = {"depth": 4}


def tread_pipeline(kind="latent", **changes):
    if kind == "pixel":
        model = tiny.transformer(**tiny.PIXEL_SETTINGS | DEEP)
        return tiny.pixel_pipeline(**{"transformer": model, "token_route": ROUTE} | changes)
    fusion = {"fusion_range": [1, 3]} if kind == "sprint" else {}
    model = tiny.transformer(**DEEP, **fusion)
    return tiny.latent_pipeline(**{"transformer": model, "token_route": ROUTE} | changes)


def draw(pipe, seeds=(1, 2), prompt=PROMPTS, scale=2.5, **kwargs):
    settings = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "latent"}
    settings["self_guidance_scale"] = scale
    generator = tiny.generators(*seeds)
    generator = generator[0] if len(generator) == 1 else generator
    return pipe(prompt, generator=generator, **settings | kwargs).images


def difference(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@torch.no_grad()
def by_hand(pipe, seeds, scale, x_prediction):
    """Draw image by image, each from its own generator: first the noise, then the route of each step."""
    channels, patch = pipe.transformer.config["in_channels"], pipe.transformer.config["patch_size"]
    side = 32 // pipe.vae_scale_factor
    tokens = (side // patch) ** 2
    grid = [1 - i / STEPS for i in range(STEPS + 1)]
    sigmas = [SHIFT * s / (1 + (SHIFT - 1) * s) for s in grid]
    images = []
    for prompt, seed in zip(PROMPTS, seeds):
        generator = torch.Generator().manual_seed(seed)
        text, mask, _, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
        x = torch.randn(1, channels, side, side, generator=generator) * pipe.config["noise_scale"]
        for now, after in itertools.pairwise(sigmas):
            order = torch.randn(1, tokens, generator=generator)[0].tolist()
            kept = sorted(sorted(range(tokens), key=order.__getitem__)[: round(tokens * (1 - ROUTE[2]))])
            route = TokenRoute(ROUTE[0], ROUTE[1], torch.tensor([kept]))
            full = pipe.transformer(x, torch.tensor([now]), text, mask).sample
            routed = pipe.transformer(x, torch.tensor([now]), text, mask, route=route).sample
            prediction = (1 - scale) * routed + scale * full
            velocity = (x - prediction) / now if x_prediction else prediction
            x = x + (after - now) * velocity
        images.append(x)
    return torch.cat(images)


@pytest.mark.parametrize("scale", [1.5, 4.0])
@pytest.mark.parametrize("kind", ["latent", "sprint", "pixel", "x_latent"])
def test_self_guidance_matches_a_loop_by_hand(kind, scale):
    changes = {"scheduler": PRXXPredictionScheduler(shift=SHIFT)} if kind == "x_latent" else {}
    pipe = tread_pipeline(kind, **changes)
    expected = by_hand(pipe, (1, 2), scale, kind in ("pixel", "x_latent"))
    image = draw(pipe, scale=scale)
    size = expected.abs().max().item()
    assert difference(image, expected) < 1e-5 * size  # seen: up to 2e-6
    assert difference(image, draw(pipe, scale=1.0)) > 1e-2 * size


@pytest.mark.parametrize("kind", ["latent", "sprint", "pixel"])
def test_row_of_a_batch_equals_the_prompt_alone(kind):
    """With one generator per image, and two images per prompt."""
    pipe = tread_pipeline(kind)
    together = draw(pipe, seeds=(1, 2, 3, 4), num_images_per_prompt=2)
    size = together.abs().max().item()
    for row, seed in enumerate((1, 2, 3, 4)):
        alone = draw(pipe, seeds=(seed,), prompt=PROMPTS[row // 2])
        assert difference(together[[row]], alone) < 1e-5 * size  # seen: up to 2e-6


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_self_guidance_scale_1_changes_nothing(guidance_scale):
    """Neither a bit of the image nor the state of the generator."""
    plain, pipe = tread_pipeline(token_route=None), tread_pipeline()
    states = []
    images = []
    for one, extra in ((plain, {}), (pipe, {}), (pipe, {"self_guidance_scale": 1})):
        generator = torch.Generator().manual_seed(0)
        settings = {"num_inference_steps": STEPS, "output_type": "latent", "generator": generator}
        images.append(one(PROMPTS[0], guidance_scale=guidance_scale, **settings, **extra).images)
        states.append(generator.get_state())
    untouched = torch.Generator().manual_seed(0)
    torch.randn(1, 4, 16, 16, generator=untouched)  # only the initial noise is drawn
    assert all(torch.equal(image, images[0]) for image in images)
    assert all(torch.equal(state, untouched.get_state()) for state in states)


class RouteRecorder(PRXTransformer2DModel):
    """Records the rows and the route of every forward."""

    def forward(self, hidden_states, *args, route=None, **kwargs):
        self.calls = [*getattr(self, "calls", []), (len(hidden_states), route)]
        return super().forward(hidden_states, *args, route=route, **kwargs)


@pytest.mark.parametrize("seeds", [(1, 2), (1,), None])
def test_each_step_and_image_has_its_own_route(seeds):
    """From a list of generators, a single one, and the global one."""
    pipe = tread_pipeline(transformer=tiny.transformer(cls=RouteRecorder, **DEEP))
    given = None if seeds is None else tiny.generators(*seeds)
    given = given[0] if given is not None and len(given) == 1 else given
    settings = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "latent"}
    image = pipe(PROMPTS, generator=given, self_guidance_scale=2.0, **settings).images
    calls = pipe.transformer.calls
    assert [rows for rows, _ in calls] == [2] * 2 * STEPS  # two forwards of B rows for each step
    routes = [route for _, route in calls if route is not None]
    assert len(routes) == STEPS
    assert {(route.start, route.stop, route.kept.shape) for route in routes} == {(1, 3, (2, 16))}  # a quarter of 64
    assert len({tuple(row) for route in routes for row in route.kept.tolist()}) == 2 * STEPS
    if seeds is not None:
        assert torch.equal(draw(pipe, seeds=seeds, scale=2.0), image)


@pytest.mark.parametrize("kind", ["latent", "pixel"])
def test_stock_schedulers(kind):
    """Stock's Euler, which steps along velocities, draws the same; a solver with a memory runs."""
    pipe = tread_pipeline(kind)
    other = copy.copy(pipe)
    other.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    expected = draw(pipe)
    assert difference(draw(other), expected) < 1e-4 * expected.abs().max().item()
    other.scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    assert difference(draw(other), draw(other, scale=1.0)) > 1e-2


def test_embeddings_of_a_callback_reach_both_forwards():
    pipe = tread_pipeline()
    other = pipe.encode_prompt("two blue dog", do_classifier_free_guidance=False)[0]

    def swap(pipeline, step, timestep, tensors):
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    def keep(pipeline, step, timestep, tensors):
        return {}

    names = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    prompt = {"prompt": None, "prompt_embeds": other}
    changed = draw(pipe, seeds=(1,), callback_on_step_end=swap, **names, **prompt)
    same = draw(pipe, seeds=(1,), callback_on_step_end=keep, **names, **prompt)
    assert torch.equal(same, draw(pipe, seeds=(1,), **prompt))
    assert difference(changed, same) > 1e-2


def test_bf16_transformer():
    pipe = tread_pipeline()
    expected = draw(pipe)
    pipe.transformer.to(torch.bfloat16)
    image = draw(pipe)
    assert image.dtype == torch.float32
    assert 0 < difference(image, expected) < 0.05 * expected.abs().max().item()  # seen: 0.01


# --- the route in the pipeline's configuration


def test_route_is_stored_without_warnings(tmp_path):
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("diffusers").addHandler(handler)
    try:
        for name, kind in (("latent", "latent"), ("pixel", "pixel"), ("plain", "latent")):
            route = None if name == "plain" else list(ROUTE)
            pipe = tread_pipeline(kind, token_route=route)
            pipe.save_pretrained(tmp_path / name)
            assert ("token_route" in (tmp_path / name / "model_index.json").read_text()) == (route is not None)
            loaded = type(pipe).from_pretrained(tmp_path / name)
            assert loaded.config.get("token_route") == pipe.config.get("token_route") == (route and ROUTE)
        assert not [message for message in messages if "route" in message]
    finally:
        logging.getLogger("diffusers").removeHandler(handler)


def test_route_can_be_set_while_loading_and_is_copied(tmp_path):
    tread_pipeline(token_route=None).save_pretrained(tmp_path)
    pipe = PRXPipeline.from_pretrained(tmp_path, token_route=ROUTE)
    for other in (pipe, copy.deepcopy(pipe), PRXPipeline.from_pipe(pipe)):
        assert other.config["token_route"] == ROUTE
    assert PRXPipeline.from_pretrained(tmp_path, transformer=None, token_route=ROUTE).config["token_route"] == ROUTE


# --- wrong use


@pytest.mark.parametrize("scale", [0.99, float("nan"), float("inf"), "2", None])
def test_wrong_scale_is_refused(scale):
    with pytest.raises(ValueError, match="`self_guidance_scale`"):
        draw(tread_pipeline(), scale=scale)


def test_self_guidance_needs_a_route_and_no_other_guidance():
    with pytest.raises(ValueError, match=r"`self_guidance_scale`.*`token_route`"):
        draw(tread_pipeline(token_route=None), scale=2.0)
    with pytest.raises(ValueError, match=r"`self_guidance_scale`.*`guidance_scale"):
        draw(tread_pipeline(), scale=2.0, guidance_scale=3.0)
    with pytest.raises(ValueError, match=r"`self_guidance_scale`.*`guidance_scale"):  # its default is above 1
        tread_pipeline()("a cat", self_guidance_scale=2.0)


def test_self_guidance_with_a_cache_is_refused():
    pipe = tread_pipeline()
    expected = draw(pipe)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=lambda: 500,
    )
    pipe.transformer.enable_cache(config)
    with pytest.raises(ValueError, match=r"`transformer\.disable_cache\(\)`"):
        draw(pipe)
    draw(pipe, scale=1.0)
    pipe.transformer.disable_cache()
    assert torch.equal(draw(pipe), expected)


@pytest.mark.parametrize(
    "route",
    [
        3,
        (1, 3),
        (1, 1, 0.5),
        (-1, 3, 0.5),
        (1.0, 3, 0.5),
        (1, 5, 0.5),  # the transformer has 4 blocks
        (1, 3, 0.0),
        (1, 3, 1.0),
        (1, 3, float("nan")),
    ],
)
def test_wrong_route_is_refused(route):
    with pytest.raises(ValueError, match="`token_route`"):
        tread_pipeline(token_route=route)


def test_route_must_be_the_fusion_range():
    with pytest.raises(ValueError, match=r"`token_route`.*`fusion_range`"):
        tread_pipeline("sprint", token_route=(1, 2, 0.5))
