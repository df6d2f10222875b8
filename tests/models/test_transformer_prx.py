"""The transformer: against diffusers' own, against slow float64 mathematics, and with diffusers' features."""

import copy
import json
import logging
import math
import shutil
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch._dynamo.testing
from diffusers import AutoModel, PyramidAttentionBroadcastConfig
from diffusers import PRXTransformer2DModel as StockPRXTransformer2DModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_prx.models.transformer_prx import (
    PRXAttention,
    PRXAttnProcessor,
    PRXRMSNorm,
    PRXTransformer2DModel,
    patchify,
    rotary_table,
    rotate,
    unpatchify,
)

BASE = {
    "in_channels": 4,
    "patch_size": 2,
    "context_in_dim": 20,
    "hidden_size": 64,
    "mlp_ratio": 3.5,
    "num_heads": 4,
    "depth": 2,
    "axes_dim": [6, 10],  # uneven, so that rows and columns cannot be mistaken for each other
}
VARIANTS = {
    "base": {},
    "bottleneck": {"bottleneck_size": 12},
    "resolution": {"resolution_embeds": True},
    "both": {"bottleneck_size": 12, "resolution_embeds": True, "theta": 500, "time_factor": 700.0},
}
HEIGHT, WIDTH, TEXT_LENGTH = 8, 12, 7  # 24 image tokens
LORA_TARGETS = [
    "attention.img_qkv_proj",
    "attention.txt_kv_proj",
    "attention.to_out.0",
    "gate_proj",
    "up_proj",
    "down_proj",
    "modulation.lin",
]

# Largest relative differences seen against stock: 7e-7 in outputs, 2e-6 in gradients (summation order).
OUTPUT_TOLERANCE = 5e-6
GRADIENT_TOLERANCE = 2e-5


# --- helpers


def make_model(variant: str = "base", seed: int = 0, **overrides) -> PRXTransformer2DModel:
    """Make a tiny model in which every parameter matters to the output."""
    model = PRXTransformer2DModel(**{**BASE, **VARIANTS[variant], **overrides})
    randomize(model, seed)
    return model.eval()


def randomize(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(noise / math.sqrt(parameter.shape[1]))
            else:
                parameter.copy_(0.3 * noise + (1 if "norm" in name else 0))


def make_stock(model: PRXTransformer2DModel) -> StockPRXTransformer2DModel:
    stock = StockPRXTransformer2DModel.from_config(model.config)
    stock.load_state_dict(model.state_dict(), strict=True)
    return stock.eval()


def make_inputs(batch: int = 3, height: int = HEIGHT, width: int = WIDTH, seed: int = 1, padding: str | None = None):
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "hidden_states": torch.randn(batch, BASE["in_channels"], height, width, generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT_LENGTH, BASE["context_in_dim"], generator=generator),
    }
    if padding is not None:
        inputs["attention_mask"] = make_mask(padding, batch)
    return inputs


def make_mask(padding: str, batch: int) -> torch.Tensor:
    """Make a mask with TEXT_LENGTH, TEXT_LENGTH - 2, TEXT_LENGTH - 4, ... tokens per row, at least one."""
    lengths = (TEXT_LENGTH - 2 * torch.arange(batch)).clamp(min=1)
    mask = torch.arange(TEXT_LENGTH) < lengths[:, None]
    return {"right": mask, "left": mask.flip(1), "none": torch.ones_like(mask)}[padding]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference divided by the largest expected value."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def gradients(model: nn.Module, inputs: dict, seed: int = 2) -> dict[str, torch.Tensor]:
    """Return the gradients of every parameter and input for a loss that weights every output value differently."""
    leaves = {
        name: value.clone().requires_grad_() if value.is_floating_point() else value for name, value in inputs.items()
    }
    model.zero_grad(set_to_none=True)
    output = model(**leaves).sample
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
    (output.float() * weights).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    found.update({name: value.grad for name, value in leaves.items() if value.is_floating_point()})
    return found


class RecordingProcessor(PRXAttnProcessor):
    """Records the rotary tables and masks of every call."""

    def __init__(self):
        self.tables, self.masks = [], []

    def __call__(self, attn, hidden_states, encoder_hidden_states, image_rotary_emb, attention_mask=None):
        self.tables.append(image_rotary_emb)
        self.masks.append(attention_mask)
        return super().__call__(attn, hidden_states, encoder_hidden_states, image_rotary_emb, attention_mask)


# --- parity with diffusers' PRXTransformer2DModel


