"""Precomputed text and time contexts: against stock, and with every other feature of the forward."""

import dataclasses
import threading

import pytest
import torch
import torch._dynamo.testing
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import PRXTransformer2DModel as StockPRXTransformer2DModel
from diffusers import PyramidAttentionBroadcastConfig

import tiny
from diffusers_prx.models.token_routing import sample_route

BATCH, TEXT_LENGTH = 3, 7
VARIANTS = {
    "base": {},
    "both": {"bottleneck_size": 12, "resolution_embeds": True, "theta": 500, "time_factor": 700.0},
    "tokens": {"resolution_tokens": True},
    "fusion": {"fusion_range": [1, 2]},
}
LORA_TARGETS = ["attention.img_qkv_proj", "attention.txt_kv_proj", "gate_proj", "modulation.lin"]

# Seen: up to 7e-7 (another order of summation; the norm's own weight in place of a multiplication).
TOLERANCE = 5e-6


def make_inputs(height=8, width=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(BATCH, 4, height, width, generator=generator)
    text = torch.randn(BATCH, TEXT_LENGTH, tiny.TEXT_WIDTH, generator=generator)
    mask = torch.arange(TEXT_LENGTH) < torch.tensor([7, 5, 2])[:, None]
    return images, text, mask


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("variant", ["base", "both"])
@torch.no_grad()
def test_contexts_match_stock_row_by_row(variant, side):
    """All timesteps at once and texts of different lengths, against stock with each row alone, padded and masked."""
    model = tiny.transformer(**VARIANTS[variant])
    stock = StockPRXTransformer2DModel.from_config(model.config).eval()
    stock.load_state_dict(model.state_dict())
    images, text, mask = make_inputs()
    mask = {"left": mask.flip(1), "right": mask, None: torch.ones_like(mask)}[side]
    timesteps = torch.tensor([1.0, 0.7, 0.31, 0.02])
    times = model.encode_timesteps(timesteps, 8, 12)
    cut = tuple(model.encode_text_context(text[[row], mask[row]][None]) for row in range(BATCH))
    padded = model.encode_text_context(text, mask)
    assert padded.keys_values[0][0].shape == (BATCH, TEXT_LENGTH, 2, 16)
    for step, t in enumerate(timesteps):
        expected = torch.cat([stock(images[[row]], t[None], text[[row]], mask[[row]]).sample for row in range(BATCH)])
        for context in (cut, padded, (padded,)):
            actual = model(images, text_context=context, time_context=times.at(step)).sample
            assert relative_error(actual, expected) < TOLERANCE
        other = model(images, text_context=cut, time_context=times.at((step + 1) % 4)).sample
        assert relative_error(other, expected) > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_each_context_alone_and_both(variant):
    model = tiny.transformer(depth=3, **VARIANTS[variant])
    images, text, mask = make_inputs()
    expected = model(images, torch.tensor([0.4]), text, mask).sample
    context = model.encode_text_context(text, mask, 8, 12)
    time = model.encode_timesteps(torch.tensor([0.9, 0.4]), 8, 12).at(1)
    for given in (
        {"timestep": torch.tensor([0.4]), "text_context": context},
        {"time_context": time, "encoder_hidden_states": text, "attention_mask": mask},
        {"time_context": time, "text_context": context},
    ):
        assert relative_error(model(images, **given).sample, expected) < TOLERANCE


@torch.no_grad()
def test_one_row_of_text_serves_a_batch():
    """As in guidance: one negative text for all, and a positive one for each."""
    model = tiny.transformer()
    images, text, mask = make_inputs()
    negative = text[2:, :4]
    contexts = (model.encode_text_context(negative), model.encode_text_context(text, mask))
    actual = model(images.repeat(2, 1, 1, 1), torch.tensor([0.4]), text_context=contexts).sample
    expected = [model(images, torch.tensor([0.4]), negative.expand(3, -1, -1)).sample]
    expected.append(model(images, torch.tensor([0.4]), text, mask).sample)
    assert relative_error(actual, torch.cat(expected)) < TOLERANCE
    assert relative_error(actual[:3], actual[3:]) > 1e-3


def test_contexts_are_immutable_and_thread_safe():
    model = tiny.transformer()
    images, text, _ = make_inputs()
    with torch.no_grad():
        contexts = [model.encode_text_context(text[[row]]) for row in range(BATCH)]
        alone = [model(images, torch.tensor([0.4]), text_context=context).sample for context in contexts]
    with pytest.raises(dataclasses.FrozenInstanceError):
        contexts[0].mask = None
    mixed_up, start = [], threading.Barrier(BATCH)

    @torch.no_grad()
    def work(row):
        start.wait()
        for _ in range(20):
            if not torch.equal(model(images, torch.tensor([0.4]), text_context=contexts[row]).sample, alone[row]):
                mixed_up.append(row)

    threads = [threading.Thread(target=work, args=(row,)) for row in range(BATCH)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not mixed_up


def test_gradients_with_contexts_and_checkpointing():
    model = tiny.transformer(depth=3)
    images, text, mask = make_inputs()

    def gradients(precomputed):
        model.zero_grad(set_to_none=True)
        if precomputed:
            text_context, time = model.encode_text_context(text, mask), model.encode_timesteps(torch.tensor([0.4]))
            output = model(images, text_context=text_context, time_context=time.at(0)).sample
        else:
            output = model(images, torch.tensor([0.4]), text, mask).sample
        output.square().sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients(False)
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        actual = gradients(True)
        for name, gradient in expected.items():
            assert relative_error(actual[name], gradient) < 2e-5, name


@torch.no_grad()
def test_contexts_include_lora_adapters():
    peft = pytest.importorskip("peft")
    model = tiny.transformer()
    images, text, mask = make_inputs()
    base = model(images, torch.tensor([0.4]), text, mask).sample
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=LORA_TARGETS))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.3)
    for scale in (1.0, 0.5, 0.0):
        kwargs = {"attention_kwargs": {"scale": scale}}
        expected = model(images, torch.tensor([0.4]), text, mask, **kwargs).sample
        contexts = {
            "text_context": model.encode_text_context(text, mask, **kwargs),
            "time_context": model.encode_timesteps(torch.tensor([0.4]), **kwargs).at(0),
        }
        assert relative_error(model(images, **contexts, **kwargs).sample, expected) < TOLERANCE
        assert (relative_error(expected, base) > 1e-2) == (scale > 0)
        # the keys were scaled when they were computed
        assert relative_error(model(images, **contexts).sample, expected) < TOLERANCE or scale < 1


