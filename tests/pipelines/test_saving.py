"""Saving and loading between this package and stock diffusers.

This process saves pipelines. A fresh process with stock diffusers alone and one with this package load them, and what
stock saved in turn, and must draw the same images.
"""

import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import T5GemmaModuleConfig

import tiny
from diffusers_prx import latents
from diffusers_prx.models.transformer_prx import PRXTransformer2DModel
from diffusers_prx.pipelines import PRXPipeline, PRXPixelPipeline
from diffusers_prx.schedulers import PRXFlowMatchScheduler, PRXXPredictionScheduler

PIXEL = ("pixel", "published_pixel")
ARGS = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}

STOCK = """
import json, sys, warnings
warnings.simplefilter("ignore")
import diffusers, logging, numpy as np, torch
root = sys.argv[1]
messages = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("diffusers").addHandler(handler)

class ExactEuler(diffusers.FlowMatchEulerDiscreteScheduler):
    def set_timesteps(self, n=None, device=None, **kwargs):
        super().set_timesteps(sigmas=np.linspace(1, 0, n + 1)[:-1], device=device)

report = {}
for name in ("kl", "dc", "pixel", "tread", "from_published"):
    messages.clear()
    cls = diffusers.PRXPixelPipeline if name == "pixel" else diffusers.PRXPipeline
    pipe = cls.from_pretrained(f"{root}/{name}")
    report[name] = [type(pipe.scheduler).__name__, pipe.scheduler.config.shift, type(pipe.transformer).__module__]
    report[f"{name}_warnings"] = " ".join(messages)
    if name != "from_published":
        pipe.save_pretrained(f"{root}/stock_{name}")
    pipe.scheduler = ExactEuler.from_config(pipe.scheduler.config)
    image = pipe("a red cat on the beach", generator=torch.Generator().manual_seed(0), num_inference_steps=4,
                 guidance_scale=3.0, output_type="np", use_resolution_binning=False).images
    np.save(f"{root}/{name}_by_stock.npy", image)
for name in ("x_latents", "x_latents_unipc", "loud_latents", "v_pixel", "sprint", "pixel_size_tokens"):
    cls = diffusers.PRXPixelPipeline if "pixel" in name else diffusers.PRXPipeline
    try:
        cls.from_pretrained(f"{root}/{name}")
        report[name] = "loaded"
    except (ValueError, AttributeError) as error:  # diffusers 0.41 lets Python's own error through
        report[name] = str(error)
try:
    pipe = diffusers.PRXPipeline.from_pretrained(f"{root}/published_composite")
    report["published_composite"] = type(pipe.text_encoder).__name__
    torch.save(pipe.text_encoder.state_dict(), f"{root}/composite_by_stock.pt")
except Exception as error:
    report["published_composite"] = f"{type(error).__name__}: {error}"
# the size that stock would build for the other one, which takes a minute and 11 GB before it fails
from transformers import T5GemmaConfig
report["published"] = T5GemmaConfig.from_pretrained(f"{root}/published/text_encoder").encoder.hidden_size
report["ours_imported"] = [name for name in sys.modules if name.startswith("diffusers_prx")]
json.dump(report, open(f"{root}/stock.json", "w"))
"""

OURS = """
import json, sys, warnings
warnings.simplefilter("ignore")
import numpy as np, torch
from diffusers_prx.pipelines import PRXPipeline, PRXPixelPipeline
root, names = sys.argv[1], sys.argv[2].split(",")
report = {}
for name in names:
    cls = PRXPixelPipeline if "pixel" in name else PRXPipeline
    pipe = cls.from_pretrained(f"{root}/{name}")
    parts = [pipe.scheduler, pipe.transformer, pipe.text_encoder]
    config = {key: value for key, value in pipe.config.items() if not isinstance(value, tuple)}
    report[name] = {"classes": [f"{type(part).__module__}.{type(part).__name__}" for part in parts], "config": config,
                    "scheduler": {key: pipe.scheduler.config.get(key) for key in ("shift", "logit_mean", "clamp")}}
    image = pipe("a red cat on the beach", generator=torch.Generator().manual_seed(0), num_inference_steps=4,
                 guidance_scale=3.0, output_type="np").images
    np.save(f"{root}/{name}_by_ours.npy", image)
    report[name]["token_route"] = pipe.config.get("token_route")
    if name in ("sprint", "pixel_size_tokens"):
        torch.save(pipe.transformer.state_dict(), f"{root}/{name}_weights.pt")
    if name == "published":
        torch.save(pipe.text_encoder.state_dict(), f"{root}/text_weights.pt")
json.dump(report, open(f"{root}/ours.json", "w"))
"""