@pytest.mark.parametrize("padding", [None, "none", "right", "left"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_match_stock(variant, padding):
    model = make_model(variant)
    stock = make_stock(model)
    inputs = make_inputs(padding=padding)
    with torch.no_grad():
        ours, theirs = model(**inputs).sample, stock(**inputs).sample
    assert relative_error(ours, theirs) < OUTPUT_TOLERANCE

    expected = gradients(stock, inputs)
    actual = gradients(model, inputs)
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) < GRADIENT_TOLERANCE, max(errors.items(), key=lambda item: item[1])


def test_parity_notices_a_small_change_of_any_parameter():
    """The tolerance can fail: a change of any tensor by one part in a thousand exceeds it."""
    model = make_model("both")
    inputs = make_inputs(padding="right")
    with torch.no_grad():
        expected = model(**inputs).sample
        for name, parameter in model.named_parameters():
            original = parameter.clone()
            parameter.mul_(1.001)
            changed = relative_error(model(**inputs).sample, expected)
            parameter.copy_(original)
            assert changed > OUTPUT_TOLERANCE, name


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 16), (16, 4)])
def test_other_shapes_match_stock(height, width):
    model = make_model("resolution")
    inputs = make_inputs(height=height, width=width, padding="right")
    with torch.no_grad():
        assert relative_error(model(**inputs).sample, make_stock(model)(**inputs).sample) < OUTPUT_TOLERANCE


def test_published_configuration_is_the_default():
    with torch.device("meta"):
        ours, stock = PRXTransformer2DModel(), StockPRXTransformer2DModel()
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == {
        name: tensor.shape for name, tensor in stock.state_dict().items()
    }
    assert ours.axes_dim == (32, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_call_conventions_match_stock(dtype):
    """Positional arguments, tuples and output dtypes, with and without autocast."""
    model = make_model("resolution").to(dtype)
    stock = make_stock(make_model("resolution")).to(dtype)
    inputs = {name: value.to(dtype) for name, value in make_inputs().items()}
    mask = make_mask("right", 3)
    with torch.no_grad():
        for autocast in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
            with autocast:
                ours = model(*inputs.values(), mask, None, False)
                theirs = stock(*inputs.values(), mask, None, False)
            assert isinstance(ours, tuple)
            assert ours[0].dtype == theirs[0].dtype
            assert model(**inputs).sample.shape == inputs["hidden_states"].shape


# --- precision


@pytest.mark.parametrize("padding", [None, "right"])
def test_bf16_autocast_is_as_close_to_float32_as_stock(padding):
    """Root-mean-square errors over several draws."""
    totals = torch.zeros(2)
    for seed in range(4):
        model = make_model(seed=seed)
        stock = make_stock(model)
        inputs = make_inputs(padding=padding, seed=10 + seed)
        with torch.no_grad():
            expected = stock(**inputs).sample
            with torch.autocast("cpu", torch.bfloat16):
                for index, network in enumerate((model, stock)):
                    difference = network(**inputs).sample.float() - expected
                    totals[index] += difference.square().mean() / expected.square().mean()
    ours, theirs = totals.div(4).sqrt().tolist()
    assert theirs < 0.05
    assert ours < 1.1 * theirs


@contextmanager
def autocast_bf16(device: str):
    """Switch autocast on; `torch.autocast` itself refuses a device that this machine lacks."""
    torch.set_autocast_dtype(device, torch.bfloat16)
    torch.set_autocast_enabled(device, True)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, False)
        torch.clear_autocast_cache()


needs_cuda_build = pytest.mark.skipif(
    not torch.backends.cuda.is_built() or (torch.__version__ < "2.10" and not torch.cuda.is_available()),
    reason="this PyTorch has no CUDA rules, or is older than 2.10 and asks the driver for fake tensors",
)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda_build)])
def test_residual_stream_has_the_dtype_of_stock_under_autocast(device):
    """On CUDA autocast makes layer norms float32. Fake tensors apply its rules on a machine without CUDA."""
    kinds = {}
    with FakeTensorMode():
        for name, cls in (("ours", PRXTransformer2DModel), ("stock", StockPRXTransformer2DModel)):
            with torch.device(device):
                model = cls(**BASE)
                inputs = [torch.empty(2, 4, 8, 8), torch.empty(2), torch.empty(2, 5, BASE["context_in_dim"])]
            dtypes = []
            for block in model.blocks:
                block.register_forward_hook(lambda module, args, output, dtypes=dtypes: dtypes.append(output.dtype))
            with autocast_bf16(device):
                norm = torch.nn.functional.layer_norm(torch.empty(2, 8, device=device, dtype=torch.bfloat16), (8,))
                assert norm.dtype == {"cpu": torch.bfloat16, "cuda": torch.float32}[device]
                dtypes.append(model(*inputs).sample.dtype)
            kinds[name] = dtypes
    assert kinds["ours"] == kinds["stock"]
    assert set(kinds["ours"]) == {torch.bfloat16}


def test_rms_norm_is_float32_arithmetic_on_bf16_inputs_and_weights():
    norm = PRXRMSNorm(16).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    x = (10 * torch.randn(2, 5, 3, 16, generator=generator)).to(torch.bfloat16)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16, generator=generator))
        for autocast in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
            with autocast:
                actual = norm(x)
            expected = torch.empty(x.shape, dtype=torch.float64)
            for place in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])).tolist():
                row = x[tuple(place)].double()
                expected[tuple(place)] = row / math.sqrt(sum(v * v for v in row.tolist()) / 16 + 1e-6)
            expected = expected * norm.weight.double()
            assert actual.dtype == torch.float32
            assert relative_error(actual, expected) < 1e-6  # one rounding to bf16 would be 4e-3


