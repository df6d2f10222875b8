"""REPA and iREPA: losses and projectors against slow references, and the end of the burn-in."""

import json
import math
import threading

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import Dinov2Config, Dinov2Model

import tiny
from diffusers_prx.techniques.alignment import (
    BurnIn,
    FeatureCache,
    alignment_loss,
    build_projector,
    gradient_cosine,
    spatial_normalize,
    teacher_features,
)
from diffusers_prx.techniques.teachers import TransformerTeacher
from disks import full_disk

GRID = (3, 4)
TOKENS = GRID[0] * GRID[1]
WIDTH, TEACHER_WIDTH = 16, 10
ATTENTION = {"num_heads": 2, "axes_dim": (4, 4)}
INDICES = torch.tensor([[0, 3, 4, 7, 11], [1, 2, 5, 8, 10]])  # tokens that passed through the block, B = 2


def projector(kind):
    torch.manual_seed(0)
    return build_projector(kind, WIDTH, TEACHER_WIDTH, hidden_size=24, **ATTENTION)


def gather(x, indices):
    return torch.stack([row[index] for row, index in zip(x, indices)])


def test_alignment_loss_is_one_minus_the_mean_cosine():
    projected, teacher = torch.randn(2, 5, TEACHER_WIDTH), torch.randn(2, TOKENS, TEACHER_WIDTH)
    losses = alignment_loss(projected, teacher, INDICES)
    assert losses.shape == (2,)
    for b in range(2):
        cosines = []
        for k in range(5):
            x, y = projected[b, k].tolist(), teacher[b, INDICES[b, k]].tolist()
            dot = sum(p * q for p, q in zip(x, y))
            cosines.append(dot / math.sqrt(sum(p * p for p in x) * sum(q * q for q in y)))
        assert losses[b].item() == pytest.approx(1 - sum(cosines) / 5, abs=1e-6)


def test_alignment_loss_ranges_from_0_to_2():
    features = torch.randn(2, TOKENS, TEACHER_WIDTH)
    same = alignment_loss(3 * features, features, None)
    opposite = alignment_loss(-features, features, None)
    torch.testing.assert_close(same, torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(opposite, torch.full((2,), 2.0), rtol=0, atol=1e-6)


def test_alignment_loss_of_routed_tokens_equals_that_of_the_gathered_map():
    """The teacher sees the whole image; its map is normalized whole, and only then gathered."""
    features, teacher = torch.randn(2, TOKENS, WIDTH), torch.randn(2, TOKENS, TEACHER_WIDTH)
    mlp = projector("mlp")
    target = spatial_normalize(teacher, 0.8)
    routed = alignment_loss(mlp(gather(features, INDICES), INDICES, GRID), target, INDICES)
    full = mlp(features, None, GRID)
    gathered = alignment_loss(gather(full, INDICES), gather(target, INDICES), None)
    torch.testing.assert_close(routed, gathered, rtol=0, atol=1e-6)
    normalized_late = alignment_loss(gather(full, INDICES), spatial_normalize(gather(teacher, INDICES), 0.8), None)
    assert (routed - normalized_late).abs().max() > 1e-3
    assert (routed - alignment_loss(full, target, None)).abs().max() > 1e-3


def test_alignment_loss_does_not_depend_on_the_order_of_tokens():
    projected, teacher = torch.randn(2, TOKENS, TEACHER_WIDTH), torch.randn(2, TOKENS, TEACHER_WIDTH)
    order = torch.stack([torch.randperm(TOKENS) for _ in range(2)])
    shuffled = alignment_loss(gather(projected, order), teacher, order)
    torch.testing.assert_close(shuffled, alignment_loss(projected, teacher, None), rtol=0, atol=1e-6)


def test_alignment_loss_detaches_the_teacher_and_does_not_broadcast():
    projected = torch.randn(2, TOKENS, TEACHER_WIDTH, requires_grad=True)
    teacher = torch.randn(2, TOKENS, TEACHER_WIDTH, requires_grad=True)
    alignment_loss(projected, teacher, None).sum().backward()
    assert projected.grad.abs().max() > 0
    assert teacher.grad is None
    with pytest.raises(AssertionError):
        alignment_loss(projected[:, :1], teacher, None)


@pytest.mark.parametrize("gamma", [0.0, 0.8, 1.0])
def test_spatial_normalization_is_the_formula(gamma):
    features = torch.randn(2, TOKENS, TEACHER_WIDTH) * 3 + 2
    x = features.numpy().astype(np.float64)
    expected = np.empty_like(x)
    for b in range(2):
        for channel in range(TEACHER_WIDTH):
            values = x[b, :, channel]
            mean = values.sum() / TOKENS
            std = math.sqrt(((values - mean) ** 2).sum() / TOKENS)
            expected[b, :, channel] = (values - gamma * mean) / (std + 1e-6)
    result = spatial_normalize(features, gamma)
    np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=2e-6)
    if gamma == 1:
        assert result.mean(dim=1).abs().max() < 1e-6
    else:
        assert result.mean(dim=1).abs().max() > 0.1