def draw(pipe):
    return pipe("a red cat on the beach", generator=torch.Generator().manual_seed(0), **ARGS).images


def publish(root: Path, name: str, source: str, text_folder_model=None, **entries) -> None:
    """Make a folder in the layout of the published checkpoints from one of ours, without our keys."""
    shutil.copytree(root / source, root / name)
    if text_folder_model is not None:
        shutil.rmtree(root / name / "text_encoder")
        text_folder_model.save_pretrained(root / name / "text_encoder")
    index = json.loads((root / name / "model_index.json").read_text())
    del index["prediction_type"]
    if "pixel" not in name:
        del index["noise_scale"]
    (root / name / "model_index.json").write_text(json.dumps(index | entries))
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(root / name / "scheduler")


def run(code: str, *arguments: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    pipes = {
        "kl": tiny.latent_pipeline(scheduler=PRXFlowMatchScheduler(shift=3.0, logit_mean=0.25)),
        "dc": tiny.latent_pipeline(tiny.vae_dc()),
        "pixel": tiny.pixel_pipeline(scheduler=PRXXPredictionScheduler(shift=3.0, clamp=0.1)),
        "x_latents": tiny.latent_pipeline(scheduler=PRXXPredictionScheduler(shift=3.0)),
        "x_latents_unipc": tiny.latent_pipeline(
            scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
            prediction_type="x_prediction",
        ),
        "loud_latents": tiny.latent_pipeline(noise_scale=2.0),
        "v_pixel": tiny.pixel_pipeline(scheduler=PRXFlowMatchScheduler(shift=3.0)),
        "sprint": tiny.latent_pipeline(transformer=tiny.transformer(fusion_range=[0, 1]), token_route=(0, 1, 0.75)),
        "pixel_size_tokens": tiny.pixel_pipeline(
            transformer=tiny.transformer(**tiny.PIXEL_SETTINGS, resolution_tokens=True)
        ),
        "tread": tiny.latent_pipeline(token_route=(0, 2, 0.5)),
        "dynamic": tiny.latent_pipeline(),
    }
    images = {name: draw(pipe) for name, pipe in pipes.items()}
    for name, pipe in pipes.items():
        pipe.save_pretrained(root / name)
        assert type(pipe.scheduler).__name__ == pipe.config["scheduler"][1]  # saving changed nothing in the pipeline
    stock_only = FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=True)
    stock_only.save_pretrained(root / "dynamic" / "scheduler")

    whole = tiny.t5gemma_model(seed=3)
    publish(root, "published", "kl", whole.encoder, text_encoder=["prx", "T5GemmaEncoder"])
    publish(root, "published_composite", "kl", whole.encoder, text_encoder=["prx", "T5GemmaEncoder"])
    whole.config.save_pretrained(root / "published_composite" / "text_encoder")
    publish(root, "published_pixel", "pixel", vae=[None, None])
    published = PRXPipeline.from_pretrained(root / "published")
    published.set_progress_bar_config(disable=True)
    published.save_pretrained(root / "from_published")
    images["published"] = images["published_composite"] = images["from_published"] = draw(published)
    images["published_pixel"] = images["pixel"]

    run(STOCK, str(root))
    for name in ("kl", "dc", "pixel", "tread"):
        images[f"stock_{name}"] = images[name]
    run(OURS, str(root), ",".join(images))
    stock = json.loads((root / "stock.json").read_text())
    ours = json.loads((root / "ours.json").read_text())
    return root, images, stock, ours, whole


