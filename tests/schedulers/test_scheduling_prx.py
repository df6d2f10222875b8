"""The schedulers, against exact fractions, exact predictors, and a slow draw of training timesteps."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_prx.schedulers import PRXFlowMatchScheduler, PRXXPredictionScheduler

BOTH = [PRXFlowMatchScheduler, PRXXPredictionScheduler]
NAN, INF = float("nan"), float("inf")
WRONG_LEVELS = [
    *([], [0.5, 0.5], [0.2, 0.9], [1.2, 0.5], [0.5, 0.0], [-0.5], [NAN], [1.0, NAN], [INF, 0.5], [[0.5]], 0.5, "0.5"),
    *(["1", "0.5"], [True, 0.5], [None], {1.0, 0.5}, [1.0, 0.5, 0.5 - 1e-12], [1e-60], np.array([True])),
    torch.ones(1, 1),
]


def exact_grid(n: int, shift: int) -> list[Fraction]:
    """Return s t / (1 + (s-1) t) at t = k/n, which is s k / (n + (s-1) k)."""
    return [Fraction(shift * k, n + (shift - 1) * k) for k in range(n, -1, -1)]


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("n", [1, 8, 28, 50])
@pytest.mark.parametrize("shift", [1, 3])
def test_noise_levels_are_exact(cls, n, shift):
    scheduler = cls(shift=float(shift))
    scheduler.set_timesteps(n)
    expected = np.array([float(value) for value in exact_grid(n, shift)], dtype=np.float32)
    assert scheduler.sigmas.dtype == torch.float32
    np.testing.assert_array_max_ulp(scheduler.sigmas.numpy(), expected, 1)
    expected = np.array([float(1000 * value) for value in exact_grid(n, shift)[:-1]], dtype=np.float32)
    np.testing.assert_array_max_ulp(scheduler.timesteps.numpy(), expected, 1)
    assert scheduler.sigmas[0] == 1
    assert scheduler.sigmas[-1] == 0


def test_default_noise_levels_of_stock_differ():
    """At shift 3, the last of 28 steps starts at 0.0089 in stock, at 0.1 here."""
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.set_timesteps(28)
    ours = PRXFlowMatchScheduler(shift=3.0)
    ours.set_timesteps(28)
    assert stock.sigmas[27].item() == pytest.approx(0.0089, abs=1e-4)
    assert (stock.sigmas - ours.sigmas).abs().max() > 0.09
    stock.set_timesteps(sigmas=np.linspace(1, 0, 29)[:-1])
    torch.testing.assert_close(stock.sigmas, ours.sigmas, rtol=0, atol=1e-6)


def test_custom_sigmas_are_not_shifted():
    scheduler = PRXFlowMatchScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[0.8, 0.5, 0.25])
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([0.8, 0.5, 0.25, 0.0]))
    assert scheduler.num_inference_steps == 3


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("n", [1, 8, 50])
def test_perfect_predictor_leaves_no_noise(shift, n):
    clean, noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    clean, noise = clean[None], noise[None]
    for scheduler, output in (
        (PRXXPredictionScheduler(shift=shift), clean),
        (PRXFlowMatchScheduler(shift=shift), noise - clean),
    ):
        scheduler.set_timesteps(n)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(output, t, x).prev_sample
        torch.testing.assert_close(x, clean, rtol=0, atol=1e-5)  # 50 roundings of float32
    assert torch.equal(_sample(PRXXPredictionScheduler(shift=shift), n, clean, noise), clean)


def _sample(scheduler, n, output, x):
    scheduler.set_timesteps(n)
    for t in scheduler.timesteps:
        (x,) = scheduler.step(output, t, x, return_dict=False)
    return x


@pytest.mark.parametrize("cls", BOTH)
def test_step_keeps_no_state(cls):
    scheduler = cls(shift=3.0)
    scheduler.set_timesteps(8)
    output, x = torch.randn(2, 4, 3)
    first = [scheduler.step(output, t, x).prev_sample for t in scheduler.timesteps]
    backwards = [scheduler.step(output, float(t), x).prev_sample for t in reversed(scheduler.timesteps)]
    for a, b in zip(first, reversed(backwards)):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("cls", BOTH)
def test_index_for_timestep_in_a_long_schedule(cls):
    scheduler = cls(shift=3.0)
    scheduler.set_timesteps(1000)
    indices = [scheduler.index_for_timestep(1000 * sigma) for sigma in scheduler.sigmas[:-1]]
    assert indices == list(range(1000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", BOTH)
def test_step_is_float32_inside(cls, dtype):
    scheduler = cls()
    scheduler.set_timesteps(50)
    output, x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    sigma, below = (float(value) for value in exact_grid(50, 1)[7:9])
    velocity = output.double() if cls is PRXFlowMatchScheduler else (x.double() - output.double()) / sigma
    expected = (x.double() + (below - sigma) * velocity).to(dtype)
    result = scheduler.step(output, scheduler.timesteps[7], x).prev_sample
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected, rtol=1e-6 if dtype == torch.float32 else 0.004, atol=1e-6)


@pytest.mark.parametrize("cls", BOTH)
def test_scale_noise_at_any_timestep(cls):
    x, noise = torch.randn(2, 4, 3, 8, 8)
    timestep = torch.tensor([0.0, 123.4, 500.0, 1000.0])
    noisy = cls(shift=3.0).scale_noise(x, timestep, noise)
    for row, t in enumerate(timestep.tolist()):
        torch.testing.assert_close(noisy[row], (1 - t / 1000) * x[row] + t / 1000 * noise[row])
    assert torch.equal(noisy[0], x[0])
    assert torch.equal(noisy[3], noise[3])


def test_conversions_of_predictions():
    x0, noise = torch.randn(2, 5, 3, 4, 4)
    sigma = torch.tensor([0.9, 0.5, 0.05, 0.02, 0.001])
    s = sigma.view(-1, 1, 1, 1)
    noisy = (1 - s) * x0 + s * noise
    flow, x_prediction = PRXFlowMatchScheduler(), PRXXPredictionScheduler(clamp=0.05)
    torch.testing.assert_close(flow.clean(noise - x0, noisy, sigma), x0, rtol=0, atol=1e-6)
    torch.testing.assert_close(flow.velocity(noise - x0, noisy, sigma), noise - x0)
    assert torch.equal(x_prediction.clean(x0, noisy, sigma), x0)
    velocity = x_prediction.velocity(x0, noisy, sigma)
    torch.testing.assert_close(velocity[:3], (noise - x0)[:3], rtol=0, atol=1e-4)
    torch.testing.assert_close(velocity[3:], (noisy - x0)[3:] / 0.05)
    assert flow.clean(noise.bfloat16(), noisy.bfloat16(), sigma).dtype == torch.float32


# --- training timesteps


def slow_draw(n: int, shift: float, sampling: str, uniform_fraction: float, low: float) -> np.ndarray:
    """Draw, shift, and draw again if outside the range; replace a fraction of logit-normal draws."""
    rng = np.random.default_rng(5)
    kept = np.empty(0)
    while len(kept) < n:
        t = 1 / (1 + np.exp(-rng.standard_normal(n))) if sampling == "logit_normal" else rng.random(n)
        t = shift * t / (1 + (shift - 1) * t)
        kept = np.concatenate([kept, t[(t >= low) & (t < 1)]])
    if sampling == "uniform":
        return kept[:n]
    uniform = low + (1 - low) * rng.random(n)
    return np.where(rng.random(n) < uniform_fraction, uniform, kept[:n])


def largest_gap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest difference of two distribution functions (Kolmogorov-Smirnov)."""
    grid = np.linspace(0, 1, 2001)
    return np.abs(np.searchsorted(np.sort(a), grid) / len(a) - np.searchsorted(np.sort(b), grid) / len(b)).max()


