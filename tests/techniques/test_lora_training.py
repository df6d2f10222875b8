"""LoRA training: trained parameters, resume, exports, cards, and loading of the adapter by other libraries."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState, GradientState
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

import runs
from diffusers_prx import PRXPixelPipeline
from diffusers_prx.config.settings import LORA_LAYERS
from diffusers_prx.config.training_config import TrainingConfig
from diffusers_prx.hub.cards import write_card
from diffusers_prx.hub.publishing import UNPUBLISHED_BASE, hub_id, is_generated
from diffusers_prx.pipelines.lora_formats import group_by_layer
from diffusers_prx.schedulers import PRXXPredictionScheduler
from diffusers_prx.training.bookkeeping import validate
from diffusers_prx.training.export import export_checkpoint
from diffusers_prx.training.networks import saved_settings
from diffusers_prx.training.preflight import memory, meta_networks
from diffusers_prx.training.recipes import parse_command_line
from model_cards import check_card
from runs import assert_same, copy_checkpoint, saved_state
from training import train_prx_lora

FILE = "pytorch_lora_weights.safetensors"
PROMPTS = ["a red circle", "a blue square"]
# all features at once; dropout uses the global generator, as do data loaders and validation
EVERYTHING = {
    "max_train_steps": 6,
    "checkpointing_steps": 3,
    "lora_dropout": 0.3,
    "use_ema": True,
    "ema_update_every": 1,
    "ema_decay": 0.3,
    "validation_steps": 2,
    "num_validation_samples": 3,
    "validation_prompts": PROMPTS,
    "validation_inference_steps": 2,
    "gradient_accumulation_steps": 2,
    "train_batch_size": 2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Saved pixel pipeline with random weights, also where training starts from zero."""
    folder = tmp_path_factory.mktemp("base")
    nets = runs.nets(PRXXPredictionScheduler(shift=2.0))
    nets.pipeline(runs.config(max_sequence_length=40)).save_pretrained(folder)
    return folder


def settings(output_dir: Path, base: Path, **changes) -> dict:
    own = {"transformer_config": {}, "train_text_encoder": False, "pretrained_model_name_or_path": str(base)}
    return runs.settings(output_dir, **own | {"lora_rank": 2, "shift": 2.0, "learning_rate": 1e-2} | changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base):
    return runs.train(settings(tmp_path_factory.mktemp("whole"), base, **EVERYTHING))


@pytest.fixture(scope="module")
def dora(tmp_path_factory, base):
    changes = {"use_dora": True, "lora_alpha": 4, "lora_layers": ["attention.img_qkv_proj", "modulation.lin"]}
    return runs.train(settings(tmp_path_factory.mktemp("dora"), base, **changes))


def load(base: Path, adapter: Path | None = None) -> PRXPixelPipeline:
    pipe = PRXPixelPipeline.from_pretrained(base)
    if adapter is not None:
        pipe.load_lora_weights(adapter)
    pipe.set_progress_bar_config(disable=True)
    for network in (pipe.transformer, pipe.text_encoder):
        for weight in network.parameters():  # memory-mapped weights are unaligned, which changes rounding (6e-8)
            weight.data = weight.data.clone()
    return pipe


def draw(pipe: PRXPixelPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPTS, num_inference_steps=2, generator=generator, output_type="pt").images


def test_only_the_adapter_is_trained(whole, base):
    stored = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    trained = 0
    for name, parameter in whole.nets.transformer.named_parameters():
        if "lora_" in name:
            assert parameter.requires_grad
            assert parameter.dtype == torch.float32
            trained += 1
        else:
            assert torch.equal(parameter, stored[name.replace(".base_layer", "")])
    assert trained == 2 * 2 * len(LORA_LAYERS)
    checkpoint = saved_state(whole.output_dir / "checkpoint-6")
    saved = [name for name in checkpoint if name.partition(".")[0] in ("weights", "optimizer", "average")]
    assert all("lora_" in name for name in saved)
    assert len(saved) == trained * 5  # weight, average, AdamW's two moments and its count
    record = json.loads((whole.output_dir / "training.json").read_text())
    assert record["trained_parameters"] == sum(v.numel() for v in load_file(whole.output_dir / FILE).values())
    assert not (whole.output_dir / "model_index.json").exists()


