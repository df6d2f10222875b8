"""Finding models and LoRAs, and keeping them in memory."""

import json
import threading
from pathlib import Path

import pytest

from diffusers_prx.resolution_bins import RESOLUTION_BINS

pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")

import model_cache
from model_cache import ModelCache, find_loras, find_models
from settings import NO_LORA

COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")


def write_index(folder, **entries):
    folder.mkdir(parents=True)
    for component in COMPONENTS:
        (folder / component).mkdir()
    index = {"_class_name": "PRXPipeline", **{component: ["library", "Class"] for component in COMPONENTS}}
    (folder / "model_index.json").write_text(json.dumps(index | entries))


def test_folders_with_a_pipeline_are_models(tmp_path, monkeypatch, capsys):
    write_index(tmp_path / "runs" / "zoo", default_sample_size=32)
    write_index(tmp_path / "runs" / "quickstart", _class_name="PRXPixelPipeline", default_sample_size=512)
    write_index(tmp_path / "runs" / "other", _class_name="StableDiffusionPipeline")
    write_index(tmp_path / "runs" / "deep" / "below", default_sample_size=32)
    write_index(tmp_path / "one", default_sample_size=None)
    (tmp_path / "runs" / "empty").mkdir()
    monkeypatch.setenv("PRX_MODELS", f"{tmp_path / 'runs'}:{tmp_path / 'one'}:{tmp_path / 'missing'}")
    models = find_models()
    assert list(models) == ["quickstart", "zoo", "one"]  # the page opens on the first
    assert "Skipped" in capsys.readouterr().out
    assert models["zoo"].sizes == ("32 x 32",)  # 32 has no resolution bins
    assert models["one"].default_size == "512 x 512"
    assert "704 x 352" in models["one"].sizes
    assert len(models["quickstart"].sizes) == len(RESOLUTION_BINS[512])
    assert (models["quickstart"].preset_steps["fast"], models["zoo"].preset_steps["fast"]) == (9, 14)


BROKEN = {
    "null": "null",
    "list": "[]",
    "text": '"PRXPipeline"',
    "number": "3",
    "empty": "",
    "cut": '{"_class_name": "PRXPipeline"',
    "nested": "[" * 100_000,
    "class": '{"_class_name": ["PRXPipeline"]}',
    "side_list": '{"_class_name": "PRXPipeline", "default_sample_size": [32]}',
    "side_text": '{"_class_name": "PRXPipeline", "default_sample_size": "32"}',
    "side_true": '{"_class_name": "PRXPipeline", "default_sample_size": true}',
    "side_large": '{"_class_name": "PRXPipeline", "default_sample_size": 1000000}',
    "steps": '{"_class_name": "PRXPipeline", "preset_steps": {"slow": 3}}',
    "prediction": '{"_class_name": "PRXPipeline", "prediction_type": "noise"}',
    "side_negative": '{"_class_name": "PRXPipeline", "default_sample_size": -32}',
}


def test_broken_folders_are_named_and_skipped(tmp_path, monkeypatch, capsys):
    for name, text in BROKEN.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(text)
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "model_index.json").write_bytes(bytes(range(256)))
    write_index(tmp_path / "good", default_sample_size=32)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    monkeypatch.setenv("PRX_MODELS", f"{tmp_path}:{tmp_path / 'file'}:{tmp_path / 'loop'}")
    assert list(find_models()) == ["good"]
    printed = capsys.readouterr().out.splitlines()
    for name in [*BROKEN, "binary", "loop", "file"]:
        (line,) = (line for line in printed if line.startswith(f"Skipped {tmp_path / name}: "))
        assert len(line) < 500
        if name in ("null", "list", "text", "number", "nested"):
            assert "is not a JSON object" in line
    assert "default_sample_size" in next(line for line in printed if "side_list" in line)


