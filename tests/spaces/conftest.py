"""What the tests of the Space share: saved tiny pipelines."""

from pathlib import Path

import pytest

import tiny

REASON = "gradio is not installed: pip install -e '.[demo]'"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """Two pipelines, both of 32 pixels: one in pixels, one in latents."""
    pytest.importorskip("gradio", reason=REASON)
    folder = tmp_path_factory.mktemp("models")
    tiny.pixel_pipeline().save_pretrained(folder / "pixels")
    tiny.latent_pipeline().save_pretrained(folder / "latents")
    return folder


@pytest.fixture
def cache(model_folder, monkeypatch):
    from model_cache import ModelCache, find_models

    monkeypatch.setenv("PRX_MODELS", str(model_folder))
    return ModelCache(find_models(), {})