LOADED = ["kl", "dc", "pixel", "x_latents", "x_latents_unipc", "loud_latents", "v_pixel"]
LOADED += ["stock_kl", "stock_dc", "stock_pixel", "published", "published_composite", "from_published"]
LOADED += ["published_pixel", "sprint", "pixel_size_tokens", "tread", "stock_tread"]


@pytest.mark.parametrize("name", LOADED)
def test_loaded_pipeline_draws_the_same(saved, name):
    root, images, _, ours, _ = saved
    assert np.abs(np.load(root / f"{name}_by_ours.npy") - images[name]).max() < 1e-5
    scheduler, transformer, _ = ours[name]["classes"]
    assert transformer == "diffusers_prx.models.transformer_prx.PRXTransformer2DModel"
    if name != "x_latents_unipc":
        x_prediction = name in ("pixel", "stock_pixel", "published_pixel", "pixel_size_tokens", "x_latents")
        expected = "PRXXPredictionScheduler" if x_prediction else "PRXFlowMatchScheduler"
        assert scheduler == f"diffusers_prx.schedulers.scheduling_prx.{expected}"
        assert ours[name]["scheduler"]["shift"] == 3.0


@pytest.mark.parametrize("name", ["kl", "dc", "pixel", "tread", "from_published"])
def test_stock_loads_compatible_pipelines_without_this_package(saved, name):
    root, images, stock, _, _ = saved
    assert stock["ours_imported"] == []
    assert stock[name] == ["FlowMatchEulerDiscreteScheduler", 3.0, "diffusers.models.transformers.transformer_prx"]
    assert np.abs(np.load(root / f"{name}_by_stock.npy") - images[name]).max() < 1e-4
    warnings = stock[f"{name}_warnings"]
    assert not any(option in warnings for option in ("resolution_tokens", "fusion_range"))
    assert ("token_route" in warnings) == (name == "tread")  # stock warns that it ignores the route


@pytest.mark.parametrize(
    "name", ["x_latents", "x_latents_unipc", "loud_latents", "v_pixel", "sprint", "pixel_size_tokens"]
)
def test_stock_refuses_incompatible_pipelines(saved, name):
    _, _, stock, _, _ = saved
    assert re.search(r"`diffusers` has no class `PRX|module diffusers has no attribute PRX", stock[name]), stock[name]
    assert "pip install diffusers-prx" in stock[name]


@pytest.mark.skipif(Version(diffusers.__version__) < Version("0.42"), reason="older ones load neither")
def test_stock_loads_one_of_the_two_kinds_of_published_text_encoders(saved):
    """Both have the same weights. With the encoder's own configuration stock uses transformers' default sizes."""
    root, _, stock, _, whole = saved
    assert stock["published_composite"] == "T5GemmaEncoder"
    loaded, expected = torch.load(root / "composite_by_stock.pt"), whole.encoder.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())
    assert whole.encoder.config.hidden_size != stock["published"] == T5GemmaModuleConfig().hidden_size


def test_settings_that_stock_lacks_survive_a_round_trip(saved):
    _, _, _, ours, _ = saved
    assert ours["kl"]["scheduler"]["logit_mean"] == ours["stock_kl"]["scheduler"]["logit_mean"] == 0.25
    assert ours["pixel"]["scheduler"]["clamp"] == ours["stock_pixel"]["scheduler"]["clamp"] == 0.1
    assert ours["x_latents"]["config"]["prediction_type"] == "x_prediction"
    assert ours["loud_latents"]["config"]["noise_scale"] == 2.0


