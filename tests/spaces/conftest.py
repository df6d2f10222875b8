"""Fixtures for the tests of the Space: saved tiny pipelines, and a served page."""

from pathlib import Path

import pytest

import tiny

REASON = "gradio is not installed: pip install -e '.[demo]'"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A folder with a pipeline in pixels and one in latents, both of 32 pixels."""
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


@pytest.fixture(scope="module")
def served(model_folder):
    """A served page over the tiny pipelines: its port, its cache, the page itself."""
    import app
    import serving
    from model_cache import ModelCache, find_models

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRX_MODELS", str(model_folder))
        models = find_models()
    cache = ModelCache(models, {})
    page = app.build(models, cache)
    _, url, _ = serving.launch(page, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield int(url.rstrip("/").rpartition(":")[2]), cache, page
    page.close()


@pytest.fixture
def port(served) -> int:
    return served[0]