def test_resume_is_bitwise_equal(whole, tmp_path):
    copy_checkpoint(whole, 3, tmp_path)
    changes = {"resume_from_checkpoint": "latest", "output_dir": str(tmp_path)}
    runs.train(whole.cfg.to_dict() | changes)
    one, other = (saved_state(folder / "checkpoint-6") for folder in (whole.output_dir, tmp_path))
    del one["generators-0.json"], other["generators-0.json"]  # the global generators are not used
    assert_same(one, other)
    assert_same(load_file(whole.output_dir / FILE), load_file(tmp_path / FILE))


def test_recomputed_activations_have_the_same_dropout(whole, tmp_path):
    changes = {"gradient_checkpointing": True, "output_dir": str(tmp_path), "validation_prompts": []}
    runs.train(whole.cfg.to_dict() | changes)
    assert_same(load_file(whole.output_dir / FILE), load_file(tmp_path / FILE))


def test_dropout_is_used_in_training_only(whole, tmp_path):
    runs.train(whole.cfg.to_dict() | {"lora_dropout": 0.0, "output_dir": str(tmp_path)})
    one, other = load_file(whole.output_dir / FILE), load_file(tmp_path / FILE)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    history = whole.state.validation_history
    validate(whole, whole.stages[-1])
    assert history.pop() == history[-1]


def test_the_average_is_exported(whole):
    state, saved = saved_state(whole.output_dir / "checkpoint-6"), load_file(whole.output_dir / FILE)
    for name, value in saved.items():
        layer, part = name.removeprefix("transformer.").rsplit(".lora_", 1)
        key = f"transformer.{layer}.lora_{part.replace('.', '.default.')}"
        assert torch.equal(value, state[f"average.{key}"])
        assert not torch.equal(value, state[f"weights.{key}"])


@pytest.mark.parametrize("name", ["whole", pytest.param("dora", marks=pytest.mark.slow)])
def test_another_process_draws_the_same_images(name, base, request, tmp_path):
    run = request.getfixturevalue(name)
    code = (
        "import sys, torch; sys.path[:0] = sys.argv[1:3]; torch.set_num_threads(1); from pathlib import Path\n"
        "import test_lora_training as lora; images = lora.draw(lora.load(*map(Path, sys.argv[3:5])))\n"
        "torch.save(images, sys.argv[5])\n"
    )
    folders = [runs.ROOT / "tests", runs.ROOT / "tests" / "techniques", base, run.output_dir, tmp_path / "images.pt"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(runs.ROOT)])}
    subprocess.run([sys.executable, "-c", code, *map(str, folders)], check=True, env=environment)
    images = torch.load(tmp_path / "images.pt")
    pipeline = run.nets.pipeline(run.cfg)
    pipeline.transformer.eval()
    pipeline.set_progress_bar_config(disable=True)
    assert torch.equal(images, draw(pipeline))
    assert (images - draw(load(base))).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["whole", "dora"])