def test_spatial_normalization_of_a_constant_channel_and_of_bfloat16():
    features = torch.randn(1, TOKENS, 2)
    features[..., 0] = 3
    result = spatial_normalize(features, 1.0)
    assert torch.equal(result[..., 0], torch.zeros(1, TOKENS))
    assert spatial_normalize(features.bfloat16(), 1.0).dtype == torch.float32


@pytest.mark.parametrize("kind", ["mlp", "conv", "attention"])
def test_projectors_are_stored_in_float32_and_compute_in_autocasts_type(kind):
    module = projector(kind)
    features = torch.randn(2, TOKENS, WIDTH)
    plain = module(features, None, GRID)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = module(features, None, GRID)
    assert plain.dtype == torch.float32
    assert mixed.dtype == torch.bfloat16
    error = (mixed.float() - plain).norm() / plain.norm()
    assert 0 < error < 0.01  # measured: 0.003 to 0.005, the rounding of bf16 (2^-9 per value)
    alignment_loss(mixed, torch.randn(2, TOKENS, TEACHER_WIDTH), None).mean().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("kind", ["mlp", "conv", "attention"])
def test_all_projector_weights_and_the_features_get_a_gradient(kind):
    module, features = projector(kind), torch.randn(2, TOKENS, WIDTH, requires_grad=True)
    alignment_loss(module(features, None, GRID), torch.randn(2, TOKENS, TEACHER_WIDTH), None).sum().backward()
    for tensor in [features, *module.parameters()]:
        assert tensor.grad.abs().max() > 0


def test_mlp_projector_is_three_layers_with_silu():
    module, features = projector("mlp"), torch.randn(2, TOKENS, WIDTH)
    (w1, b1), (w2, b2), (w3, b3) = (
        (layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy())
        for layer in module.modules()
        if isinstance(layer, nn.Linear)
    )
    x = features.double().numpy()
    for weight, bias in ((w1, b1), (w2, b2)):
        x = x @ weight.T + bias
        x = x / (1 + np.exp(-x))
    result = module(features, None, GRID).detach()
    np.testing.assert_allclose(result.numpy(), x @ w3.T + b3, rtol=0, atol=1e-6)
    routed = module(gather(features, INDICES), INDICES, GRID)
    torch.testing.assert_close(routed, gather(result, INDICES), rtol=0, atol=1e-6)


def test_conv_projector_convolves_over_a_grid_that_is_not_square():
    module, features = projector("conv"), torch.randn(2, TOKENS, WIDTH)
    weight, bias = (p.detach().double() for p in (module.conv.weight, module.conv.bias))
    result = module(features, None, GRID)
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            expected = bias.expand(2, -1).clone()
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    y, x = row + dy, column + dx
                    if 0 <= y < GRID[0] and 0 <= x < GRID[1]:
                        expected += features[:, y * GRID[1] + x].double() @ weight[:, :, dy + 1, dx + 1].T
            actual = result[:, row * GRID[1] + column].double()
            torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)


def test_conv_projector_rejects_routing():
    with pytest.raises(ValueError, match="`repa_projector`"):
        projector("conv")(torch.randn(2, 5, WIDTH), INDICES, GRID)


def test_attention_projector_equals_a_slow_reference():
    """The reference uses complex rotations by row and column in float64, for a subset of the grid."""
    module, features = projector("attention"), torch.randn(2, 5, WIDTH)
    result = module(features, INDICES, GRID).detach().numpy()
    weight, bias = (p.detach().double().numpy() for p in (module.qkv.weight, module.qkv.bias))
    qkv = (features.double().numpy() @ weight.T + bias).reshape(2, 5, 3, 2, 8)  # (B, K, 3, h, d)
    frequencies = 10_000.0 ** -np.array([0, 0.5])  # of two pairs per axis

    def rotated(x, index):
        row, column = divmod(int(index), GRID[1])
        angles = np.concatenate([row * frequencies, column * frequencies])
        result = (x[0::2] + 1j * x[1::2]) * np.exp(1j * angles)
        return np.stack([result.real, result.imag], axis=1).reshape(-1)

    for b in range(2):
        heads = np.zeros((5, 2, 8))
        for h in range(2):
            q, k = (np.stack([rotated(qkv[b, i, j, h], INDICES[b, i]) for i in range(5)]) for j in (0, 1))
            scores = np.exp(q @ k.T / math.sqrt(8))
            heads[:, h] = scores / scores.sum(axis=1, keepdims=True) @ qkv[b, :, 2, h]
        out = heads.reshape(5, 16) @ module.out.weight.detach().double().numpy().T
        np.testing.assert_allclose(result[b], out + module.out.bias.detach().double().numpy(), rtol=0, atol=1e-6)


