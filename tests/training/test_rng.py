"""Random numbers are pure functions of (seed, step, sample, purpose)."""

import math

import pytest
import torch

from diffusers_prx.training.rng import StepRandom, derive_seed, normal_from_words, philox


def test_seed_derivation_is_fixed():
    """Golden values: another derivation would silently change resumed runs."""
    assert derive_seed(0, 0, 0, "noise") == 3531568609112322763
    assert derive_seed(42, -1, 7, "crop") == 4734867816175157761


def slow_philox(counter, key):
    """Philox 4x32-10 in Python's integers, by the paper's figure."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = second >> 32 ^ b ^ k, second % 2**32, first >> 32 ^ d ^ m, first % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return [a, b, c, d]


def test_philox_gives_the_known_answers():
    """The vectors of its authors' library Random123, and others from a slow form."""
    known = {
        ((0, 0, 0, 0), (0, 0)): "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2): "408f276d 41c83b0e a20bc7c6 6d5451fd",
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
        ): "d16cfe09 94fdcceb 5001e420 24126ea1",
    }
    for (counter, (low, high)), answer in known.items():
        words = philox(torch.tensor(counter)[:, None], low | high << 32)
        assert " ".join(f"{word:08x}" for word in words.flatten().tolist()) == answer
        assert slow_philox(counter, (low, high)) == words.flatten().tolist()
    counters = torch.randint(0, 2**32, (4, 5, 7), generator=torch.Generator().manual_seed(0))
    words, key = philox(counters, 0x9234567_89ABCDEF), (0x89ABCDEF, 0x9234567)
    for row, column in ((0, 0), (2, 3), (4, 6)):
        assert words[:, row, column].tolist() == slow_philox(counters[:, row, column].tolist(), key)


def test_uniform_numbers_are_the_upper_bits_of_the_words():
    key = derive_seed(7, 3, -1, "route")
    for index in (5, 2**40 + 1):
        counters = [(block, 0, index % 2**32, index >> 32) for block in range(2)]
        words = [word for counter in counters for word in slow_philox(counter, (key % 2**32, key >> 32))]
        drawn = StepRandom(7, 3, [1, index]).uniform("route", (2, 3))
        assert drawn[1].flatten().tolist() == [(word >> 8) / 2**24 for word in words[:6]]
        assert torch.equal(StepRandom(7, 3, [1, index], "meta").uniform("route", (2, 3), on_host=True), drawn)


def test_normal_numbers_of_an_accelerator_follow_box_and_muller():
    words = torch.randint(0, 2**32, (4, 3000), generator=torch.Generator().manual_seed(0))
    words[:, :2] = torch.tensor([[0, 2**32 - 1]] * 4)  # the largest and the smallest radius
    drawn = normal_from_words(words)
    assert drawn.dtype == torch.float32
    assert drawn.isfinite().all()
    for a, b in ((0, 2), (1, 3)):
        radius = (-2 * ((words[a].double() + 0.5) / 2**32).log()).sqrt()
        angle = 2 * math.pi * (words[b].double() + 0.5) / 2**32
        # the error of an angle of 2 pi in float32, and of the logarithm close to 1, whose radius is close to 0
        for values, wanted in ((drawn[a], radius * angle.cos()), (drawn[b], radius * angle.sin())):
            torch.testing.assert_close(values.double(), wanted, rtol=0, atol=1e-4)
            assert (values - wanted).abs().mean() < 1e-6
    normal = drawn.double().flatten()
    assert abs(normal.mean()) < 4 / 12000**0.5
    assert abs(normal.std() - 1) < 4 / 24000**0.5


@pytest.mark.gpu
def test_a_gpu_draws_the_same_uniform_numbers_and_does_not_wait():
    cpu, gpu = (StepRandom(1, 2, [3, 4], device) for device in ("cpu", "cuda"))
    assert torch.equal(gpu.uniform("route", (99,)).cpu(), cpu.uniform("route", (99,)))
    one = StepRandom(1, 2, [4], "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        whole, alone = gpu.normal("noise", (3, 8, 8)), one.normal("noise", (3, 8, 8))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(whole[1], alone[0])


def test_seeds_depend_on_every_argument():
    keys = [(s, t, i, p) for s in range(5) for t in range(-1, 5) for i in range(20) for p in ("noise", "crop")]
    seeds = [derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_draws_depend_only_on_their_arguments():
    first = StepRandom(1, 2, [3, 4, 5])
    noise, uniform = first.normal("noise", (3, 4, 4)), first.uniform("drop")
    torch.manual_seed(99)
    torch.rand(7)
    again = StepRandom(1, 2, [3, 4, 5])
    assert torch.equal(again.uniform("drop"), uniform)  # in another order than before
    assert torch.equal(again.normal("noise", (3, 4, 4)), noise)
    assert noise.dtype == uniform.dtype == torch.float32
    assert noise.shape == (3, 3, 4, 4)
    assert uniform.shape == (3,)


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3, 4, 5]], [[0, 1, 2], [3, 4, 5]], [[0], [1, 2], [3, 4, 5]]])
def test_split_of_the_batch_does_not_change_the_numbers(parts):
    whole = StepRandom(0, 9, range(6))
    for draw in (lambda rng: rng.normal("noise", (2, 3)), lambda rng: rng.uniform("timestep")):
        assert torch.equal(torch.cat([draw(StepRandom(0, 9, part)) for part in parts]), draw(whole))


def test_order_of_the_batch_permutes_the_numbers():
    order = [4, 0, 2]
    assert torch.equal(StepRandom(0, 1, order).normal("x", (5,)), StepRandom(0, 1, range(6)).normal("x", (5,))[order])


def test_seeds_steps_samples_and_purposes_are_independent():
    base = StepRandom(0, 0, range(2000)).uniform("a")
    others = [
        StepRandom(1, 0, range(2000)).uniform("a"),
        StepRandom(0, 1, range(2000)).uniform("a"),
        StepRandom(0, 0, range(2000, 4000)).uniform("a"),
        StepRandom(0, 0, range(2000)).uniform("b"),
        base.roll(1),
    ]
    for other in others:
        # the correlation of 2000 independent pairs has a standard deviation of 0.022
        assert abs(torch.corrcoef(torch.stack([base, other]))[0, 1]) < 0.09


def test_distributions_over_samples():
    uniform = StepRandom(3, 0, range(4000)).uniform("a").double().sort().values
    assert (uniform - (torch.arange(4000) + 0.5) / 4000).abs().max() < 1.95 / 4000**0.5  # Kolmogorov-Smirnov, 0.1%
    normal = StepRandom(3, 0, range(4000)).normal("a", (4,)).double()
    assert abs(normal.mean()) < 4 / 16000**0.5
    assert abs(normal.std() - 1) < 4 / (2 * 16000) ** 0.5
    assert abs((normal**4).mean() - 3) < 4 * 96**0.5 / 16000**0.5