def test_diffusers_transformer_loads_the_adapter_through_peft(name, base, request):
    """diffusers' own class has no adapter loader, but the same layers, so peft's functions work."""
    run = request.getfixturevalue(name)
    with safe_open(run.output_dir / FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    config = LoraConfig(**{key.removeprefix("transformer."): value for key, value in metadata.items()})
    weights = {k.removeprefix("transformer."): v for k, v in load_file(run.output_dir / FILE).items()}
    stock = diffusers.PRXTransformer2DModel.from_pretrained(base, subfolder="transformer")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    text, time = torch.randn(2, 5, 16, generator=generator), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        before = stock(images, time, text).sample
        inject_adapter_in_model(config, stock)
        result = set_peft_model_state_dict(stock, weights)
        assert not result.unexpected_keys
        theirs = stock(images, time, text).sample
        ours = load(base, run.output_dir).transformer(images, time, text).sample
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert (ours - before).abs().max() > 1e-3 * theirs.abs().max()


def test_dora_trains_and_exports_its_magnitudes(dora, base):
    weights = load_file(dora.output_dir / FILE)
    magnitudes = {name: value for name, value in weights.items() if name.endswith("lora_magnitude_vector")}
    assert len(magnitudes) == 2 * 2
    stored = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, value in magnitudes.items():  # initialized from the weights, then trained
        before = stored[name.removeprefix("transformer.").replace("lora_magnitude_vector", "weight")].norm(dim=1)
        assert 0 < (value - before).abs().max() < 0.1
    pipe, images = load(base, dora.output_dir), draw(load(base))
    adapted = draw(pipe)
    assert (adapted - images).abs().max() > 1e-2
    pipe.disable_lora()
    assert torch.equal(draw(pipe), images)
    pipe.enable_lora()
    pipe.fuse_lora()
    assert (draw(pipe) - adapted).abs().max() < 1e-5
    pipe.unfuse_lora()
    assert (draw(pipe) - adapted).abs().max() < 1e-5


def test_any_checkpoint_can_be_exported(whole, base, tmp_path):
    for kind, average in (("average", None), ("weights", False)):
        export_checkpoint(whole.output_dir / "checkpoint-3", tmp_path / kind, average, runs.CARD_TEMPLATE)
        state, saved = saved_state(whole.output_dir / "checkpoint-3"), load_file(tmp_path / kind / FILE)
        key = "transformer.blocks.1.down_proj.lora_B"
        assert torch.equal(saved[f"{key}.weight"], state[f"{kind}.{key}.default.weight"])
    assert not draw(load(base, tmp_path / "average")).equal(draw(load(base, whole.output_dir)))


def test_the_card_names_the_base(whole, base):
    card = check_card(whole.output_dir / "README.md")
    assert "lora" in card.data.tags
    assert card.data.license == "unknown"
    assert is_generated(whole.output_dir / "README.md")
    assert card.data["load_from"] == str(whole.output_dir)  # publishing changes it
    for fact in (
        f"| base model | `{base.name}` |",
        "rank 2, alpha 2, dropout 0.3",
        "6, batch 4",
        f'"{whole.output_dir}"',
    ):
        assert fact in card.text


def test_the_card_gives_the_loss_on_held_out_images(whole, dora):
    text = (whole.output_dir / "README.md").read_text()
    last = json.loads((whole.output_dir / "training.json").read_text())["validation_history"][-1]
    assert f"(`num_validation_samples` 3) at step 6:\n{last['validation/loss']:.4f}, the mean over ten" in text
    assert "held-out" not in (check_card(dora.output_dir / "README.md").text)  # not measured in that run


@pytest.mark.parametrize("relative", [False, True])
def test_the_code_in_the_card_runs(whole, base, relative, tmp_path, monkeypatch):
    """The base may be a relative path."""
    folder = whole.output_dir
    monkeypatch.chdir(base.parent if relative else tmp_path)
    if relative:
        folder = shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
        record = json.loads((folder / "training.json").read_text())
        record["config"]["pretrained_model_name_or_path"] = f"./{base.name}"
        (folder / "training.json").write_text(json.dumps(record))
        write_card(folder, runs.CARD_TEMPLATE)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert f'.from_pretrained("{f"./{base.name}" if relative else base}")' in code
    code = code.replace('"image.png"', repr(str(tmp_path / "image.png")))
    names: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), names)
    assert PIL.Image.open(tmp_path / "image.png").size == (32, 32)
    assert torch.equal(draw(names["pipeline"]), draw(load(base, whole.output_dir)))