def test_attention_projector_is_equivariant_to_the_order_of_tokens():
    module, features = projector("attention"), torch.randn(2, TOKENS, WIDTH)
    order = torch.stack([torch.randperm(TOKENS) for _ in range(2)])
    result = module(features, None, GRID)
    shuffled = module(gather(features, order), order, GRID)
    torch.testing.assert_close(shuffled, gather(result, order), rtol=0, atol=1e-6)
    without_indices = module(gather(features, order), None, GRID)  # positions matter
    assert (without_indices - gather(result, order)).abs().max() > 1e-3


def test_build_projector_rejects_invalid_arguments():
    with pytest.raises(ValueError, match=r"`kind` .*'linear'.* 'mlp', 'conv', 'attention'"):
        build_projector("linear", WIDTH, TEACHER_WIDTH)
    with pytest.raises(ValueError, match=r"`axes_dim` .*\[4, 4\]"):
        build_projector("attention", WIDTH, TEACHER_WIDTH, num_heads=4, axes_dim=(4, 4))


@pytest.mark.parametrize(
    ("flow", "alignment", "cosine"),
    [
        ([1.0, 0.0], [3.0, 0.0], 1.0),
        ([1.0, 0.0], [-0.5, 0.0], -1.0),
        ([1.0, 0.0], [0.0, 2.0], 0.0),
        ([3.0, 4.0], [4.0, 3.0], 24 / 25),
        ([0.0, 0.0], [4.0, 3.0], 0.0),  # the flow loss of a new transformer
        ([3e-15, 4e-15], [4e-15, 3e-15], 24 / 25),
    ],
)
def test_gradient_cosine_of_a_known_example(flow, alignment, cosine):
    """The losses are linear in the features, so their gradients are the coefficients."""
    first = nn.Linear(2, 2)
    features = first(torch.randn(1, 2))
    losses = [(torch.tensor(c) * features).sum() for c in (flow, alignment)]
    assert gradient_cosine(*losses, features) == pytest.approx(cosine, abs=1e-6)
    assert first.weight.grad is None
    sum(losses).backward()  # the graph still exists
    assert torch.allclose(first.bias.grad, torch.tensor(flow) + torch.tensor(alignment))


def test_gradient_cosine_over_weights_equals_that_of_two_backward_passes():
    block, later = nn.Linear(4, 4), nn.Linear(4, 4)
    x = torch.randn(3, 4)

    def losses():
        features = block(x)
        return later(features.tanh()).square().sum(), features.cos().sum()

    vectors = []
    for i in range(2):
        losses()[i].backward()
        vectors.append(np.concatenate([p.grad.double().numpy().ravel() for p in block.parameters()]))
        block.zero_grad()
    expected = vectors[0] @ vectors[1] / np.sqrt((vectors[0] @ vectors[0]) * (vectors[1] @ vectors[1]))
    assert abs(expected) > 0.01
    assert gradient_cosine(*losses(), list(block.parameters())) == pytest.approx(expected, abs=1e-6)


def test_gradient_cosine_behind_accelerates_mixed_precision():
    """Returned features are float32 copies there, which the flow loss does not depend on; weights work."""

    class Tapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.later = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            features = self.block(x)
            return self.later(features), features

    model = Tapped()
    output, features = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)(torch.randn(2, 4))
    flow, alignment = output.square().sum(), features.square().sum()
    with pytest.raises(ValueError, match=r"`flow_loss`.*`tensors`.*weights of the tapped"):
        gradient_cosine(flow, alignment, features)
    assert -1 <= gradient_cosine(flow, alignment, model.block.weight) <= 1


def test_gradient_cosine_in_a_checkpointed_transformer():
    """Recomputed blocks give the same cosine, and a backward pass is possible afterwards."""
    cosines = []
    for checkpointing in (False, True):
        model = tiny.transformer().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(1)
        noisy, text = torch.randn(2, 4, 6, 8), torch.randn(2, 5, tiny.TEXT_WIDTH)
        output = model(noisy, torch.tensor([0.3, 0.7]), text, return_dict=False)[0]
        losses = output.square().mean(), output.cos().mean()
        cosines.append(gradient_cosine(*losses, list(model.blocks[0].parameters())))
        sum(losses).backward()
        assert model.blocks[0].attention.img_qkv_proj.weight.grad.abs().max() > 0
    assert abs(cosines[0]) > 0.01
    assert cosines[1] == pytest.approx(cosines[0], abs=1e-5)


