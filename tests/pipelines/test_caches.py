"""diffusers' caches between steps, against what each of them says it does."""

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


class Counting(PRXAttnProcessor):
    """Counts the blocks that ran."""

    def __init__(self):
        self.count = 0

    def __call__(self, *args):
        self.count += 1
        return super().__call__(*args)


def pipeline(**settings):
    pipe = tiny.latent_pipeline(transformer=tiny.transformer(depth=DEPTH, **settings))
    counter = Counting()
    pipe.transformer.set_attn_processor(counter)
    return pipe, counter


def draw(pipe, **kwargs):
    settings = {"generator": tiny.generators(1, 2), "num_inference_steps": STEPS, "output_type": "latent"}
    return pipe(PROMPTS, **settings | kwargs).images


@torch.no_grad()
def step_by_step(pipe, predict):
    """The loop by hand; `predict(tokens_in, run, step)` gives the tokens behind the blocks, (2B, N, D)."""
    embeds, mask, negative, negative_mask = pipe.encode_prompt(PROMPTS)
    network = tiny.transformer(depth=DEPTH)
    txt, joint = network.txt_in(torch.cat((negative, embeds))), torch.cat((negative_mask, mask))
    joint = torch.nn.functional.pad(joint, (0, 64), value=True)[:, None, None]
    x = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    pipe.scheduler.set_timesteps(STEPS)
    sigmas = pipe.scheduler.sigmas

    for step in range(STEPS):
        temb = network._embed_time(sigmas[step, None], 16, 16, torch.float32)
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
    """All blocks run when the residual of the first one moved by more than the threshold (random weights: a lot)."""
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
    for _ in range(2):  # a second call starts anew
        counter.count = 0
        assert relative_error(draw(pipe), expected) < TOLERANCE
        assert counter.count == STEPS + (DEPTH - 1) * len(ran)
    assert relative_error(expected, plain) > 1e-4
    pipe.transformer.disable_cache()
    assert torch.equal(draw(pipe), plain)


def test_mag_cache():
    """Steps are left out while the product of the ratios stays near 1; then the last residual is added."""
    ratios = [1.0, 1.1, 0.99, 0.98, 1.0, 1.2, 0.99, 1.0]
    state = {"ratio": 1.0, "error": 0.0, "left_out": 0}

    def predict(tokens, run, step):
        if step >= 2:  # a quarter of the steps is kept
            state["ratio"] *= ratios[step]
            state["left_out"] += 1
            state["error"] += abs(1 - state["ratio"])
            if state["error"] <= 0.05 and state["left_out"] <= 2:
                return tokens + state["residual"]
            state.update(ratio=1.0, error=0.0, left_out=0)
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
    """In lite mode what the final layer gives is extrapolated and no block runs; else their attention is."""
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
            assert counter.count == DEPTH * 5  # of the steps 3, 5 and 7 nothing of that kind is computed
            assert torch.equal(draw(pipe), image)
            errors[lite, order] = relative_error(image, plain)
            pipe.transformer.disable_cache()
    assert all(1e-4 < error < 0.5 for error in errors.values()), errors


def test_pyramid_attention_broadcast_runs_in_the_pipeline():
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
def test_caches_and_compiled_blocks_go_together(cache, fresh_dynamo):
    """Where a graph may break: diffusers' hooks are inside of a block, and not to be compiled."""
    pipe, _ = pipeline()
    pipe.transformer.enable_cache(cache)
    expected = draw(pipe)
    pipe.transformer.compile_repeated_blocks(dynamic=True, backend="eager")
    assert relative_error(draw(pipe), expected) < TOLERANCE


def test_a_call_after_a_broken_one_starts_anew():
    pipe, _ = pipeline()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1.25))
    expected = draw(pipe)

    def fails(pipeline, step, timestep, tensors):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, callback_on_step_end=fails)
    assert torch.equal(draw(pipe), expected)


def test_what_is_refused():
    model = tiny.transformer(depth=DEPTH)
    with pytest.raises(ValueError, match="`config` is a FasterCacheConfig; accepted are"):
        model.enable_cache(FasterCacheConfig())
    for settings in ({"depth": 4, "fusion_range": [1, 3]}, {"depth": 1}):
        with pytest.raises(ValueError, match="at least two blocks and without a `fusion_range`"):
            tiny.transformer(**settings).enable_cache(FirstBlockCacheConfig())
    pipe, _ = pipeline()
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=STEPS + 1))
    with pytest.raises(ValueError, match=rf"`num_inference_steps` of {STEPS + 1}, but this call takes {STEPS} steps"):
        draw(pipe)
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="would mix up one branch and two"):
        draw(pipe, guider=ClassifierFreeGuidance(3.0, stop=0.5))
    assert draw(pipe, guider=ClassifierFreeGuidance(3.0)).isfinite().all()