@pytest.mark.parametrize("sampling", ["logit_normal", "uniform"])
@pytest.mark.parametrize(("shift", "uniform_fraction", "low"), [(1.0, 0.1, 1e-3), (3.0, 0.1, 1e-3), (3.0, 0.0, 0.4)])
def test_draw_has_the_described_distribution(sampling, shift, uniform_fraction, low):
    scheduler = PRXFlowMatchScheduler(
        shift=shift, timestep_sampling=sampling, uniform_fraction=uniform_fraction, min_timestep=low
    )
    n = 100_000
    t = scheduler.sample_timesteps(n, torch.Generator().manual_seed(0))
    assert t.shape == (n,)
    assert t.dtype == torch.float32
    assert t.min() >= np.float32(low)
    assert t.max() < 1
    # two samples of this size differ by more than 0.0087 once in a thousand times
    assert largest_gap(t.numpy(), slow_draw(n, shift, sampling, uniform_fraction, low)) < 0.0087


def test_uniform_draws_ignore_uniform_fraction():
    t = PRXFlowMatchScheduler(timestep_sampling="uniform").sample_timesteps(100_000, torch.Generator().manual_seed(1))
    assert largest_gap(t.numpy(), np.linspace(1e-3, 1, 100_000)) < 0.0062  # one sample of this size, 1 in 1000
    all_uniform = PRXFlowMatchScheduler(timestep_sampling="uniform", uniform_fraction=1.0, shift=3.0)
    none = PRXFlowMatchScheduler(timestep_sampling="uniform", uniform_fraction=0.0, shift=3.0)
    draws = [scheduler.sample_timesteps(1000, torch.Generator().manual_seed(1)) for scheduler in (all_uniform, none)]
    assert torch.equal(*draws)  # `uniform_fraction` is for logit-normal draws only