def test_home_and_variables_are_expanded(tmp_path, monkeypatch):
    write_index(tmp_path / "models" / "good", default_sample_size=32)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PRX_HUB_MODELS", "")
    for named in ("~/models", "$HOME/models"):
        monkeypatch.setenv("PRX_MODELS", named)
        assert list(find_models()) == ["good"]


def test_folders_of_the_repository_are_the_default(tmp_path, monkeypatch):
    monkeypatch.delenv("PRX_MODELS", raising=False)
    monkeypatch.delenv("PRX_HUB_MODELS", raising=False)
    monkeypatch.setattr(model_cache, "REPOSITORY", tmp_path)
    write_index(tmp_path / "model_cards" / "prx-scenes-small", default_sample_size=32)
    assert find_models() == {}  # as in a Space, where there is no repository around the folder
    (tmp_path / "pyproject.toml").touch()
    assert list(find_models()) == ["prx-scenes-small"]
    write_index(tmp_path / "outputs" / "quickstart", default_sample_size=32)
    write_index(tmp_path / "outputs" / "another", default_sample_size=32)
    assert list(find_models()) == ["quickstart", "prx-scenes-small", "another"]


def test_the_space_runs_from_a_folder_in_the_root():
    """As /app in a container."""
    source = Path(model_cache.__file__).read_text()
    names = {"__name__": "model_cache", "__file__": "/app/model_cache.py"}
    exec(compile(source, "/app/model_cache.py", "exec"), names)
    assert names["REPOSITORY"] == Path("/")


@pytest.mark.parametrize("entry", [None, 5, "transformer", [], ["library"], [None, None], {"library": "Class"}])
def test_pipelines_without_a_component_are_named_and_skipped(tmp_path, monkeypatch, capsys, entry):
    for component in COMPONENTS:
        write_index(tmp_path / f"bad_{component}", **{component: entry})
        write_index(tmp_path / f"cut_{component}")
        (tmp_path / f"cut_{component}" / component).rmdir()
    write_index(tmp_path / "pixels", _class_name="PRXPixelPipeline", vae=None)
    monkeypatch.setenv("PRX_MODELS", str(tmp_path))
    assert list(find_models()) == ["pixels"]
    printed = capsys.readouterr().out
    for component in COMPONENTS:
        assert f"bad_{component}: `{component}` in model_index.json is " in printed
        assert f"cut_{component}: model_index.json lists {component}" in printed


def test_an_unreachable_hub_model_is_skipped(monkeypatch, capsys):
    monkeypatch.setenv("PRX_MODELS", "")
    monkeypatch.setenv("PRX_HUB_MODELS", "nobody/nothing, ")
    assert find_models() == {}
    assert "Skipped nobody/nothing" in capsys.readouterr().out


def test_the_least_recently_used_pipeline_is_evicted(cache):
    small = ModelCache(cache.models, {}, capacity=1)
    pixels, _ = small.get("pixels")
    assert small.get("pixels")[0] is pixels
    small.get("latents")
    assert small.get("pixels")[0] is not pixels


def test_concurrent_requests_load_a_model_once(cache):
    pipelines = []
    start = threading.Barrier(4)

    def request_model():
        start.wait()
        pipelines.append(cache.get("pixels")[0])

    threads = [threading.Thread(target=request_model) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pipelines) == 4
    assert len({id(pipeline) for pipeline in pipelines}) == 1


def test_requests_without_a_lora_share_a_pipeline(cache):
    stop = threading.Event()
    with cache.lend("pixels", NO_LORA, 1.0, stop) as one, cache.lend("pixels", NO_LORA, 1.0, stop) as two:
        assert one is two


def test_lora_files_are_found_by_name(tmp_path, monkeypatch):
    (tmp_path / "style.safetensors").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / model_cache.LORA_FILE).touch()
    (tmp_path / "run" / "other.safetensors").touch()
    monkeypatch.setenv("PRX_LORAS", str(tmp_path))
    assert list(find_loras()) == ["style", "run"]