def test_pushing_an_adapter_of_a_local_base_gives_a_warning(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_of_me")
    with pytest.raises(SystemExit):
        runs.start(settings(tmp_path, base, push_to_hub=True, dry_run=True))
    assert f"warning       {UNPUBLISHED_BASE}\n" in capsys.readouterr().out
    assert hub_id("me/prx") == "me/prx"
    (tmp_path / "me" / "prx").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert [hub_id(name) for name in ("me/prx", str(base), "prx", None)] == [None] * 4


def test_frozen_weights_may_be_bf16(base, tmp_path, capsys):
    """The adapter, its optimizer state and its average stay float32."""
    changes = {"weights_dtype": "bf16", "mixed_precision": "bf16", "use_ema": True, "ema_update_every": 1}
    run = runs.train(settings(tmp_path, base, **changes, use_dora=True, max_train_steps=2))
    types = {name: p.dtype for name, p in run.nets.transformer.named_parameters()}
    assert {t for name, t in types.items() if "lora_" in name} == {torch.float32}
    assert {t for name, t in types.items() if "lora_" not in name} == {torch.bfloat16}
    output = capsys.readouterr().out
    assert "stored values by data type: {'float32': " in output
    assert "are lost" not in output
    assert {value.dtype for value in load_file(tmp_path / FILE).values()} == {torch.float32}


def _train_in_two_processes(values: dict) -> None:
    torch.set_num_threads(1)
    os.environ.pop("ACCELERATE_USE_CPU")
    runs.train(values)


@pytest.mark.parametrize("changes", [{}, {"sharding": "full", "use_dora": True}], ids=["replicated", "sharded"])
def test_two_processes_equal_one_with_a_doubled_batch(base, tmp_path, changes):
    common = {"adam_epsilon": 1e-4, "use_ema": True, "ema_update_every": 1, "validation_prompts": PROMPTS}
    values = settings(tmp_path / "one", base, **common, **changes, validation_inference_steps=1)
    runs.train(values | {"sharding": "none"})
    values |= {"train_batch_size": 2, "output_dir": str(tmp_path / "two")}
    debug_launcher(_train_in_two_processes, (values,), num_processes=2)
    one, two = (load_file(tmp_path / name / FILE) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=2e-5)
    assert max(value.abs().max() for name, value in one.items() if "lora_B" in name) > 1e-3


def test_an_instance_prompt_replaces_captions(base, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).save(photos / f"{number}.png")
    (photos / "0.txt").write_text("a caption that is not read")
    values = {"dataset_name": None, "train_data_dir": str(photos), "instance_prompt": "a blue star"}
    run = runs.start(settings(tmp_path / "run", base, **values))
    stage = run.stages[0]
    assert list(stage.captions(9)) == ["a blue star"] * 3
    batch = next(stage.training_batches(0, 0, 1, torch.device("cpu")))
    assert batch["captions"] == ["a blue star"] * 4
    for inside in (photos, photos / "runs" / "one", tmp_path / "runs" / ".." / "photos" / "run"):
        with pytest.raises(ValueError, match="`output_dir`"):  # generated images would become data
            TrainingConfig(**settings(inside, base, **values))
    # scenes in the same mixture keep their own captions
    sources = [{"name": str(photos), "weight": 1}, {"name": "scenes", "weight": 1}]
    mixed = {"dataset_name": None, "data_sources": sources, "instance_prompt": "a blue star", "train_batch_size": 8}
    run = runs.start(settings(tmp_path / "mixed", base, **mixed))
    captions = next(run.stages[0].training_batches(0, 0, 1, torch.device("cpu")))["captions"]
    assert captions.count("a blue star") == 4
    assert len(set(captions)) == 5


def test_the_script_reads_the_settings_of_the_base(base, tmp_path):
    assert saved_settings(str(base)) == {
        "prediction_type": "x_prediction",
        "noise_scale": 1.0,
        "resolution": 32,
        "max_sequence_length": 40,
        "shift": 2.0,
        "caption_cleaning": "full",
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    flags = ["--pretrained_model_name_or_path", str(base), "--dataset_name", "scenes", "--output_dir", str(tmp_path)]
    flags += ["--rank", "3", "--lora_alpha", "6", "--use_dora", "--lora_layers", "[gate_proj]"]
    train_prx_lora.main([*flags, "--mixed_precision", "no", "--max_train_steps", "1", "--report_to", "none"])
    config = json.loads((tmp_path / "training.json").read_text())["config"]
    assert (config["lora_rank"], config["learning_rate"], config["shift"]) == (3, 1e-4, 2.0)
    shapes = {name: tuple(value.shape) for name, value in load_file(tmp_path / FILE).items()}
    assert len(shapes) == 2 * 3
    assert shapes["transformer.blocks.0.gate_proj.lora_A.weight"] == (3, 32)


def test_recipe_and_flags_override_the_defaults_of_a_script(tmp_path):
    (tmp_path / "recipe.yaml").write_text("{lora_rank: 4, seed: 3}")
    flags = ["--config", str(tmp_path / "recipe.yaml"), "--seed", "5"]
    assert parse_command_line(flags, {"lora_rank": 16, "max_train_steps": 7}).settings == {
        "lora_rank": 4, "max_train_steps": 7, "seed": 5,
    }  # fmt: skip


def test_invalid_settings_end_the_script_with_one_line(base, tmp_path):
    with pytest.raises(SystemExit, match=r"^error: `lora_rank` is 16.*`pretrained_model_name_or_path`"):
        train_prx_lora.main(["--dataset_name", "scenes"])
    flags = ["--pretrained_model_name_or_path", str(base), "--dataset_name", "scenes", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"^error: `lora_rank` is null"):
        train_prx_lora.main([*flags, "--rank", "null"])
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit, match=r"^error: `lora_layers` has 'to_q'.*'down_proj'"):
        train_prx_lora.main([*flags, "--lora_layers", "[to_q]"])


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"lora_rank": 0}, "`lora_rank`"),
        ({"lora_dropout": 1.0}, "`lora_dropout`"),
        ({"lora_layers": []}, "`lora_layers`"),
        ({"lora_rank": None, "lora_alpha": 4}, "`lora_alpha`"),
        ({"lora_rank": None, "use_dora": True}, "`use_dora`"),
        ({"lora_rank": None, "lora_layers": ["up_proj"]}, "`lora_layers`"),
        ({"transformer_config": runs.TRANSFORMER}, "`transformer_config`"),
        ({"train_text_encoder": True}, "`train_text_encoder`"),
        ({"text_encoder_name_or_path": "x"}, "`text_encoder_name_or_path`"),
        ({"vae_name_or_path": "x"}, "`vae_name_or_path`"),
        ({"optimizer": "muon"}, "`optimizer`"),
        ({"stages": [{"max_train_steps": 4, "lora_rank": 3}]}, "lora_rank"),
        ({"instance_prompt": "a star"}, "`instance_prompt`"),
        ({"dataset_name": "x", "instance_prompt": "a star", "streaming": True}, "`streaming`"),
        ({"dataset_name": "x", "instance_prompt": " "}, "`instance_prompt`"),
    ],
)
def test_invalid_combinations_are_refused(changes, name, tmp_path):
    with pytest.raises(ValueError, match=name):
        TrainingConfig(**settings(tmp_path, Path("nowhere"), **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 3}, r"`adapter` .*'r': 3.*'r': 2"),
        ({"lora_alpha": 5}, r"`adapter` .*'lora_alpha': 5.*'lora_alpha': 2"),
        ({"use_dora": True}, r"`adapter` .*'use_dora': True.*'use_dora': False"),
    ],
)
def test_resume_with_another_adapter_is_refused(whole, changes, message):
    with pytest.raises(ValueError, match=message):
        runs.start(whole.cfg.to_dict() | {"resume_from_checkpoint": "latest"} | changes)