def test_draw_per_sample_has_the_same_distribution():
    scheduler = PRXFlowMatchScheduler(shift=3.0)
    t = torch.cat([scheduler.sample_timesteps(1, torch.Generator().manual_seed(seed)) for seed in range(4000)])
    assert largest_gap(t.numpy(), slow_draw(100_000, 3.0, "logit_normal", 0.1, 1e-3)) < 0.032


def test_draw_is_a_pure_function_of_the_generator():
    scheduler = PRXXPredictionScheduler(shift=3.0)
    draw = lambda n: scheduler.sample_timesteps(n, torch.Generator().manual_seed(7))  # noqa: E731
    assert torch.equal(draw(16), draw(16))
    assert torch.equal(draw(16)[:3], draw(3))
    state = torch.get_rng_state()
    draw(16)
    assert torch.equal(state, torch.get_rng_state())


def test_draw_stays_in_range_at_the_ends():
    scheduler = PRXFlowMatchScheduler(logit_std=30.0, uniform_fraction=0.0)
    t = scheduler.sample_timesteps(20_000, torch.Generator().manual_seed(0))
    assert t.min() >= np.float32(1e-3)
    assert t.max() < 1
    narrow = PRXFlowMatchScheduler(logit_std=0.01, uniform_fraction=0.0)
    assert (narrow.sample_timesteps(1000, torch.Generator().manual_seed(0)) - 0.5).abs().max() < 0.02


# --- configuration and wrong use


@pytest.mark.parametrize("cls", BOTH)
def test_loads_configurations_of_stock_and_its_own(cls, tmp_path):
    scheduler = cls.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    assert scheduler.config["shift"] == 3.0
    cls(shift=2.0, logit_mean=0.5).save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    assert (loaded.config["shift"], loaded.config["logit_mean"]) == (2.0, 0.5)
    with pytest.raises(ValueError, match="use_karras_sigmas"):
        cls.from_config(FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True).config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_train_timesteps", 0),
        ("num_train_timesteps", 999.5),
        ("num_train_timesteps", True),
        ("shift", 0.0),
        ("shift", float("nan")),
        ("shift", "3"),
        ("timestep_sampling", "cosine"),
        ("logit_mean", float("inf")),
        ("logit_std", 0.0),
        ("uniform_fraction", 1.1),
        ("min_timestep", 0.0),
        ("min_timestep", 1.0),
        ("clamp", 0.0),
    ],
)
def test_wrong_configuration_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        PRXXPredictionScheduler(**{name: value})