@pytest.mark.parametrize("name", ["sprint", "pixel_size_tokens"])
def test_transformer_options_that_stock_lacks_change_the_stored_class_name(saved, name):
    root, _, stock, ours, _ = saved
    assert "PRXExtendedTransformer2DModel" in stock[name]
    index = json.loads((root / name / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "PRXExtendedTransformer2DModel (pip install diffusers-prx)"]
    config = json.loads((root / name / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "PRXExtendedTransformer2DModel"
    settings = {"fusion_range": [0, 1]} if name == "sprint" else tiny.PIXEL_SETTINGS | {"resolution_tokens": True}
    assert settings.items() <= config.items()
    expected = tiny.transformer(**settings).state_dict()
    loaded = torch.load(root / f"{name}_weights.pt")
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())
    assert ours[name]["token_route"] == ([0, 1, 0.75] if name == "sprint" else None)


def test_token_route_is_stored(saved):
    """Stock drops it."""
    root, _, _, ours, _ = saved
    assert ours["tread"]["token_route"] == [0, 2, 0.5]
    assert ours["stock_tread"]["token_route"] is None
    assert ours["kl"]["token_route"] is None
    assert "token_route" not in (root / "kl" / "model_index.json").read_text()


def test_published_text_encoder_is_loaded_bit_by_bit(saved):
    root, _, _, ours, whole = saved
    loaded = torch.load(root / "text_weights.pt")
    expected = {f"encoder.{key}": value for key, value in whole.encoder.state_dict().items()}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())
    for name in ("published", "published_composite", "from_published"):
        assert ours[name]["classes"][2].endswith(".T5GemmaEncoderModel")


def test_published_text_encoder_with_missing_layers_is_refused(saved, tmp_path):
    root, *_ = saved
    shutil.copytree(root / "published", tmp_path / "broken")
    broken = tiny.t5gemma_model().encoder
    del broken.layers[1]
    broken.save_pretrained(tmp_path / "broken" / "text_encoder")
    config = tmp_path / "broken" / "text_encoder" / "config.json"
    shutil.copy(root / "published" / "text_encoder" / "config.json", config)
    with pytest.raises(ValueError, match=r"T5GemmaEncoderModel.*layers"):
        PRXPipeline.from_pretrained(tmp_path / "broken")


def test_stored_class_names_and_settings(saved):
    root, *_ = saved
    index = json.loads((root / "kl" / "model_index.json").read_text())
    assert index["_class_name"] == "PRXPipeline"
    assert index["transformer"] == ["diffusers", "PRXTransformer2DModel"]
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert (index["noise_scale"], index["prediction_type"]) == (1.0, "velocity")
    scheduler = json.loads((root / "kl" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["shift"]) == ("FlowMatchEulerDiscreteScheduler", 3.0)
    pixel = json.loads((root / "pixel" / "model_index.json").read_text())
    assert (pixel["noise_scale"], pixel["_class_name"]) == (2.0, "PRXPixelPipeline")


def test_stock_scheduler_with_options_of_its_own_is_kept(saved):
    root, *_ = saved
    pipe = PRXPipeline.from_pretrained(root / "dynamic")
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    assert pipe.scheduler.config.use_karras_sigmas


def test_loading_with_the_other_pipeline_class_is_refused(saved):
    root, *_ = saved
    with pytest.raises(ValueError, match=r"PRXPipeline\.from_pretrained"):
        PRXPixelPipeline.from_pretrained(root / "kl")
    with pytest.raises(ValueError, match=r"PRXPixelPipeline\.from_pretrained"):
        PRXPipeline.from_pretrained(root / "pixel")


def test_loading_from_the_cache_of_the_hub(saved, tmp_path):
    """diffusers reads model_index.json by its file name here."""
    root, images, *_ = saved
    repository = tmp_path / "models--someone--prx"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(root / "published", repository / "snapshots" / ("a" * 40))
    pipe = PRXPipeline.from_pretrained("someone/prx", cache_dir=tmp_path, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(pipe), images["published"])


def test_options_of_from_pretrained(saved):
    """dtype for all and per component, passed components, omitted components, and a variant."""
    root, *_ = saved
    for folder in ("kl", "published"):
        half = PRXPipeline.from_pretrained(root / folder, dtype=torch.bfloat16)
        assert {half.transformer.dtype, half.text_encoder.dtype, half.vae.dtype} == {torch.bfloat16}
    mixed = PRXPipeline.from_pretrained(
        root / "published", dtype={"default": torch.float32, "text_encoder": torch.bfloat16}
    )
    assert (mixed.transformer.dtype, mixed.text_encoder.dtype) == (torch.float32, torch.bfloat16)
    text_only = PRXPipeline.from_pretrained(root / "published", transformer=None, vae=None)
    assert text_only.transformer is None
    assert text_only.encode_prompt("a cat")[0].shape == (1, 3, tiny.TEXT_WIDTH)
    scheduler = PRXFlowMatchScheduler(shift=5.0)
    transformer = tiny.transformer(seed=5)
    passed = PRXPipeline.from_pretrained(root / "stock_kl", scheduler=scheduler, transformer=transformer)
    assert passed.scheduler is scheduler
    assert passed.transformer is transformer
    with pytest.raises(ValueError, match="PRXFlowMatchScheduler"):
        PRXPipeline.from_pretrained(root / "kl", scheduler=PRXXPredictionScheduler())
    passed.save_pretrained(root / "variant", variant="fp16")
    assert PRXPipeline.from_pretrained(root / "variant", variant="fp16").scheduler.config["shift"] == 5.0


@pytest.mark.parametrize("layout", ["whole", "sharded", "variant", "device_map"])
@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_missing_weight_is_an_error(tmp_path, layout, part):
    """diffusers and transformers initialize it at random."""
    options = {"sharded": {"max_shard_size": "40KB"}, "variant": {"variant": "fp16"}}.get(layout, {})
    load = {"variant": {"variant": "fp16"}, "device_map": {"device_map": "cpu"}}.get(layout, {})
    tiny.latent_pipeline().save_pretrained(tmp_path, **options)
    PRXPipeline.from_pretrained(tmp_path, **load)
    file = sorted((tmp_path / part).glob("*.safetensors"))[-1]
    tensors = load_file(file)
    name = sorted(tensors)[len(tensors) // 2]
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(name)):
        PRXPipeline.from_pretrained(tmp_path, **load)
    if part == "transformer":
        with pytest.raises(ValueError, match=re.escape(name)):
            PRXTransformer2DModel.from_pretrained(tmp_path, subfolder=part, **load)
        if layout in ("whole", "variant"):  # the report is returned with the model
            _, info = PRXTransformer2DModel.from_pretrained(tmp_path, subfolder=part, output_loading_info=True, **load)
            assert info["missing_keys"] == [name]
    if part == "vae" and not load:
        with pytest.raises(ValueError, match=re.escape(name)):
            latents.load_vae(str(tmp_path))


def test_components_keep_their_public_classes(tmp_path):
    tiny.latent_pipeline().save_pretrained(tmp_path)
    pipe = PRXPipeline.from_pretrained(tmp_path)
    assert type(pipe.vae) is diffusers.AutoencoderKL
    assert type(pipe.text_encoder).__module__.startswith("transformers.")
    pipe.save_pretrained(tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert (index["vae"], index["text_encoder"]) == (
        ["diffusers", "AutoencoderKL"],
        ["transformers", "T5GemmaEncoderModel"],
    )


def test_from_pipe_keeps_the_dtypes_of_both():
    pipe = tiny.latent_pipeline()
    pipe.text_encoder.bfloat16()
    expected = draw(pipe)
    other = PRXPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert (other.text_encoder.dtype, other.transformer.dtype) == (torch.bfloat16, torch.float32)
    assert np.array_equal(draw(other), expected)
    assert np.array_equal(draw(pipe), expected)
    assert PRXPipeline.from_pipe(pipe, dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


def test_copies_and_components():
    pipe = tiny.latent_pipeline()
    image = draw(pipe)
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe)), PRXPipeline.from_pipe(pipe)):
        other.set_progress_bar_config(disable=True)
        assert np.array_equal(draw(other), image)