def test_resume_with_another_base_is_refused(whole, base, tmp_path):
    pipe = PRXPixelPipeline.from_pretrained(base)
    with torch.no_grad():
        pipe.transformer.blocks[0].up_proj.weight[0, 0] += 1
    pipe.save_pretrained(tmp_path)
    changes = {"resume_from_checkpoint": "latest", "pretrained_model_name_or_path": str(tmp_path)}
    with pytest.raises(ValueError, match="`adapted_weights`"):
        runs.start(whole.cfg.to_dict() | changes)


def test_planned_memory_counts_the_adapter_only(base, tmp_path):
    cfg = TrainingConfig(**settings(tmp_path, base, use_ema=True, ema_update_every=1))
    transformer = meta_networks(cfg).transformer
    adapter = sum(p.numel() for name, p in transformer.named_parameters() if "lora_" in name)
    total = sum(p.numel() for p in transformer.parameters())
    assert 0 < adapter < total
    expected = {"weights": total, "gradients": adapter, "optimizer": 2 * adapter, "average": adapter}
    assert memory(cfg, {"transformer": transformer}) == {name: 4 * count for name, count in expected.items()}


def test_the_loader_accepts_all_exported_keys(whole, dora):
    for run in (whole, dora):
        tensors = load_file(run.output_dir / FILE)
        layers, prefix = group_by_layer(tensors)
        assert prefix == "transformer."
        assert sum(map(len, layers.values())) == len(tensors)


@pytest.mark.slow
def test_compiled_blocks_train_the_same_adapter(base, tmp_path):
    for name in ("plain", "compile"):
        runs.train(settings(tmp_path / name, base, compile=name == "compile", adam_epsilon=1e-4))
    one, other = (load_file(tmp_path / name / FILE) for name in ("plain", "compile"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)
