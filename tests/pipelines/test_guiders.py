"""Guiders of diffusers and changes of guidance by callbacks, against loops written by hand."""

import copy
import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, TaylorSeerCacheConfig
from diffusers import PRXTransformer2DModel as StockPRXTransformer2DModel
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
)
from torch import nn

import tiny
from diffusers_prx.models.transformer_prx import PRXAttnProcessor

PROMPTS, NEGATIVE = ["a red cat on the beach", "sunset"], "one small circle"
SHIFT, STEPS, SCALE = 3.0, 5, 3.0
KINDS = ["latent", "pixel"]  # velocity and x-prediction


def pipeline(kind, **changes):
    make, settings = {
        "latent": (tiny.latent_pipeline, {}),
        "pixel": (tiny.pixel_pipeline, tiny.PIXEL_SETTINGS),
    }[kind]
    return make(transformer=tiny.transformer(cls=tiny.RecordingTransformer, **settings), **changes)


def draw(pipe, **kwargs):
    settings = {"generator": tiny.generators(1, 2), "num_inference_steps": STEPS, "output_type": "latent"}
    return pipe(PROMPTS, negative_prompt=NEGATIVE, **settings | kwargs).images


@torch.no_grad()
def by_hand(pipe, combine, weak=None):
    """Draw image by image; `combine(positive, negative, step, state)` returns one velocity from two.

    With a weaker network, `state["weak"]` has its velocities with the prompt and with the negative prompt.
    """
    channels, side = pipe.transformer.config["in_channels"], 32 // pipe.vae_scale_factor
    network = tiny.transformer(**tiny.PIXEL_SETTINGS if channels == 3 else {})  # the same weights
    grid = [1 - i / STEPS for i in range(STEPS + 1)]
    sigmas = [SHIFT * s / (1 + (SHIFT - 1) * s) for s in grid]
    images = []
    for prompt, seed in zip(PROMPTS, (1, 2)):
        noise = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(seed))
        x, state = noise * pipe.config["noise_scale"], {}
        for step in range(STEPS):
            sigma, velocities = sigmas[step], []
            for predict in (network,) if weak is None else (network, weak):
                for text in (prompt, NEGATIVE):
                    embeds, _, _, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
                    output = predict(x, torch.tensor([sigma]), embeds).sample
                    velocities.append((x - output) / sigma if channels == 3 else output)
            velocities, state["weak"] = velocities[:2], velocities[2:]
            x = x + (sigmas[step + 1] - sigma) * combine(*velocities, step, state)
        images.append(x)
    return torch.cat(images)


def plain(positive, negative, step, state):
    return negative + SCALE * (positive - negative)


def in_the_middle(positive, negative, step, state):
    return plain(positive, negative, step, state) if step in (1, 2) else positive


def zero_star(positive, negative, step, state):
    """arXiv 2503.18886: no move in the first step; the negative velocity at its best length."""
    if step == 0:
        return torch.zeros_like(positive)
    products = [(p * n, n * n) for p, n in zip(positive.flatten().tolist(), negative.flatten().tolist())]
    best = math.fsum(pn for pn, _ in products) / math.fsum(nn for _, nn in products)
    return best * negative + SCALE * (positive - best * negative)


def projected(positive, negative, step, state):
    """arXiv 2410.02416: momentum, a largest length, and less of what is parallel to the prediction."""
    state["sum"] = (positive - negative) - 0.5 * state.get("sum", 0)
    change = state["sum"] * min(1.0, 20.0 / state["sum"].double().norm().item())
    direction = positive / positive.double().norm()
    parallel = (change * direction).sum() * direction
    return negative + SCALE * (change - parallel + 0.2 * parallel)