@pytest.mark.parametrize("variant", ["base", "fusion"])
@torch.no_grad()
def test_contexts_with_routes_and_features(variant):
    model = tiny.transformer(depth=3, **VARIANTS[variant])
    images, text, mask = make_inputs()
    scores = torch.rand(BATCH, 24, generator=torch.Generator().manual_seed(0))
    route = sample_route(scores, 0.5, 1, 2)
    expected = model(images, torch.tensor([0.4]), text, mask, route=route, feature_block=1)
    contexts = {"text_context": model.encode_text_context(text, mask)}
    contexts["time_context"] = model.encode_timesteps(torch.tensor([0.4])).at(0)
    actual = model(images, **contexts, route=route, feature_block=1)
    assert relative_error(actual.sample, expected.sample) < TOLERANCE
    assert relative_error(actual.features, expected.features) < TOLERANCE
    assert torch.equal(actual.feature_indices, route.kept)
    assert relative_error(model(images, **contexts).sample, expected.sample) > 1e-3


@torch.no_grad()
def test_contexts_with_backends_caches_and_casting():
    model = tiny.transformer()
    images, text, mask = make_inputs()
    contexts = {"text_context": model.encode_text_context(text, mask)}
    contexts["time_context"] = model.encode_timesteps(torch.tensor([0.4])).at(0)
    expected = model(images, **contexts).sample
    for backend in ("_native_math", "native"):
        model.set_attention_backend(backend)
        assert relative_error(model(images, **contexts).sample, expected) < TOLERANCE
    model.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 800),
            current_timestep_callback=lambda: 500,
        )
    )
    for _ in range(4):
        assert torch.equal(model(images, **contexts).sample, expected)
    model.disable_cache()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    plain = model(images, torch.tensor([0.4]), text, mask).sample
    again = {"text_context": model.encode_text_context(text, mask)}
    again["time_context"] = model.encode_timesteps(torch.tensor([0.4])).at(0)
    assert again["time_context"].final.dtype == torch.float32
    assert relative_error(model(images, **again).sample, plain) < TOLERANCE


@torch.no_grad()
def test_encoders_of_contexts_load_an_offloaded_model():
    """Model offloading loads weights in `forward`; these two methods use the weights before."""

    class LoadingHook(ModelHook):
        count = 0

        def pre_forward(self, module, *args, **kwargs):
            self.count += 1
            return args, kwargs

    model, hook = tiny.transformer(), LoadingHook()
    add_hook_to_module(model, hook)
    images, text, _ = make_inputs()
    context = model.encode_text_context(text)
    times = model.encode_timesteps(torch.tensor([0.4]))
    assert hook.count == 2
    model(images, text_context=context, time_context=times.at(0))
    assert hook.count == 3