def run(burn_in, cosines, start=0, steps=12):
    """Return for each step whether alignment was on; the cosine of step s is `cosines[s]`."""
    on = []
    for step in range(start, steps):
        on.append(burn_in.active(step))
        if burn_in.due(step):
            burn_in.observe(step, cosines[step])
            assert burn_in.active(step)  # it stays on for all micro-batches of the step
    return on


def test_burn_in_without_an_end_stays_active():
    burn_in = BurnIn()
    assert all(burn_in.active(step) for step in (0, 10, 10**9))
    assert not any(burn_in.due(step) for step in range(200))
    assert burn_in.ended_at is None


def test_burn_in_ends_at_a_step():
    burn_in = BurnIn(until_step=5)
    assert run(burn_in, {}) == [True] * 5 + [False] * 7
    assert burn_in.ended_at == 5
    assert burn_in.active(4)


def test_burn_in_ends_when_the_mean_over_a_full_window_is_below_the_threshold():
    cosines = {0: -0.9, 2: 0.5, 4: 0.3, 6: -0.4, 8: 0.0, 10: -0.9}  # means from step 4: -0.03, 0.13, -0.03
    burn_in = BurnIn(window=3, every=2, threshold=-0.032)
    assert run(burn_in, cosines) == [True] * 5 + [False] * 7  # (-0.9 + 0.5 + 0.3) / 3 = -0.0333
    assert burn_in.ended_at == 5
    later = BurnIn(window=3, every=2, threshold=-0.034)
    assert run(later, cosines) == [True] * 11 + [False]  # (-0.4 + 0 - 0.9) / 3, the first one below
    assert later.ended_at == 11
    assert list(later.cosines) == [-0.4, 0.0, -0.9]
    assert run(BurnIn(window=3, every=2), dict.fromkeys(range(12), 0.0)) == [True] * 12  # 0 is not below 0


def test_burn_in_ends_at_the_first_of_both_conditions():
    cosines = dict.fromkeys(range(12), -0.5)
    both = BurnIn(until_step=3, window=6, every=1)
    assert run(both, cosines) == [True] * 3 + [False] * 9
    assert both.ended_at == 3
    both = BurnIn(until_step=9, window=4, every=1)
    assert run(both, cosines) == [True] * 4 + [False] * 8
    assert both.ended_at == 4
    assert not both.due(8)


@pytest.mark.parametrize("cut", range(0, 12))
def test_burn_in_resumes_exactly(cut):
    cosines = {step: math.cos(2.1 * step) - 0.1 * step for step in range(12)}
    settings = {"until_step": 11, "window": 3, "every": 2, "threshold": -0.4}
    whole = BurnIn(**settings)
    expected = run(whole, cosines)
    assert 6 < whole.ended_at < 11
    first, second = BurnIn(**settings), BurnIn(**settings)
    before = run(first, cosines, steps=cut)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + run(second, cosines, start=cut) == expected
    assert second.state_dict() == whole.state_dict()


def test_burn_in_stays_ended_with_a_later_until_step():
    first = BurnIn(until_step=5)
    run(first, {})
    second = BurnIn(until_step=100)
    second.load_state_dict(first.state_dict())
    assert not second.active(12)


def test_burn_in_rejects_invalid_values():
    for settings in ({"until_step": 0}, {"window": 0}, {"every": 0}, {"threshold": 2}):
        with pytest.raises(ValueError, match=f"`{next(iter(settings))}`"):
            BurnIn(**settings)
    for cosine in (math.nan, 1.5, -1.5):
        with pytest.raises(ValueError, match="`cosine`"):
            BurnIn(window=3).observe(0, cosine)


class CountedTeacher(TransformerTeacher):
    """Real teacher that counts the images it processes."""

    seen = 0

    def forward(self, pixels_pm1, grid):
        self.seen += len(pixels_pm1)
        return super().forward(pixels_pm1, grid)


def teacher(seed=0):
    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4, initializer_range=0.3
    )
    return CountedTeacher(Dinov2Model(config), [0.5] * 3, [0.5] * 3, "tiny")


def pictures(count=4):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, 24, 32), dtype=np.uint8))