@pytest.mark.parametrize("cls", BOTH)
def test_wrong_arguments_are_named(cls):
    scheduler = cls()
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 1000.0, x)
    for n in (0, -1, 2.5, True, None):
        with pytest.raises(ValueError, match="num_inference_steps"):
            scheduler.set_timesteps(n)
    for sigmas in WRONG_LEVELS:
        with pytest.raises(ValueError, match="`sigmas`"):
            scheduler.set_timesteps(sigmas=sigmas)
    with pytest.raises(ValueError, match="`num_inference_steps`"):
        scheduler.set_timesteps(1.0, sigmas=[0.5])
    with pytest.raises(ValueError, match="`num_inference_steps`"):
        scheduler.set_timesteps(3, sigmas=[0.5])
    scheduler.set_timesteps(4)
    for timestep in (999.0, 0.0, 1.0, float("nan"), torch.tensor([1000.0, 750.0]), "1000", None, True, [1000.0]):
        with pytest.raises(ValueError, match="timestep"):
            scheduler.step(x, timestep, x)
    for output in (x.long(), x.numpy(), None):
        with pytest.raises(ValueError, match="`model_output`"):
            scheduler.step(output, 1000.0, x)
    for timestep in (-1.0, 1000.5, float("nan"), torch.tensor([2000.0]), "500", True):
        with pytest.raises(ValueError, match="`timestep`"):
            scheduler.scale_noise(x, timestep, x)
    with pytest.raises(ValueError, match="`sample`"):  # uint8 images would stay whole numbers
        scheduler.scale_noise(torch.zeros(1, 2, dtype=torch.uint8), 500.0, x)
    with pytest.raises(ValueError, match="model_output"):
        scheduler.step(torch.zeros(2, 2), 1000.0, x)
    with pytest.raises(ValueError, match="noise"):
        scheduler.scale_noise(x, 500.0, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="Noise levels"):
        scheduler.scale_noise(x, torch.tensor([1.0, 2.0]), x)
    for n in (0, 2.5, True, "2"):
        with pytest.raises(ValueError, match="`n`"):
            scheduler.sample_timesteps(n)
    with pytest.raises(ValueError, match="`generator`"):
        scheduler.sample_timesteps(1, generator=0)


def test_predictions_of_another_shape_and_wrong_sigmas_are_refused():
    x, one = torch.zeros(2, 3), torch.zeros(1, 3)
    with pytest.raises(ValueError, match="`model_output`"):
        PRXFlowMatchScheduler().clean(one, x, 0.5)
    with pytest.raises(ValueError, match="`model_output`"):
        PRXXPredictionScheduler().velocity(one, x, 0.5)
    for sigma in (NAN, "0.5", None, True, -0.1, 1.1):
        with pytest.raises(ValueError, match="`sigma`"):
            PRXFlowMatchScheduler().clean(x, x, sigma)


@pytest.mark.parametrize("shift", [1e9, 1e30])
def test_noise_levels_that_repeat_in_float32_are_refused(shift):
    with pytest.raises(ValueError, match=r"`num_inference_steps`.*`shift`"):
        PRXFlowMatchScheduler(shift=shift).set_timesteps(4)


@pytest.mark.parametrize("cls", BOTH)
def test_numpy_numbers_are_accepted(cls, tmp_path):
    """The configuration holds Python numbers, which JSON can store."""
    scheduler = cls(num_train_timesteps=np.int64(1000), shift=np.float32(3), min_timestep=np.float64(1e-3))
    assert (type(scheduler.config["num_train_timesteps"]), type(scheduler.config["shift"])) == (int, float)
    scheduler.save_pretrained(tmp_path)
    assert cls.from_pretrained(tmp_path).config["shift"] == 3.0
    plain = cls(shift=3.0)
    plain.set_timesteps(4)
    scheduler.set_timesteps(np.int32(4))
    assert torch.equal(scheduler.sigmas, plain.sigmas)
    x = torch.ones(1, 2)
    assert torch.equal(scheduler.step(x, np.float32(1000), x)[0], plain.step(x, 1000.0, x)[0])
    half = torch.tensor(0.5)
    for sigmas in (np.array([1, 0.5]), torch.tensor([1, 0.5]).bfloat16(), (1, np.float32(0.5)), [1.0, half]):
        scheduler.set_timesteps(sigmas=sigmas)
        assert scheduler.sigmas.tolist() == [1.0, 0.5, 0.0]
