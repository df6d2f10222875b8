"""The metrics as torchmetrics: what may come in, batches, processes, and torchmetrics' own FID beside ours."""

import os

import numpy as np
import pytest
import torch
from accelerate import PartialState, debug_launcher
from accelerate.state import AcceleratorState
from torchmetrics.image.fid import FrechetInceptionDistance

from diffusers_prx.evaluation.distances import bootstrap_mmd, maximum_mean_discrepancy, resampled_counts
from diffusers_prx.evaluation.extractors import FeatureExtractor, check_images, wrap_colors
from diffusers_prx.evaluation.metrics import FrechetDistance, MaximumMeanDiscrepancy, sort_features


class Colors(FeatureExtractor):
    """Six smooth features of the pixels, in float64 until the end: what batches change is then only the order of sums.

    `num_features` makes it a feature module of torchmetrics as well.
    """

    name, source, size, resizing, num_features = "colors", "memory", 8, "none", 6
    fingerprint = "colors"

    def forward(self, images):
        check_images(images)
        pixels = images.double() / 255
        return torch.cat([pixels.mean((2, 3)), pixels[..., :4, :].square().mean((2, 3))], dim=1).float()


def images(count, seed, low=0, high=256):
    return torch.from_numpy(np.random.default_rng(seed).integers(low, high, (count, 3, 8, 8), dtype=np.uint8))


REFERENCE, GENERATED = images(90, 0), images(70, 1, 0, 200)


def fed(metric, batch_size=1000, reference=REFERENCE, generated=GENERATED):
    for real, part in ((True, reference), (False, generated)):
        for batch in part.split(batch_size):
            metric.update(batch, real=real)
    return metric


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (REFERENCE.float() / 255, "torch.float32"),
        (REFERENCE.int(), "torch.int32"),
        (REFERENCE.permute(0, 2, 3, 1), r"\(90, 8, 8, 3\)"),
        (REFERENCE[0], r"\(3, 8, 8\)"),
        (REFERENCE[:0], "empty"),
        (REFERENCE.numpy(), "ndarray"),
    ],
)
def test_other_images_than_uint8_are_refused(wrong, message):
    with pytest.raises(ValueError, match=f"`images`.*{message}"):
        FrechetDistance(Colors()).update(wrong, real=True)
    with pytest.raises(ValueError, match=f"`images`.*{message}"):
        MaximumMeanDiscrepancy(Colors()).update(wrong, real=True)


@pytest.mark.parametrize("cls", [FrechetDistance, MaximumMeanDiscrepancy])
def test_images_scaled_to_one_are_refused(cls):
    cast = (GENERATED.float() / 255).to(torch.uint8)
    cast[0, 0, 0, 0] = 1  # a white pixel, as 1.0 becomes
    for batch_size in (1, 1000):
        with pytest.raises(ValueError, match="`images`"):
            fed(cls(Colors()), batch_size, generated=cast).compute()
    # a model that draws black is bad, not wrong
    assert fed(cls(Colors()), generated=torch.zeros_like(GENERATED)).compute() > 0


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="2 generated images, got 1"):
        fed(FrechetDistance(Colors()), generated=GENERATED[:1]).compute()
    metric = MaximumMeanDiscrepancy(Colors())
    metric.update(GENERATED, real=False)
    with pytest.raises(ValueError, match="2 reference images, got 0"):
        metric.compute()


def test_invalid_settings_are_refused():
    with pytest.raises(ValueError, match="`compat`"):
        FrechetDistance(Colors(), compat="photroom")
    with pytest.raises(ValueError, match="`sigma` and `scale`"):
        MaximumMeanDiscrepancy(Colors(), sigma=0.0)
    with pytest.raises(ValueError, match="`features`"):
        FrechetDistance(Colors()).update(REFERENCE, real=True, features=torch.zeros(3, 6))
    with pytest.raises(ValueError, match="`resamples`"):
        fed(FrechetDistance(Colors())).details(resamples=5)


def test_fid_equals_torchmetrics():
    theirs = FrechetInceptionDistance(feature=Colors(), input_img_size=(3, 8, 8))
    theirs.set_dtype(torch.float64)
    fed(theirs)
    ours = fed(FrechetDistance(Colors()))
    assert ours.name == "FID (colors)"
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), rel=1e-6)  # theirs is cast to float32


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_results_do_not_depend_on_the_batch_size(batch_size):
    for metric in (FrechetDistance(Colors()), MaximumMeanDiscrepancy(Colors())):
        whole = fed(metric).compute().item()
        metric.reset()
        assert fed(metric, batch_size).compute().item() == pytest.approx(whole, rel=1e-11)