def test_teacher_features_equal_the_teachers_output():
    net, pixels = teacher(), pictures()
    features = teacher_features(net, pixels, GRID)
    assert features.shape == (4, TOKENS, 16)
    assert not features.requires_grad
    assert torch.equal(features, net(pixels.float() / 127.5 - 1, GRID))


def test_cached_features_equal_computed_ones_up_to_rounding(tmp_path):
    net, pixels, cache = teacher(), pictures(), FeatureCache(tmp_path)
    plain = teacher_features(net, pixels, GRID)
    net.seen = 0
    first = teacher_features(net, pixels[:3], GRID, cache)
    assert (net.seen, cache.misses, cache.hits) == (3, 3, 0)
    again = teacher_features(net, pixels[[2, 3, 0]], GRID, cache)  # another order, one new image
    assert (net.seen, cache.misses, cache.hits, cache.corrupt) == (4, 4, 2, 0)
    assert torch.equal(again[[2, 0]], first[[0, 2]])  # bitwise
    third = teacher_features(net, pixels, GRID, FeatureCache(tmp_path))  # as in another process
    assert net.seen == 4
    assert third.dtype == torch.float32
    assert third.device == pixels.device
    torch.testing.assert_close(third, plain, rtol=2**-8, atol=1e-6)


def test_the_cache_key_includes_pixels_grid_and_teacher(tmp_path):
    net, pixels, cache = teacher(), pictures(1), FeatureCache(tmp_path)
    teacher_features(net, pixels, GRID, cache)
    changed = pixels.clone()
    changed[0, 2, 23, 31] ^= 1
    for case in (
        lambda: teacher_features(net, pixels[..., :24, 1:], GRID, cache),  # another crop
        lambda: teacher_features(net, pixels.flip(-1), GRID, cache),
        lambda: teacher_features(net, changed, GRID, cache),
        lambda: teacher_features(net, pixels.reshape(1, 3, 32, 24), GRID, cache),  # the same bytes
        lambda: teacher_features(net, pixels, (4, 3), cache),  # as many patches
        lambda: teacher_features(teacher(seed=1), pixels, GRID, cache),
    ):
        before = len(list(tmp_path.rglob("*.safetensors")))
        case()
        assert len(list(tmp_path.rglob("*.safetensors"))) == before + 1
    assert cache.hits == 0
    teacher_features(teacher(), pixels, GRID, cache)  # the same teacher, loaded again
    assert cache.hits == 1


@pytest.mark.parametrize("content", [b"", b"not a safetensors file", "truncated", "flipped bit", "other shape"])
def test_damaged_cache_files_are_replaced_and_counted(tmp_path, content):
    net, pixels, cache = teacher(), pictures(2), FeatureCache(tmp_path)
    features = teacher_features(net, pixels, GRID, cache)
    file = cache.path(net, pixels[0], GRID)
    whole = file.read_bytes()
    if content == "other shape":
        cache.write(file, torch.zeros(2, 2, dtype=torch.bfloat16))
    elif content == "flipped bit":
        file.write_bytes(whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:])
    else:
        file.write_bytes(whole[:-7] if content == "truncated" else content)
    assert torch.equal(teacher_features(net, pixels, GRID, cache), features)
    assert (cache.corrupt, cache.hits, cache.misses) == (1, 1, 3)
    assert file.read_bytes() == whole


def test_concurrent_writers_read_whole_files_and_leave_nothing_unfinished(tmp_path):
    net, pixels = teacher(), pictures()
    expected = teacher_features(net, pixels, GRID).bfloat16().float()
    results, caches = [], [FeatureCache(tmp_path) for _ in range(8)]

    def work(cache):
        for _ in range(10):
            results.append(teacher_features(net, pixels, GRID, cache))
            for file in tmp_path.rglob("*.safetensors"):
                cache.write(file, cache.read(file, (TOKENS, 16)))

    threads = [threading.Thread(target=work, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert all(torch.equal(result, expected) for result in results)
    assert sum(cache.corrupt for cache in caches) == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4
    assert all(path.parent.name == path.name[:2] for path in files)


def test_a_full_disk_is_reported_and_leaves_no_file(tmp_path):
    net, pixels, cache = teacher(), pictures(1), FeatureCache(tmp_path)
    path = cache.path(net, pixels[0], GRID)
    with full_disk(100), pytest.raises(OSError, match="`repa_cache_dir`"):
        cache.features(net, pixels, GRID)
    assert [item for item in tmp_path.rglob("*") if item.is_file()] == []
    assert torch.equal(cache.features(net, pixels, GRID), teacher_features(net, pixels, GRID).bfloat16().float())
    assert path.is_file()