def slow_rotation(vector: list[float], row: int, column: int, axes_dim, theta: float) -> list[float]:
    """Multiply each neighboring pair, as a complex number, by exp(i angle)."""
    angles = [row * theta ** (-2 * k / axes_dim[0]) for k in range(axes_dim[0] // 2)]
    angles += [column * theta ** (-2 * k / axes_dim[1]) for k in range(axes_dim[1] // 2)]
    rotated = []
    for k, angle in enumerate(angles):
        number = complex(vector[2 * k], vector[2 * k + 1]) * complex(math.cos(angle), math.sin(angle))
        rotated += [number.real, number.imag]
    return rotated


@pytest.mark.parametrize("compiled", [False, True])
def test_rotary_embedding_against_complex_numbers(compiled, fresh_dynamo):
    """Eager and compiled mode run different code."""
    rows, columns, axes_dim, theta = 3, 4, (6, 10), 10000
    x = torch.randn(2, rows * columns, 2, 16, generator=torch.Generator().manual_seed(0))
    table = rotary_table(rows, columns, axes_dim, theta, torch.device("cpu"))
    actual = (torch.compile(rotate, fullgraph=True, backend="eager") if compiled else rotate)(x, table)
    for b in range(2):
        for token in range(rows * columns):
            for h in range(2):
                expected = slow_rotation(x[b, token, h].tolist(), token // columns, token % columns, axes_dim, theta)
                assert relative_error(actual[b, token, h], torch.tensor(expected, dtype=torch.float64)) < 1e-6


def test_rotary_table_keeps_float64_accuracy_at_far_positions():
    """In float32 the angle of position 1000 would be off by up to 6e-5."""
    table = rotary_table(1, 1001, (16, 16), 10000, torch.device("cpu"))
    for k in range(8):
        angle = 1000 * 10000 ** (-2 * k / 16)
        assert abs(table[1000, 8 + k, 0].item() - math.cos(angle)) < 1e-7
        assert abs(table[1000, 8 + k, 1].item() - math.sin(angle)) < 1e-7


def slow_attention(attn: PRXAttention, image, text, mask, rows, columns, axes_dim, theta, rounding):
    """Compute joint attention in float64 with loops; `rounding` rounds every stored tensor as the network does."""

    def linear(layer, x):
        return rounding(torch.einsum("oi,bni->bno", layer.weight.double(), x.double()))

    def norm(layer, vector):
        vector = vector / math.sqrt(vector.square().mean().item() + 1e-6)
        return vector * layer.weight.double()

    heads, dim = attn.heads, attn.head_dim
    batch, tokens, width = image.shape
    qkv, text_kv = linear(attn.img_qkv_proj, image), linear(attn.txt_kv_proj, text)
    output = torch.zeros(batch, tokens, width, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            place = [slice(part * width + h * dim, part * width + (h + 1) * dim) for part in range(3)]
            queries, keys, values = [], [], []
            for j in range(text.shape[1]):
                if mask is None or mask[b, j]:
                    keys.append(rounding(norm(attn.norm_added_k, text_kv[b, j, place[0]])))
                    values.append(text_kv[b, j, place[1]])
            for i in range(tokens):
                where = (i // columns, i % columns, axes_dim, theta)
                query = slow_rotation(norm(attn.norm_q, qkv[b, i, place[0]]).tolist(), *where)
                key = slow_rotation(norm(attn.norm_k, qkv[b, i, place[1]]).tolist(), *where)
                queries.append(rounding(torch.tensor(query, dtype=torch.float64)))
                keys.append(rounding(torch.tensor(key, dtype=torch.float64)))
                values.append(qkv[b, i, place[2]])
            for i in range(tokens):
                logits = [torch.dot(queries[i], key).item() / math.sqrt(dim) for key in keys]
                weights = [math.exp(logit - max(logits)) for logit in logits]
                mixed = sum(weight * value for weight, value in zip(weights, values)) / sum(weights)
                output[b, i, h * dim : (h + 1) * dim] = mixed
    return linear(attn.to_out[0], rounding(output))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_against_slow_float64_mathematics(dtype, masked):
    """Norm weights of about 5 make logits near 100: in bf16 they would be off by 0.25, the output by a fifth."""
    rows, columns, axes_dim, theta = 2, 3, (6, 10), 10000
    attn = PRXAttention(64, 4)
    randomize(attn)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for norm in (attn.norm_q, attn.norm_k, attn.norm_added_k):
            norm.weight.mul_(5)
    attn.to(dtype)
    image = torch.randn(2, rows * columns, 64, generator=generator).to(dtype)
    text = torch.randn(2, 5, 64, generator=generator).to(dtype)
    mask = torch.tensor([[True] * 3 + [False] * 2, [False] * 1 + [True] * 4]) if masked else None

    joint = None
    if mask is not None:
        joint = torch.cat((mask, torch.ones(2, rows * columns, dtype=torch.bool)), dim=1)[:, None, None, :]
    table = rotary_table(rows, columns, axes_dim, theta, torch.device("cpu"))
    with torch.no_grad():
        actual = attn(image, text, table, joint)

    def rounding(x):
        return x.to(dtype).double()

    expected = slow_attention(attn, image, text, mask, rows, columns, axes_dim, theta, rounding)
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < {torch.float32: 5e-6, torch.bfloat16: 2e-2}[dtype]


def test_no_float64_outside_the_cpu():
    """Forward and backward on the meta device, in place of devices without float64."""

    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            tensors = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
            bad = [t for t in tensors if t.dtype == torch.float64 and t.device.type != "cpu"]
            if bad:
                raise TypeError(f"{func} made a float64 tensor on {bad[0].device}")
            return result

    with torch.device("meta"):
        model = PRXTransformer2DModel(**{**BASE, **VARIANTS["both"]})
        inputs = [torch.empty(2, 4, 8, 8), torch.empty(2), torch.empty(2, 5, BASE["context_in_dim"])]
        mask = torch.ones(2, 5, dtype=torch.bool)
    with NoFloat64():
        model(*inputs, mask).sample.sum().backward()
        with pytest.raises(TypeError, match="float64"):  # the check can fail
            inputs[0].double()
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in model.parameters())


# --- patches, text, batch


def test_patches_are_row_major_with_channels_first():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = patchify(images, 2)
    for b in range(2):
        for row in range(2):
            for column in range(3):
                expected = images[b, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
                assert torch.equal(patches[b, 3 * row + column], expected)
    assert torch.equal(unpatchify(patches, 2, 4, 6), images)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_masked_text_has_no_effect(padding):
    model = make_model()
    inputs = make_inputs(padding=padding)
    mask = inputs["attention_mask"]
    other = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].clone()}
    other["encoder_hidden_states"][~mask] = 1000.0
    with torch.no_grad():
        assert torch.equal(model(**inputs).sample, model(**other).sample)
        unmasked = model(**{**inputs, "attention_mask": None}).sample
        assert relative_error(unmasked[1:], model(**inputs).sample[1:]) > 1e-3  # the mask has an effect
    found = gradients(model, inputs)["encoder_hidden_states"]
    assert found[~mask].abs().max() == 0
    assert (found[mask].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("padding", ["right", "left"])
def test_trimmed_text_equals_padded_text_with_a_mask(padding):
    model = make_model()
    inputs = make_inputs(padding=padding)
    with torch.no_grad():
        padded = model(**inputs).sample
        for row, mask in enumerate(inputs["attention_mask"]):
            text = inputs["encoder_hidden_states"][row, mask][None]
            alone = model(inputs["hidden_states"][[row]], inputs["timestep"][[row]], text).sample
            assert relative_error(alone, padded[[row]]) < OUTPUT_TOLERANCE


def test_fully_masked_text_equals_no_text():
    model = make_model()
    inputs = make_inputs(batch=2)
    with torch.no_grad():
        masked = model(**inputs, attention_mask=torch.zeros(2, TEXT_LENGTH, dtype=torch.bool)).sample
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :0]
        assert relative_error(masked, model(**inputs).sample) < OUTPUT_TOLERANCE


def test_integer_mask_equals_boolean_mask():
    model = make_model()
    inputs = make_inputs(padding="right")
    with torch.no_grad():
        expected = model(**inputs).sample
        inputs["attention_mask"] = inputs["attention_mask"].long()
        assert torch.equal(model(**inputs).sample, expected)


def test_rows_of_a_batch_are_independent():
    model = make_model("both")
    inputs = make_inputs(padding="right")
    with torch.no_grad():
        together = model(**inputs).sample
        for row in range(3):
            alone = model(**{name: value[[row]] for name, value in inputs.items()}).sample
            assert relative_error(alone, together[[row]]) < OUTPUT_TOLERANCE


def test_one_timestep_serves_the_whole_batch():
    model = make_model("resolution")
    inputs = make_inputs()
    with torch.no_grad():
        inputs["timestep"] = torch.tensor([0.3])
        one = model(**inputs).sample
        inputs["timestep"] = torch.full((3,), 0.3)
        assert relative_error(one, model(**inputs).sample) < OUTPUT_TOLERANCE


def test_mask_and_rotary_table_are_shared_by_all_blocks():
    model = make_model(depth=3)
    recorder = RecordingProcessor()
    model.set_attn_processor(recorder)
    with torch.no_grad():
        model(**make_inputs(padding="right"))
        model(**make_inputs(padding="right", batch=2))
        model(**make_inputs())
    assert all(table is recorder.tables[0] for table in recorder.tables)
    assert recorder.tables[0].shape == (HEIGHT * WIDTH // 4, 8, 2)  # no batch, no head
    first, second, third = recorder.masks[:3], recorder.masks[3:6], recorder.masks[6:]
    assert all(mask is first[0] for mask in first)
    assert all(mask is second[0] for mask in second)
    assert all(mask is None for mask in third)
    assert first[0].dtype == torch.bool
    assert first[0].shape == (3, 1, 1, TEXT_LENGTH + HEIGHT * WIDTH // 4)


def test_each_shape_has_its_own_rotary_table():
    """Two shapes have the same number of tokens."""
    model = make_model()
    with torch.no_grad():
        for height, width in ((8, 12), (12, 8), (4, 24), (8, 12)):
            inputs = make_inputs(height=height, width=width)
            assert relative_error(model(**inputs).sample, make_model()(**inputs).sample) < OUTPUT_TOLERANCE
    assert len(model._rotary_tables) == 3


def test_rotary_table_made_in_inference_mode_serves_training():
    model = make_model()
    inputs = make_inputs()
    expected = gradients(make_model(), inputs)
    with torch.inference_mode():
        model(**make_inputs())
    actual = gradients(model, inputs)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


# --- training from scratch


@pytest.mark.parametrize("variant", VARIANTS)
def test_untrained_model_predicts_zero_and_every_parameter_learns(variant):
    model = PRXTransformer2DModel(**{**BASE, **VARIANTS[variant]})
    inputs = make_inputs(padding="right")
    assert model(**inputs).sample.abs().max() == 0

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    target = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        optimizer.zero_grad()
        (model(**inputs).sample - target).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    (model(**inputs).sample - target).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.count_nonzero() > 0, name
    for block in model.blocks:  # shift, scale and gate of attention and MLP
        assert all(chunk.count_nonzero() > 0 for chunk in block.modulation.lin.weight.grad.chunk(6))


def test_initial_weights_are_those_of_dit():
    torch.manual_seed(0)
    model = PRXTransformer2DModel(**{**BASE, **VARIANTS["both"], "hidden_size": 128, "axes_dim": [16, 16]})
    for name, parameter in model.named_parameters():
        if ".modulation." in name or name.startswith("final_layer.") or name.endswith(".bias"):
            assert parameter.count_nonzero() == 0, name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif name.startswith(("time_in.", "resolution_embedder.")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            bound = math.sqrt(6 / sum(parameter.shape))
            assert 0.98 * bound < parameter.abs().max() <= bound, name
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name


def test_gradient_checkpointing_recomputes_and_changes_no_bit():
    model = make_model("both")
    inputs = make_inputs(padding="right")
    recorder = RecordingProcessor()
    model.set_attn_processor(recorder)
    expected = gradients(model, inputs)
    assert len(recorder.tables) == BASE["depth"]

    recorder.tables.clear()
    model.enable_gradient_checkpointing()
    actual = gradients(model, inputs)
    assert len(recorder.tables) == 2 * BASE["depth"]
    assert all(torch.equal(actual[name], expected[name]) for name in expected)

    recorder.tables.clear()
    model.kept_blocks = 1
    actual = gradients(model, inputs)
    assert len(recorder.tables) == 2 * BASE["depth"] - 1
    assert all(torch.equal(actual[name], expected[name]) for name in expected)

    recorder.tables.clear()
    with torch.no_grad():
        model(**inputs)
    assert len(recorder.tables) == BASE["depth"]


# --- saving and loading


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_models_load_in_stock_and_back(variant, tmp_path):
    model = make_model(variant)
    stock = make_stock(model)
    inputs = make_inputs(padding="right")
    model.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    assert json.loads((tmp_path / "ours/config.json").read_text()) == json.loads(
        (tmp_path / "stock/config.json").read_text()
    )
    from_stock, report = PRXTransformer2DModel.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    in_stock = StockPRXTransformer2DModel.from_pretrained(tmp_path / "ours")
    for loaded in (from_stock, in_stock):
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():  # not bitwise: weights in a memory-mapped file are aligned differently
        assert relative_error(from_stock(**inputs).sample, model(**inputs).sample) < OUTPUT_TOLERANCE
        assert relative_error(in_stock(**inputs).sample, stock(**inputs).sample) < OUTPUT_TOLERANCE


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": False}])
def test_ways_of_loading(options, tmp_path):
    model = make_model("both")
    inputs = make_inputs(padding="right")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = PRXTransformer2DModel.from_pretrained(tmp_path, **options)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert relative_error(loaded(**inputs).sample, model(**inputs).sample) < OUTPUT_TOLERANCE
    half = PRXTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16, **options)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_device_map_that_leaves_blocks_on_disk(tmp_path):
    """Weights are fetched when a module is called: every weight must be used through its module's call."""
    model = make_model("both")
    inputs = make_inputs(padding="right")
    model.save_pretrained(tmp_path / "model")
    device_map = {name: "cpu" for name, _ in model.named_children()}
    del device_map["blocks"]
    device_map.update({"blocks.0": "cpu", "blocks.1": "disk"})
    loaded = PRXTransformer2DModel.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    assert {p.device.type for p in loaded.blocks[1].parameters()} == {"meta"}
    with torch.no_grad():
        assert relative_error(loaded(**inputs).sample, model(**inputs).sample) < OUTPUT_TOLERANCE


def test_deep_copies_and_pickles_draw_the_same(tmp_path):
    model = make_model()
    inputs = make_inputs()
    with torch.no_grad():
        expected = model(**inputs).sample
        assert torch.equal(copy.deepcopy(model)(**inputs).sample, expected)
        torch.save(model, tmp_path / "model.pt")
        assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(**inputs).sample, expected)


# --- what diffusers users do with a transformer


def test_lora_adapter_trains_saves_and_loads(tmp_path):
    peft = pytest.importorskip("peft")
    model = make_model()
    inputs = make_inputs(padding="right")
    with torch.no_grad():
        base = model(**inputs).sample
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=LORA_TARGETS))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(LORA_TARGETS) * BASE["depth"]
    with torch.no_grad():
        assert torch.equal(model(**inputs).sample, base)  # a new adapter changes nothing

    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs).sample.square().mean().backward()
        optimizer.step()
    assert all(p.grad.count_nonzero() > 0 for p in trained.values())
    with torch.no_grad():
        adapted = model(**inputs).sample
        assert relative_error(adapted, base) > 1e-3
        model.disable_adapters()
        assert torch.equal(model(**inputs).sample, base)
        model.enable_adapters()

    model.save_lora_adapter(tmp_path, weight_name="lora.safetensors")
    fresh = make_model()
    fresh.load_lora_adapter(tmp_path, prefix=None, weight_name="lora.safetensors")
    with torch.no_grad():
        assert torch.equal(fresh(**inputs).sample, adapted)
        half = fresh(**inputs, attention_kwargs={"scale": 0.5}).sample
        assert relative_error(half, adapted) > 1e-3
        assert torch.equal(fresh(**inputs, attention_kwargs={"scale": 0.0}).sample, base)
        assert torch.equal(fresh(**inputs).sample, adapted)  # the scale is for one call
        fresh.fuse_lora()
        assert relative_error(fresh(**inputs).sample, adapted) < OUTPUT_TOLERANCE


def test_pyramid_attention_broadcast_skips_attention_until_disabled():
    model = make_model()
    inputs = make_inputs()
    recorder = RecordingProcessor()
    model.set_attn_processor(recorder)
    with torch.no_grad():
        expected = model(**inputs).sample
        recorder.tables.clear()
        model.enable_cache(
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(100, 800),
                current_timestep_callback=lambda: 500,
            )
        )
        assert model.is_cache_enabled
        for _ in range(4):
            assert torch.equal(model(**inputs).sample, expected)
        assert len(recorder.tables) == 2 * BASE["depth"]  # every second call

        model.disable_cache()
        assert not model.is_cache_enabled
        recorder.tables.clear()
        for _ in range(4):
            assert torch.equal(model(**inputs).sample, expected)
        assert len(recorder.tables) == 4 * BASE["depth"]


class FusedAttentionCalls(TorchDispatchMode):
    """Counts the calls of PyTorch's fused attention kernel for the CPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return func(*args, **(kwargs or {}))


def test_attention_backends():
    model = make_model()
    inputs = make_inputs(padding="right")
    with torch.no_grad():
        expected = model(**inputs).sample
        for backend, fused_layers in (("native", 2), ("_native_math", 0), ("native", 2)):
            model.set_attention_backend(backend)  # last the default: diffusers keeps it for the whole process
            with FusedAttentionCalls() as calls:
                assert relative_error(model(**inputs).sample, expected) < OUTPUT_TOLERANCE
            assert calls.count == fused_layers
        model.blocks[0].attention.set_attention_backend("_native_math")
        with FusedAttentionCalls() as calls:
            assert relative_error(model(**inputs).sample, expected) < OUTPUT_TOLERANCE
        assert calls.count == 1
    with pytest.raises(ValueError, match="backend"):
        model.set_attention_backend("no such backend")


def test_attention_processors_are_read_and_set():
    model = make_model()
    names = [f"blocks.{index}.attention.processor" for index in range(BASE["depth"])]
    assert list(model.attn_processors) == names
    assert all(type(processor) is PRXAttnProcessor for processor in model.attn_processors.values())

    class NoAttention:
        def __call__(self, attn, hidden_states, encoder_hidden_states, image_rotary_emb, attention_mask=None):
            return torch.zeros_like(hidden_states)

    inputs = make_inputs()
    with torch.no_grad():
        expected = model(**inputs).sample
        model.set_attn_processor({names[0]: PRXAttnProcessor(), names[1]: NoAttention()})
        assert isinstance(model.attn_processors[names[1]], NoAttention)
        assert relative_error(model(**inputs).sample, expected) > 1e-3
        model.set_attn_processor(PRXAttnProcessor())
        assert torch.equal(model(**inputs).sample, expected)
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor({names[0]: PRXAttnProcessor()})


# --- torch.compile


@pytest.mark.parametrize(
    ("padding", "checkpointing"),
    [(None, False), ("right", False), ("right", True)],
    ids=["bf16", "mask", "checkpoint"],
)
def test_compiles_as_one_graph(fresh_dynamo, padding, checkpointing):
    """`fullgraph=True` raises at a graph break; AOT autograd traces the backward pass as well."""
    model = make_model("both", depth=1)
    if checkpointing:
        model.enable_gradient_checkpointing()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = make_inputs(padding=padding)
    with torch.autocast("cpu", torch.bfloat16, enabled=padding is None):
        expected = gradients(model, inputs)
        actual = gradients(compiled, inputs)
    tolerance = 2e-2 if padding is None else GRADIENT_TOLERANCE
    for name, _ in model.named_parameters():
        assert relative_error(actual[f"_orig_mod.{name}"], expected[name]) < tolerance, name


def test_compiled_model_takes_other_shapes_without_recompiling(fresh_dynamo):
    model = make_model()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for height, width in ((8, 12), (8, 16), (12, 16), (16, 8)):
            inputs = make_inputs(height=height, width=width)
            assert relative_error(compiled(**inputs).sample, make_model()(**inputs).sample) < OUTPUT_TOLERANCE
    assert counter.frame_count == 1
    assert not model._rotary_tables


def test_regional_compilation_compiles_one_block_once(fresh_dynamo):
    model = make_model("both", depth=3)
    inputs = make_inputs(padding="right")
    with torch.no_grad():
        expected = model(**inputs).sample
    counter = torch._dynamo.testing.CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    with torch.no_grad():
        for _ in range(2):
            assert relative_error(model(**inputs).sample, expected) < OUTPUT_TOLERANCE
    assert counter.frame_count == 1


@pytest.mark.skipif(shutil.which("gcc") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same_numbers(fresh_dynamo):
    """Only the forward of a block: a training step of a model takes a minute to compile."""
    model = make_model(depth=1)
    inputs = make_inputs(padding="right")
    with torch.no_grad():
        expected = model(**inputs).sample
        model.compile_repeated_blocks(fullgraph=True)
        assert relative_error(model(**inputs).sample, expected) < OUTPUT_TOLERANCE


# --- wrong use


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_heads": 5}, "`num_heads`"),
        ({"axes_dim": [8, 10]}, "`axes_dim`"),
        ({"axes_dim": [7, 9]}, "`axes_dim`"),
        ({"axes_dim": [16]}, "`axes_dim`"),
        ({"axes_dim": None}, "`axes_dim`"),  # None means (32, 32)
    ],
)
def test_wrong_configuration_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        PRXTransformer2DModel(**{**BASE, **overrides})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(3, 4, 7, 8)}, "7 x 8"),
        ({"hidden_states": torch.zeros(3, 4, 8, 7)}, "8 x 7"),
        ({"hidden_states": torch.zeros(3, 5, 8, 8)}, "`hidden_states`"),
        ({"hidden_states": torch.zeros(4, 8, 8)}, "`hidden_states`"),
        ({"timestep": torch.zeros(2)}, "`timestep`"),
        ({"timestep": torch.tensor(0.5)}, "`timestep`"),
        ({"encoder_hidden_states": torch.zeros(2, 7, 20)}, "`encoder_hidden_states`"),
        ({"encoder_hidden_states": torch.zeros(3, 7, 21)}, "`encoder_hidden_states`"),
        ({"encoder_hidden_states": torch.zeros(3, 20)}, "`encoder_hidden_states`"),
        ({"attention_mask": torch.ones(3, TEXT_LENGTH - 1, dtype=torch.bool)}, "`attention_mask`"),
        ({"attention_mask": torch.ones(1, TEXT_LENGTH, dtype=torch.bool)}, "`attention_mask`"),
        ({"attention_mask": torch.zeros(3, 1, 1, TEXT_LENGTH)}, "`attention_mask`"),
    ],
)
def test_wrong_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_model()(**{**make_inputs(), **change})


# --- options that stock lacks: resolution tokens (the fusion is in test_token_routing.py)


def slow_resolution_token(embedder: nn.Module, size: int) -> torch.Tensor:
    """Compute the token (1, D) of one height or width in float64."""
    angles = [size * 10000 ** (-k / 64) for k in range(64)]
    features = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
    hidden = embedder.in_layer.weight.double() @ features + embedder.in_layer.bias.double()
    hidden = hidden / (1 + torch.exp(-hidden))
    return (embedder.out_layer.weight.double() @ hidden + embedder.out_layer.bias.double())[None]


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize(("height", "width"), [(8, 12), (12, 8), (2, 4)])
def test_resolution_tokens_stand_before_the_text(height, width, padding):
    """A plain model that receives the two tokens as text, already at the width of its blocks, predicts the same."""
    model = make_model(resolution_tokens=True)
    inputs = make_inputs(height=height, width=width, padding=padding)
    plain = PRXTransformer2DModel(**{**BASE, "context_in_dim": BASE["hidden_size"]}).eval()
    weights = model.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict() if "txt_in" not in name}, strict=False)
    plain.txt_in = nn.Identity()
    embedders = model.resolution_token_embedder
    with torch.no_grad():
        sizes = [slow_resolution_token(embedders.height, height), slow_resolution_token(embedders.width, width)]
        text = model.txt_in(inputs["encoder_hidden_states"])
        longer = {**inputs, "encoder_hidden_states": torch.stack([torch.cat([*sizes, row]) for row in text.double()])}
        longer["encoder_hidden_states"] = longer["encoder_hidden_states"].float()
        if padding is not None:
            both = torch.ones(3, 2, dtype=torch.bool)
            longer["attention_mask"] = torch.cat((both, inputs["attention_mask"]), dim=1)
        expected = plain(**longer).sample
        actual = model(**inputs).sample
        assert relative_error(actual, expected) < OUTPUT_TOLERANCE
        plain.txt_in = model.txt_in
        plain.register_to_config(context_in_dim=BASE["context_in_dim"])
        assert relative_error(plain(**inputs).sample, actual) > 1e-2  # the tokens matter


def test_resolution_tokens_distinguish_height_from_width():
    """2 x 4 and 4 x 2 have the same sum, product, set of sizes and number of tokens."""
    embedder = make_model(resolution_tokens=True).resolution_token_embedder
    with torch.no_grad():
        wide, tall, square = (embedder(*size, torch.device("cpu"), torch.float32) for size in ((2, 4), (4, 2), (4, 4)))
    assert wide.shape == (1, 2, BASE["hidden_size"])
    assert relative_error(wide, tall) > 0.1
    assert relative_error(wide, tall.flip(1)) > 0.1  # not even in reverse order
    assert torch.equal(square[:, 0], tall[:, 0])
    assert torch.equal(square[:, 1], wide[:, 1])


def test_resolution_tokens_learn_and_start_small():
    torch.manual_seed(0)
    model = PRXTransformer2DModel(**BASE, resolution_tokens=True)
    fresh = model.resolution_token_embedder
    for mlp in (fresh.height, fresh.width):
        assert mlp.in_layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert mlp.out_layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    found = gradients(make_model(resolution_tokens=True), make_inputs(padding="right"))
    names = [name for name in found if name.startswith("resolution_token_embedder.")]
    assert len(names) == 8
    assert all(found[name].count_nonzero() > 0 for name in found)


class Warnings(logging.Handler):
    """Collects warnings of diffusers' logger."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def diffusers_warnings():
    handler = Warnings()
    logging.getLogger("diffusers").addHandler(handler)
    yield handler.messages
    logging.getLogger("diffusers").removeHandler(handler)


OWN_OPTIONS = {"tokens": {"resolution_tokens": True}, "fusion": {"fusion_range": [0, 1]}}
OWN_OPTIONS["together"] = {"resolution_tokens": True, "fusion_range": [1, 2]}


@pytest.mark.parametrize("name", OWN_OPTIONS)
def test_models_with_own_options_survive_saving(name, tmp_path, diffusers_warnings):
    model = make_model(**OWN_OPTIONS[name])
    inputs = make_inputs(padding="right")
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert {key: stored[key] for key in ("resolution_tokens", "fusion_range") if key in stored} == OWN_OPTIONS[name]
    assert stored["_class_name"] == "PRXExtendedTransformer2DModel"
    for options in ({}, {"low_cpu_mem_usage": False}, {"device_map": "cpu"}):
        loaded = PRXTransformer2DModel.from_pretrained(tmp_path, **options)
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
        with torch.no_grad():
            assert relative_error(loaded(**inputs).sample, model(**inputs).sample) < OUTPUT_TOLERANCE
    assert not diffusers_warnings
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == stored | {"_name_or_path": str(tmp_path)}


@pytest.mark.parametrize("name", OWN_OPTIONS)
def test_stock_does_not_silently_load_a_part_of_a_model(name, tmp_path, diffusers_warnings):
    """It refuses the class name. Loaded by stock's class, it warns of options and weights."""
    make_model(**OWN_OPTIONS[name]).save_pretrained(tmp_path)
    with pytest.raises((AttributeError, ValueError), match="PRXExtendedTransformer2DModel"):
        AutoModel.from_pretrained(str(tmp_path))
    assert not diffusers_warnings
    StockPRXTransformer2DModel.from_pretrained(tmp_path)
    options, weights = diffusers_warnings
    assert "are not expected and will be ignored" in options
    assert "were not used" in weights
    assert all(option in options for option in OWN_OPTIONS[name])


@pytest.mark.parametrize("variant", VARIANTS)
def test_stock_loads_other_models_without_warnings(variant, tmp_path, diffusers_warnings):
    make_model(variant).save_pretrained(tmp_path)
    StockPRXTransformer2DModel.from_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(str(tmp_path))) is StockPRXTransformer2DModel
    assert not diffusers_warnings