GUIDERS = {
    "plain": (lambda: ClassifierFreeGuidance(SCALE), plain, [4] * 5),
    "interval": (lambda: ClassifierFreeGuidance(SCALE, start=0.2, stop=0.6), in_the_middle, [2, 4, 4, 2, 2]),
    "zero_star": (lambda: ClassifierFreeZeroStarGuidance(SCALE), zero_star, [4] * 5),
    "projected": (
        lambda: AdaptiveProjectedGuidance(
            SCALE,
            adaptive_projected_guidance_momentum=-0.5,
            adaptive_projected_guidance_rescale=20.0,
            eta=0.2,
        ),
        projected,
        [4] * 5,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GUIDERS)
def test_guider_matches_a_loop_by_hand(kind, name):
    """Two calls with one guider: its state belongs to a call."""
    make, combine, rows = GUIDERS[name]
    pipe, guider = pipeline(kind), make()
    expected = by_hand(pipe, combine)
    size = expected.abs().max().item()
    for _ in range(2):
        pipe.transformer.rows = []
        assert (draw(pipe, guider=guider) - expected).abs().max() < 2e-5 * size  # seen: up to 3e-6
        assert pipe.transformer.rows == rows  # outside the interval half the batch
    assert pipe.guidance_scale == SCALE
    assert (expected - by_hand(pipe, lambda positive, *_: positive)).abs().max() > 1e-2 * size


@pytest.mark.parametrize("kind", KINDS)
def test_plain_guider_equals_guidance_scale_with_every_scheduler(kind):
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": SHIFT}
    for scheduler in (
        None,
        FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        DPMSolverMultistepScheduler(**flow),
    ):
        pipe = pipeline(kind, **{} if scheduler is None else {"scheduler": scheduler})
        expected = draw(pipe, guidance_scale=SCALE)
        difference = (draw(pipe, guider=ClassifierFreeGuidance(SCALE)) - expected).abs().max()
        assert difference < 1e-4 * expected.abs().max()


def set_after(step, scale, seen=None):
    def callback(pipeline, done, timestep, tensors):
        if seen is not None:
            seen.append(pipeline.do_classifier_free_guidance)
        if done == step:
            pipeline._guidance_scale = scale

    return {"callback_on_step_end": callback}


@pytest.mark.parametrize("kind", KINDS)
def test_callback_ends_guidance(kind):
    """The transformer then runs on half the batch, as with a guider that stops there."""
    pipe = pipeline(kind)
    expected = draw(pipe, guider=ClassifierFreeGuidance(SCALE, stop=0.4))
    for off in (0.0, 1):
        pipe.transformer.rows, seen = [], []
        images = draw(pipe, guidance_scale=SCALE, **set_after(1, off, seen))
        assert (images - expected).abs().max() < 1e-5 * expected.abs().max()
        assert pipe.transformer.rows == [4, 4, 2, 2, 2]
        assert seen == [True, True, False, False, False]
        assert pipe.guidance_scale == off
    assert (draw(pipe, guidance_scale=SCALE) - expected).abs().max() > 1e-2


def test_callback_changes_the_scale_and_turns_guidance_on_again():
    pipe = pipeline("latent")
    scales = [3.0, 0.0, 5.0, 2.0]

    def combine(positive, negative, step, state):
        scale = ([SCALE, *scales])[step]
        return negative + scale * (positive - negative) if scale > 1 else positive

    def callback(pipeline, step, timestep, tensors):
        if step < len(scales):
            pipeline._guidance_scale = scales[step]

    expected = by_hand(pipe, combine)
    images = draw(pipe, guidance_scale=SCALE, callback_on_step_end=callback)
    assert (images - expected).abs().max() < 2e-5 * expected.abs().max()
    assert pipe.transformer.rows == [4, 4, 2, 4, 4]


@pytest.mark.parametrize("offload", [False, True])
def test_sdcfg_cutoff_callback_of_diffusers(offload):
    pipe = tiny.latent_pipeline()
    if offload:  # no contexts of the text beforehand
        pipe.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    args = {"num_inference_steps": STEPS, "output_type": "latent"}
    call = lambda **given: pipe(PROMPTS[0], generator=tiny.generators(1)[0], **args, **given).images  # noqa: E731
    expected = call(guider=ClassifierFreeGuidance(4.0, stop=0.2))
    images = call(callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.0))
    assert (images - expected).abs().max() < 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match=r"`prompt_embeds` of shape .*SDCFGCutoffCallback"):
        draw(pipe, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.0))  # of two prompts it keeps the last