@torch.no_grad()
def test_bf16_contexts_are_as_close_to_float32():
    images, text, mask = make_inputs()
    model = tiny.transformer(depth=3)
    expected = model(images, torch.tensor([0.4]), text, mask).sample
    model.to(torch.bfloat16)
    images, text = images.bfloat16(), text.bfloat16()
    plain = model(images, torch.tensor([0.4]), text, mask).sample
    times = model.encode_timesteps(torch.tensor([0.4]))
    actual = model(images, text_context=model.encode_text_context(text, mask), time_context=times.at(0)).sample
    assert actual.dtype == torch.bfloat16
    errors = [(x.float() - expected).square().mean().sqrt() / expected.std() for x in (actual, plain)]
    assert errors[0] < 1.25 * errors[1] < 0.05  # seen: 0.0125 and 0.0131


@torch.no_grad()
def test_regional_compilation_compiles_at_most_once_per_shape(fresh_dynamo):
    """Image sizes and text lengths are dynamic; the number of images is not."""
    model, eager = tiny.transformer(), tiny.transformer()
    counter = torch._dynamo.testing.CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=counter)
    compiled = []
    shapes = [((8, 12), 7, 1), ((12, 8), 5, 1), ((16, 12), 6, 1), ((8, 12), 7, 3), ((16, 8), 6, 3)]
    for (height, width), length, rows in 2 * shapes:
        images, text, mask = make_inputs(height, width)
        images, text, mask = images[:rows].repeat(2, 1, 1, 1), text[:rows, :length], mask[:rows, :length]
        before, samples = counter.frame_count, []
        for network in (model, eager):
            negative = network.encode_text_context(text[:1, :2])
            positive = network.encode_text_context(text, mask if rows > 1 else None)
            time = network.encode_timesteps(torch.tensor([0.8, 0.4])).at(1)
            samples.append(network(images, text_context=(negative, positive), time_context=time).sample)
        assert relative_error(*samples) < TOLERANCE
        compiled.append(counter.frame_count - before)
    assert compiled == [1, 0, 0, 1, 0] + 5 * [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_context": None}, "`timestep` or `time_context`"),
        ({"timestep": torch.tensor([0.4])}, "`timestep` or `time_context`"),
        ({"text_context": None}, "`encoder_hidden_states` or `text_context`"),
        ({"text_context": ()}, "`text_context`"),
        ({"attention_mask": torch.ones(3, 7)}, "`attention_mask`"),
        ({"text_context": "rows"}, "`text_context`"),
        ({"text_context": "share"}, "`text_context`"),
        ({"text_context": "depth"}, "`text_context`"),
        ({"time_context": "several"}, "`time_context`"),
        ({"time_context": "depth"}, "`time_context`"),
    ],
)
@torch.no_grad()
def test_wrong_context_is_refused(change, message):
    model, deeper = tiny.transformer(), tiny.transformer(depth=3)
    images, text, _ = make_inputs()
    values = {
        "rows": model.encode_text_context(text[:2]),
        "share": (model.encode_text_context(text[:1]),) * 2,
        "depth": (deeper.encode_text_context(text)),
    }
    times = {"several": model.encode_timesteps(torch.rand(2)), "depth": deeper.encode_timesteps(torch.rand(1))}
    given = {"text_context": model.encode_text_context(text), "time_context": model.encode_timesteps(torch.rand(1))}
    for name, value in change.items():
        choices = values if name == "text_context" else times
        given[name] = choices.get(value, value) if isinstance(value, str) else value
    with pytest.raises(ValueError, match=message):
        model(images, **given)


def test_wrong_input_of_the_encoders_is_refused():
    _, text, mask = make_inputs()
    tokens, embeds = tiny.transformer(resolution_tokens=True), tiny.transformer(resolution_embeds=True)
    with pytest.raises(ValueError, match="`height` and `width`"):
        tokens.encode_text_context(text)
    with pytest.raises(ValueError, match="`height` and `width`"):
        embeds.encode_timesteps(torch.rand(2))
    with pytest.raises(ValueError, match="`encoder_hidden_states`"):
        embeds.encode_text_context(text[..., :3])
    with pytest.raises(ValueError, match="`attention_mask`"):
        embeds.encode_text_context(text, mask[:2])
    with pytest.raises(ValueError, match="`timestep`"):
        embeds.encode_timesteps(torch.tensor(0.4), 8, 12)
