"""Fixtures of the tests of whole evaluations."""

import pytest

import runs
from diffusers_prx.schedulers import PRXXPredictionScheduler


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    nets = runs.nets(PRXXPredictionScheduler())
    nets.pipeline(runs.config(noise_scale=1.0, max_sequence_length=24)).save_pretrained(folder)
    return folder