def test_callback_can_raise_the_scale_at_every_step():
    def callback(pipeline, step, timestep, tensors):
        pipeline._guidance_scale += 1.0
        return tensors

    pipe = pipeline("latent")
    names = pipe._callback_tensor_inputs
    draw(pipe, guidance_scale=2.0, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps


@pytest.mark.parametrize(
    ("change", "scale", "message"),
    [
        ({"guidance_scale": 1.0}, 3.0, "`guidance_scale`"),
        ({"guider": ClassifierFreeGuidance(3.0)}, 0.0, "`guidance_scale`.*`guider`"),
        ({}, 0.5, "`guidance_scale`.*0.5"),
        ({}, math.nan, "`guidance_scale`.*nan"),
        ({}, None, "`guidance_scale`.*None"),
    ],
)
def test_wrong_change_of_guidance_is_refused(change, scale, message):
    with pytest.raises(ValueError, match=message):
        draw(pipeline("latent"), **change, **set_after(1, scale))


def test_callback_cannot_end_guidance_with_a_cache():
    pipe = tiny.latent_pipeline()
    pipe.transformer.enable_cache(TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2))
    with pytest.raises(ValueError, match=r"`guidance_scale`.*disable_cache"):
        draw(pipe, **set_after(1, 0.0))
    changed = draw(pipe, **set_after(1, 2.0))
    assert (changed - draw(pipe)).abs().max() > 1e-3


def test_guider_with_a_transformer_without_contexts():
    other = tiny.latent_pipeline(transformer=tiny.transformer(cls=tiny.EmbeddingsTransformer))
    guider = ClassifierFreeGuidance(SCALE, start=0.2, stop=0.6)
    expected = draw(pipeline("latent"), guider=guider)
    assert (draw(other, guider=guider) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guider": 3.0}, "`guider`.*float"),
        ({"guider": ClassifierFreeGuidance(3.0), "guidance_scale": 3.0}, "`guidance_scale`.*`guider`"),
        ({"guider": ClassifierFreeGuidance(3.0), "self_guidance_scale": 2.0}, "`token_route`"),
        ({"guider": SkipLayerGuidance(3.0, skip_layer_guidance_layers=[2])}, "`guider`.*blocks"),
        ({"guider": AutoGuidance(3.0, auto_guidance_layers=[0], dropout=0.1)}, "`guider`.*`dropout`"),
        ({"guider": SmoothedEnergyGuidance(3.0, seg_guidance_layers=[0])}, "`guider`.*SmoothedEnergyGuidance"),
        ({"guide_transformer": tiny.transformer(), "guidance_scale": 1.0}, "`guide_transformer`.*`guidance_scale`"),
        ({"guide_transformer": tiny.transformer(in_channels=3)}, "`guide_transformer`.*`in_channels`"),
        ({"guide_transformer": 3.0}, "`guide_transformer`.*float"),
        (
            {
                "guide_transformer": tiny.transformer(),
                "guider": AutoGuidance(3.0, auto_guidance_layers=[0], dropout=1.0),
            },
            "`guide_transformer`.*`guider`",
        ),
    ],
)
def test_unsuitable_guider_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        draw(pipeline("latent"), **change)


# --- guiders that change the network


class Alone(PRXAttnProcessor):
    """Attention in which the i-th image token sees the text and the i-th image token, in float64."""

    def attend(self, query, key, value, text_key, text_value, attention_mask):
        output = torch.empty_like(query)
        for token in range(query.shape[1]):
            keys = torch.cat((text_key, key[:, [token]]), dim=1).double()  # (B, L + 1, h, d)
            values = torch.cat((text_value, value[:, [token]]), dim=1).double()  # (B, L + 1, h, d)
            scores = (keys * query[:, [token]]).sum(-1) / query.shape[-1] ** 0.5  # (B, L + 1, h)
            output[:, token] = (scores.softmax(1)[..., None] * values).sum(1)
        return output


def without_a_block(settings):
    network = tiny.transformer(**settings)
    network.blocks = nn.ModuleList([network.blocks[0]])
    network.register_to_config(depth=1)
    return network


