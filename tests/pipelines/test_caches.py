"""Caches of diffusers, against loops by hand that do what each of them documents."""

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.guiders import ClassifierFreeGuidance

import tiny
from diffusers_prx.models.transformer_prx import PRXAttnProcessor, patchify, unpatchify

PROMPTS, STEPS, DEPTH = ["a red cat on the beach", "sunset"], 8, 4
TOLERANCE = 2e-5  # relative; seen: 2e-6


class CountingProcessor(PRXAttnProcessor):
    """Counts the blocks that run."""

    def __init__(self):
        self.count = 0

    def __call__(self, *args):
        self.count += 1
        return super().__call__(*args)


def pipeline(**settings):
    pipe = tiny.latent_pipeline(transformer=tiny.transformer(depth=DEPTH, **settings))
    counter = CountingProcessor()
    pipe.transformer.set_attn_processor(counter)
    return pipe, counter


def draw(pipe, **kwargs):
    settings = {"generator": tiny.generators(1, 2), "num_inference_steps": STEPS, "output_type": "latent"}
    return pipe(PROMPTS, **settings | kwargs).images


@torch.no_grad()
def step_by_step(pipe, predict):
    """Sample by hand; `predict(tokens, run, step)` returns the output (2B, N, D) of the blocks."""
    embeds, mask, negative, negative_mask = pipe.encode_prompt(PROMPTS)
    network = tiny.transformer(depth=DEPTH)
    txt, joint = network.txt_in(torch.cat((negative, embeds))), torch.cat((negative_mask, mask))
    joint = torch.nn.functional.pad(joint, (0, 64), value=True)[:, None, None]
    x = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    pipe.scheduler.set_timesteps(STEPS)
    sigmas = pipe.scheduler.sigmas

    for step in range(STEPS):
        temb = network._embed_time(sigmas[step, None], 16, 16, torch.float32, None)
        tokens = network.img_in(patchify(x.repeat(2, 1, 1, 1), 2))

        def run(hidden, start, stop, temb=temb):
            for block in network.blocks[start:stop]:
                hidden = block(hidden, txt, temb, network._rotary(8, 8, torch.device("cpu")), joint)
            return hidden

        output = unpatchify(network.final_layer(predict(tokens, run, step), temb), 2, 16, 16)
        negative_velocity, velocity = output.chunk(2)
        velocity = negative_velocity + 4.0 * (velocity - negative_velocity)
        x = x + (sigmas[step + 1] - sigmas[step]) * velocity
    pipe.scheduler.num_inference_steps = None
    return x


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def test_first_block_cache():
    """All blocks run if the residual of the first one changed by more than the threshold."""
    threshold, state, ran = 1.25, {}, []

    def predict(tokens, run, step):
        head = run(tokens, 0, 1)
        residual = head - tokens
        old = state.get("residual")
        if old is None or (residual - old).abs().mean() / old.abs().mean() > threshold:
            state["residual"] = residual
            tail = run(head, 1, DEPTH)
            state["rest"] = tail - head
            ran.append(step)
            return tail
        return head + state["rest"]

    pipe, counter = pipeline()
    plain = draw(pipe)
    counter.count = 0
    expected = step_by_step(pipe, predict)
    assert 2 <= len(ran) < STEPS
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    for _ in range(2):  # a second call starts afresh
        counter.count = 0
        assert relative_error(draw(pipe), expected) < TOLERANCE
        assert counter.count == STEPS + (DEPTH - 1) * len(ran)
    assert relative_error(expected, plain) > 1e-4
    pipe.transformer.disable_cache()
    assert torch.equal(draw(pipe), plain)