def test_mmd_equals_that_of_all_features():
    extractor = Colors()
    biased, unbiased = (
        maximum_mean_discrepancy(extractor(GENERATED), extractor(REFERENCE), u).item() for u in (False, True)
    )
    metric = fed(MaximumMeanDiscrepancy(extractor), 11)
    assert metric.compute().item() == pytest.approx(biased, rel=1e-11)
    details = metric.details(resamples=20, seed=1)
    assert (details["value"], details["unbiased_value"]) == pytest.approx((biased, unbiased), rel=1e-11)
    sets, counts = (sort_features(extractor(GENERATED)), extractor(REFERENCE)), resampled_counts(70, 20, seed=1)
    for key, value in (("interval", biased), ("unbiased_interval", unbiased)):
        replicates = bootstrap_mmd(*sets, counts, unbiased=key == "unbiased_interval").numpy()
        spread = np.quantile(replicates - replicates.mean(), [0.025, 0.975])
        assert details[key] == pytest.approx(value + spread, rel=1e-9)
    assert (details["num_images"], details["num_reference"]) == (70, 90)
    assert details == metric.details(resamples=20, seed=1)
    assert fed(MaximumMeanDiscrepancy(extractor, unbiased=True)).compute().item() == pytest.approx(unbiased)


def test_metrics_can_be_moved_and_reset():
    metric = fed(FrechetDistance(Colors(), keep_features=True))
    first = metric.details(resamples=10)
    metric.reset()
    metric.to("cpu").half()  # the sums stay float64
    assert metric.generated_outer.dtype == torch.float64
    assert fed(metric).details(resamples=10) == first


@pytest.mark.parametrize("cls", [FrechetDistance, MaximumMeanDiscrepancy])
def test_reference_statistics_can_be_saved_and_loaded(cls):
    metric = fed(cls(Colors()))
    again = cls(Colors())
    again.load_reference_state(metric.reference_state())
    again.update(GENERATED, real=False)
    assert again.compute().item() == metric.compute().item()


# The study's public code


def test_color_inversion_wraps_around():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    wrapped = wrap_colors(every)
    assert torch.equal(wrapped, (every * 255).byte())  # the line of torchmetrics, on what it was not meant for
    assert torch.equal(wrapped.flatten()[:256].int(), (256 - torch.arange(256)).remainder(256).int())


def test_compat_compares_inverted_colors():
    plain, inverted = (fed(FrechetDistance(Colors(), compat)) for compat in (None, "photoroom"))
    by_hand = fed(FrechetDistance(Colors()), 1000, wrap_colors(REFERENCE), wrap_colors(GENERATED))
    assert inverted.compute().item() == by_hand.compute().item()
    assert abs(inverted.compute().item() / plain.compute().item() - 1) > 0.05
    assert inverted.name == "FID (colors, compat photoroom)"
    mmd = [fed(MaximumMeanDiscrepancy(Colors(), compat)).compute().item() for compat in (None, "photoroom")]
    assert mmd[0] == mmd[1]  # only their FID goes that way


# Processes


def _as_one_of_two(folder, shares):
    torch.set_num_threads(1)
    os.environ.pop("ACCELERATE_USE_CPU", None)
    state = PartialState(cpu=True)
    generated = GENERATED[: shares[0]], GENERATED[shares[0] :]
    reference = REFERENCE[:60], REFERENCE[60:]
    found = {}
    for metric in (FrechetDistance(Colors(), keep_features=True), MaximumMeanDiscrepancy(Colors())):
        rank = state.process_index
        for real, part in ((True, reference[rank]), (False, generated[rank])):
            for batch in part.split(16) if len(part) else ():
                metric.update(batch, real=real)
        found[type(metric).__name__] = metric.compute().item(), metric.details(resamples=15)
        again = type(metric)(metric.extractor)
        state_of_all = metric.reference_state()
        if rank == 0:  # one process has the cache
            again.load_reference_state(state_of_all)
        for batch in generated[rank].split(16) if len(generated[rank]) else ():
            again.update(batch, real=False)
        assert again.compute().item() == pytest.approx(metric.compute().item(), rel=1e-11)
    torch.save(found, folder / f"{state.process_index}.pt")


@pytest.mark.parametrize("shares", [(37, 33), (70, 0)])  # unequal shares, and an empty one
def test_two_processes_give_the_result_of_one(tmp_path, shares):
    alone = {}
    for metric in (FrechetDistance(Colors(), keep_features=True), MaximumMeanDiscrepancy(Colors())):
        fed(metric)
        alone[type(metric).__name__] = metric.compute().item(), metric.details(resamples=15)
    AcceleratorState._reset_state(reset_partial_state=True)
    debug_launcher(_as_one_of_two, (tmp_path, shares), num_processes=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, (value, details) in alone.items():
            assert found[name][0] == pytest.approx(value, rel=1e-11)
            for key, expected in details.items():
                assert found[name][1][key] == pytest.approx(expected, rel=1e-9), key