def with_lonely_tokens(settings):
    network = tiny.transformer(**settings)
    network.blocks[1].attention.processor = Alone()
    return network


def three_terms(positive, negative, step, state):
    """diffusers' formula for skipped layers; its range leaves the first step out."""
    guided = negative + SCALE * (positive - negative)
    return guided + 1.5 * (positive - state["weak"][0]) if step > 0 else guided


def away_from_weak(which):
    return lambda positive, negative, step, state: state["weak"][which] + SCALE * (positive - state["weak"][which])


def whole_range(name):
    return {f"{name}_guidance_scale": 1.5, f"{name}_guidance_start": 0.0, f"{name}_guidance_stop": 1.0}


CHANGES = {
    "skipped": (
        without_a_block,
        three_terms,
        lambda weak: {"guider": SkipLayerGuidance(SCALE, skip_layer_guidance_layers=[1], **whole_range("skip_layer"))},
    ),
    "perturbed": (
        with_lonely_tokens,
        three_terms,
        lambda weak: {
            "guider": PerturbedAttentionGuidance(
                SCALE,
                perturbed_guidance_layers=[1],
                perturbed_guidance_scale=1.5,
                perturbed_guidance_start=0.0,
                perturbed_guidance_stop=1.0,
            )
        },
    ),
    "auto": (
        without_a_block,
        away_from_weak(1),
        lambda weak: {"guider": AutoGuidance(SCALE, auto_guidance_layers=[1], dropout=1.0)},
    ),
    "guide": (
        lambda settings: tiny.transformer(seed=5, depth=1, **settings),
        away_from_weak(0),
        lambda weak: {"guide_transformer": weak, "guidance_scale": SCALE},
    ),
    "guide with a guider": (
        lambda settings: tiny.transformer(seed=5, depth=1, **settings),
        away_from_weak(0),
        lambda weak: {"guide_transformer": weak, "guider": ClassifierFreeGuidance(SCALE)},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHANGES)
def test_changed_network_matches_a_loop_by_hand(kind, name):
    make_weak, combine, arguments = CHANGES[name]
    weak = make_weak(tiny.PIXEL_SETTINGS if kind == "pixel" else {})
    pipe = pipeline(kind)
    expected = by_hand(pipe, combine, weak)
    size = expected.abs().max().item()
    images = draw(pipe, **arguments(weak))
    assert (images - expected).abs().max() < 2e-5 * size
    assert torch.equal(draw(pipe, **arguments(weak)), images)  # nothing of the first call is left in the networks
    assert (draw(pipe, guidance_scale=SCALE) - expected).abs().max() > 1e-3 * size


def test_changed_network_without_contexts():
    """Under group offloading the text goes into every forward."""
    guider = SkipLayerGuidance(SCALE, skip_layer_guidance_layers=[0], **whole_range("skip_layer"))
    expected = draw(pipeline("latent"), guider=guider)
    other = tiny.latent_pipeline()
    other.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert (draw(other, guider=guider) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_changed_network_is_refused_with_a_cache_and_with_stock():
    guider = SkipLayerGuidance(SCALE, skip_layer_guidance_layers=[0])
    pipe = tiny.latent_pipeline()
    stock = StockPRXTransformer2DModel.from_config(pipe.transformer.config).eval()
    stock.load_state_dict(pipe.transformer.state_dict())
    with pytest.raises(ValueError, match=r"`guider`.*diffusers_prx\.PRXTransformer2DModel"):
        draw(tiny.latent_pipeline(transformer=stock), guider=guider)
    expected = draw(pipe, guide_transformer=(weak := copy.deepcopy(pipe.transformer)))
    pipe.transformer.enable_cache(TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=5))
    with pytest.raises(ValueError, match=r"`guider`.*disable_cache"):
        draw(pipe, guider=guider)
    # a guide has its own network, so that the cache sees the prompts alone
    assert (draw(pipe, guide_transformer=weak) - expected).abs().max() < 1e-5 * expected.abs().max()
    weak.enable_cache(TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2))
    with pytest.raises(ValueError, match=r"`guide_transformer`.*disable_cache"):
        draw(pipe, guide_transformer=weak)