def test_mag_cache():
    """While the product of the ratios stays near 1, a step adds the last residual instead of running blocks."""
    ratios = [1.0, 1.1, 0.99, 0.98, 1.0, 1.2, 0.99, 1.0]
    state = {"ratio": 1.0, "error": 0.0, "skipped": 0}

    def predict(tokens, run, step):
        if step >= 2:  # a quarter of the steps is kept
            state["ratio"] *= ratios[step]
            state["skipped"] += 1
            state["error"] += abs(1 - state["ratio"])
            if state["error"] <= 0.05 and state["skipped"] <= 2:
                return tokens + state["residual"]
            state.update(ratio=1.0, error=0.0, skipped=0)
        state["runs"] = state.get("runs", 0) + 1
        tail = run(tokens, 0, DEPTH)
        state["residual"] = tail - tokens
        return tail

    pipe, counter = pipeline()
    expected = step_by_step(pipe, predict)
    assert 2 < state["runs"] < STEPS
    config = {"threshold": 0.05, "max_skip_steps": 2, "retention_ratio": 0.25, "num_inference_steps": STEPS}
    pipe.transformer.enable_cache(MagCacheConfig(mag_ratios=ratios, **config))
    for _ in range(2):
        counter.count = 0
        assert relative_error(draw(pipe), expected) < TOLERANCE
        assert counter.count == DEPTH * state["runs"]


def test_taylor_seer():
    """In lite mode the final layer's output is extrapolated and no block runs; otherwise attention is extrapolated."""
    pipe, counter = pipeline()
    plain = draw(pipe)
    errors = {}
    for lite in (True, False):
        for order in (0, 1):
            pipe.transformer.enable_cache(
                TaylorSeerCacheConfig(
                    cache_interval=2,
                    disable_cache_before_step=3,
                    max_order=order,
                    taylor_factors_dtype=torch.float32,
                    use_lite_mode=lite,
                )
            )
            counter.count = 0
            image = draw(pipe)
            assert counter.count == DEPTH * 5  # steps 3, 5 and 7 extrapolate
            assert torch.equal(draw(pipe), image)
            errors[lite, order] = relative_error(image, plain)
            pipe.transformer.disable_cache()
    assert all(1e-4 < error < 0.5 for error in errors.values()), errors


def test_pyramid_attention_broadcast():
    pipe, counter = pipeline()
    config = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (0, 1001)}
    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: pipe.current_timestep, **config)
    )
    counter.count = 0
    images = draw(pipe)
    assert counter.count < DEPTH * STEPS
    assert torch.equal(draw(pipe), images)


@pytest.mark.parametrize(
    "cache",
    [
        FirstBlockCacheConfig(0.1),
        MagCacheConfig(mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS),
        TaylorSeerCacheConfig(2, disable_cache_before_step=2),
    ],
)
def test_caches_with_compiled_blocks(cache, fresh_dynamo):
    """Graphs may break: diffusers' hooks inside a block cannot be compiled."""
    pipe = tiny.latent_pipeline()  # a counter would be compiled anew at every count
    pipe.transformer.enable_cache(cache)
    expected = draw(pipe)
    pipe.transformer.compile_repeated_blocks(dynamic=True, backend="eager")
    assert relative_error(draw(pipe), expected) < TOLERANCE


def test_call_after_an_interrupted_one_starts_afresh():
    pipe, _ = pipeline()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1.25))
    expected = draw(pipe)

    def fail(pipeline, step, timestep, tensors):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, callback_on_step_end=fail)
    assert torch.equal(draw(pipe), expected)


def test_unsuitable_caches_are_refused():
    model = tiny.transformer(depth=DEPTH)
    with pytest.raises(ValueError, match="`config` is a FasterCacheConfig"):
        model.enable_cache(FasterCacheConfig())
    for settings in ({"depth": 4, "fusion_range": [1, 3]}, {"depth": 1}):
        with pytest.raises(ValueError, match=r"`config`.*`fusion_range`"):
            tiny.transformer(**settings).enable_cache(FirstBlockCacheConfig())
    pipe, _ = pipeline()
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=STEPS + 1))
    with pytest.raises(ValueError, match=f"`num_inference_steps`.*{STEPS + 1}.*{STEPS}"):
        draw(pipe)
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match=r"`guider`.*cache"):
        draw(pipe, guider=ClassifierFreeGuidance(3.0, stop=0.5))
    assert draw(pipe, guider=ClassifierFreeGuidance(3.0)).isfinite().all()
