"""Techniques in steps and runs: bitwise equal if off; together they train or are rejected."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import runs
import tiny
from diffusers_prx import PRXPixelPipeline
from diffusers_prx.config.training_config import TrainingConfig
from diffusers_prx.models.token_routing import sample_route
from diffusers_prx.schedulers import PRXFlowMatchScheduler, PRXXPredictionScheduler
from diffusers_prx.techniques.losses import LPIPSLoss
from diffusers_prx.training.networks import Nets, add_techniques, check_fit
from diffusers_prx.training.rng import StepRandom
from diffusers_prx.training.run import Run
from diffusers_prx.training.step import train_step
from diffusers_prx.training.trainer import train

RANGE = [1, 2]  # the blocks that tokens go around; block 1 is the aligned one too
REPA = {"repa_weight": 0.5, "repa_block": 1, "repa_teacher": "teacher"}
DINO = {"dino_weight": 0.01, "dino_teacher": "teacher", "dino_size": 16}
# What each switch sets. "transformer" and "folders" are not settings: a change of the transformer's configuration.
SWITCHES: dict[str, dict] = {
    "tread": {"route_ratio": 0.5, "route_range": RANGE},
    "sprint": {"route_ratio": 0.75, "route_range": RANGE, "transformer": {"fusion_range": RANGE}},
    "repa_mlp": REPA,
    "repa_conv": REPA | {"repa_projector": "conv"},
    "repa_attention": REPA | {"repa_projector": "attention"},
    "irepa_gamma": {"repa_spatial_gamma": 0.8},
    "contrastive": {"contrastive_weight": 0.05},
    "lpips": {"lpips_weight": 0.1},
    "dino_resized": DINO,
    "dino_cropped": DINO | {"dino_crop": True},
    "x_prediction": {"prediction_type": "x_prediction"},
    "noise_scale": {"noise_scale": 2.0},
    "resolution_embeds": {"transformer": {"resolution_embeds": True}},
    "resolution_tokens": {"transformer": {"resolution_tokens": True}},
    "bottleneck": {"transformer": {"bottleneck_size": 16}},
    "latents": {"vae_name_or_path": "vae", "transformer": {"patch_size": 4}},
    "decode_latents": {"perceptual_decode_latents": True},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "train_text_encoder": {"train_text_encoder": True},
}
ALTERNATIVES = (
    {"tread", "sprint"},
    {"repa_mlp", "repa_conv", "repa_attention"},
    {"dino_resized", "dino_cropped"},
)  # two of these cannot be said at once


def possible(names: set[str]) -> bool:
    return all(len(names & group) <= 1 for group in ALTERNATIVES)


PAIRS = [pair for pair in itertools.combinations(SWITCHES, 2) if possible(set(pair))]
# one of each group of alternatives, with and without what two of them exclude, and all that has no alternative
ALL_TOGETHER = [
    (route, projector, dino, *space, *prediction, "irepa_gamma", "contrastive", "lpips", "noise_scale",
     "resolution_embeds", "resolution_tokens", "bottleneck", "gradient_checkpointing", "train_text_encoder")
    for route, projector, dino, space, prediction in itertools.product(
        ("tread", "sprint"), ("repa_mlp", "repa_conv", "repa_attention"), ("dino_resized", "dino_cropped"),
        ((), ("latents", "decode_latents")), ((), ("x_prediction",)),
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folders of a vision teacher, a text encoder and an autoencoder."""
    folder = tmp_path_factory.mktemp("networks")
    tiny.vae_kl().save_pretrained(folder / "vae")
    return {
        "teacher": runs.save_teacher(folder / "teacher"),
        "text_encoder": runs.save_text_encoder(folder / "text_encoder"),
        "vae": folder / "vae",
    }


@pytest.fixture(scope="module")
def lpips(tmp_path_factory) -> LPIPSLoss:
    return LPIPSLoss(0.5, runs.save_vgg16(tmp_path_factory.mktemp("vgg16"))).requires_grad_(False)


def settings_of(names) -> tuple[dict, dict]:
    """Return the settings of a run and of its transformer for a set of techniques."""
    settings, transformer = {"train_text_encoder": False, "prediction_type": "velocity"}, {"bottleneck_size": None}
    for name in names:
        transformer |= SWITCHES[name].get("transformer", {})
        settings |= {key: value for key, value in SWITCHES[name].items() if key != "transformer"}
    return settings, transformer


def set_up(names, folders: dict[str, Path], lpips: LPIPSLoss | None = None) -> tuple[Nets, TrainingConfig]:
    """Build networks for a set of techniques: 2 blocks with random modulation, 16 tokens, 32 pixels."""
    settings, transformer = settings_of(names)
    settings |= {key: str(folders["teacher"]) for key in ("repa_teacher", "dino_teacher") if key in settings}
    transformer = {"patch_size": 8} | transformer
    cfg = runs.config(transformer_config=runs.TRANSFORMER | transformer, **settings)
    scheduler = {"velocity": PRXFlowMatchScheduler, "x_prediction": PRXXPredictionScheduler}[cfg.prediction_type]
    nets = runs.nets(scheduler(), tiny.vae_kl() if cfg.vae_name_or_path else None, **transformer)
    check_fit(nets.transformer.config, nets.vae, [cfg])
    # building LPIPS takes a second, so the tests share one
    add_techniques(nets, [dataclasses.replace(cfg, lpips_weight=0.0, perceptual_decode_latents=bool(cfg.dino_weight))])
    nets.lpips = lpips if cfg.lpips_weight else None
    for frozen in (nets.text_encoder, nets.vae):
        if frozen is not None:
            frozen.requires_grad_(False)
    for module in nets.trainable(cfg).values():
        module.requires_grad_(True).train()
    if cfg.gradient_checkpointing:
        nets.transformer.enable_gradient_checkpointing()
    return nets, cfg


def rng(step: int = 3) -> StepRandom:
    return StepRandom(42, step, range(10, 14))


def batch() -> dict:
    return runs.batch(resolution=32)


def named_parameters(nets: Nets, cfg: TrainingConfig) -> list[tuple[str, torch.nn.Parameter]]:
    """Return all trainable parameters."""
    return [
        (f"{name}.{key}", parameter)
        for name, module in nets.trainable(cfg).items()
        for key, parameter in module.named_parameters()
    ]


# Everything off


def plain_step(batch: dict, nets: Nets, cfg: TrainingConfig, step: int) -> torch.Tensor:
    """Compute only the flow-matching loss."""
    draw = StepRandom(cfg.seed, step, batch["sample_index"])
    x_0 = batch["pixels_uint8"].float() / 127.5 - 1
    if nets.vae is not None:
        codes = nets.vae.encode(x_0).latent_dist
        shift, scale = nets.vae.config.shift_factor, nets.vae.config.scaling_factor
        mean, std = (codes.mean - shift) * scale, codes.std * scale
        x_0 = mean + std * draw.normal("latents", mean.shape[1:])
    kept = [
        caption if drop >= cfg.caption_dropout else ""
        for drop, caption in zip(draw.uniform("caption_dropout"), batch["captions"])
    ]
    tokens = nets.tokenizer(kept, padding="longest", padding_side="right", return_tensors="pt")
    mask = tokens["attention_mask"].bool()
    text = nets.text_encoder(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state
    t = nets.scheduler.timesteps_from_uniforms(draw.uniform("timestep", (3,)))
    noise = draw.normal("noise", x_0.shape[1:])
    x_t = (1 - t.view(-1, 1, 1, 1)) * x_0 + t.view(-1, 1, 1, 1) * noise
    output = nets.transformer(x_t, t, text, mask)[0]
    target = noise - x_0
    if cfg.prediction_type == "x_prediction":
        divisor = t.view(-1, 1, 1, 1).clamp(min=0.05)
        output, target = (x_t - output) / divisor, (x_t - x_0) / divisor
    return (output - target).square().mean(dim=(1, 2, 3)).mean()


def loss_and_gradients(loss: torch.Tensor, nets: Nets, cfg: TrainingConfig) -> tuple[torch.Tensor, dict]:
    for module in nets.trainable(cfg).values():
        module.zero_grad()
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in named_parameters(nets, cfg)}


@pytest.mark.parametrize("prediction", [(), ("x_prediction",)], ids=str)
@pytest.mark.parametrize("space", [(), ("latents",)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_disabled_techniques_equal_the_plain_step_bitwise(space, prediction, dropout, folders):
    """Also if the networks of a technique exist but are unused, as after the end of alignment."""
    nets, cfg = set_up(["train_text_encoder", *space, *prediction], folders)
    cfg = dataclasses.replace(cfg, caption_dropout=dropout)
    idle, _ = set_up(["train_text_encoder", "repa_mlp", *space, *prediction], folders)
    idle = dataclasses.replace(idle, projector=None)
    assert idle.teacher is not None
    wanted = loss_and_gradients(plain_step(batch(), nets, cfg, 3), nets, cfg)
    for of in (nets, idle):
        output = train_step(batch(), of, cfg, rng())
        assert output.losses.keys() == {"flow"}
        runs.assert_same(loss_and_gradients(output.loss, of, cfg), wanted)
    other = loss_and_gradients(train_step(batch(), nets, cfg, rng(4)).loss, nets, cfg)
    assert not torch.equal(other[0], wanted[0])


# All techniques on


def expected_error(names: set[str]) -> str | None:
    """Return a pattern of the error for incompatible techniques, or None."""
    if "irepa_gamma" in names and not any(name.startswith("repa_") for name in names):
        return "`repa_spatial_gamma` is 0.8.*`repa_weight`"
    if "repa_conv" in names and names & {"tread", "sprint"}:
        return "`repa_projector` is conv.*`route_ratio`"
    perceptual = names & {"lpips", "dino_resized", "dino_cropped"}
    if "decode_latents" in names and not perceptual:
        return "`perceptual_decode_latents`.*`lpips_weight`"
    if perceptual and "latents" in names and "decode_latents" not in names:
        return "`lpips_weight`.*`--perceptual_decode_latents`"
    if "decode_latents" in names and "latents" not in names:
        return "`perceptual_decode_latents`"
    return None


def check_that_they_train(names, folders: dict[str, Path], lpips: LPIPSLoss) -> None:
    """Check for finite losses of the techniques, and gradients on exactly the trainable parameters."""
    names = set(names)
    reason = expected_error(names)
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            set_up(names, folders, lpips)
        return
    nets, cfg = set_up(names, folders, lpips)
    output = train_step(batch(), nets, cfg, rng())
    weights = {"flow": 1.0}
    for loss, weight, switches in (
        ("contrastive", -0.05, {"contrastive"}),
        ("alignment", 0.5, {"repa_mlp", "repa_conv", "repa_attention"}),
        ("lpips", 0.1, {"lpips"}),
        ("dino", 0.01, {"dino_resized", "dino_cropped"}),
    ):
        if names & switches:
            weights[loss] = weight
    assert output.losses.keys() == weights.keys()
    losses = {name: value.item() for name, value in output.losses.items()}
    assert all(np.isfinite(value) and value > 0 for value in losses.values())
    assert output.loss.item() == pytest.approx(sum(weights[name] * losses[name] for name in losses), rel=1e-5)
    output.loss.backward()
    for name, parameter in named_parameters(nets, cfg):
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name
    expected = {"transformer"}
    expected |= {"text_encoder"} & ({"text_encoder"} if "train_text_encoder" in names else set())
    expected |= {"projector"} if "alignment" in losses else set()
    assert nets.trainable(cfg).keys() == expected
    frozen = [nets.teacher, nets.dino, nets.lpips, nets.vae]
    frozen += [] if cfg.train_text_encoder else [nets.text_encoder]
    assert all(p.grad is None for module in frozen if module is not None for p in module.parameters())


@pytest.mark.parametrize("names", [(name,) for name in SWITCHES] + PAIRS, ids="-".join)
def test_pairs_of_techniques_train_or_are_rejected(names, folders, lpips):
    check_that_they_train(names, folders, lpips)


@pytest.mark.parametrize("names", ALL_TOGETHER, ids=lambda names: "-".join(names[:5]))
def test_all_techniques_together_train_or_are_rejected(names, folders, lpips):
    check_that_they_train(names, folders, lpips)


# Routing and alignment


@pytest.mark.parametrize("route", ["tread", "sprint"])
@pytest.mark.parametrize("gamma", [(), ("irepa_gamma",)], ids=str)
def test_alignment_of_routed_tokens_equals_the_gathered_one(route, gamma, folders):
    """New blocks are the identity, so tokens do not depend on each other."""
    nets, cfg = set_up([route, "repa_mlp", *gamma], folders)
    for block in nets.transformer.blocks:
        torch.nn.init.zeros_(block.modulation.lin.weight)
        torch.nn.init.zeros_(block.modulation.lin.bias)
    whole = dataclasses.replace(cfg, route_ratio=0.0)
    with torch.no_grad():
        loss, other = (train_step(batch(), nets, c, rng()).losses["alignment"] for c in (cfg, whole))
        features = []
        for module in (nets.teacher, nets.projector):  # in the order of their calls
            module.register_forward_hook(lambda _module, _inputs, output: features.append(output.double()))
        train_step(batch(), nets, whole, rng())
        target, projected = features  # (B, N, E) each, of the whole grid
    if gamma:
        target = (target - 0.8 * target.mean(1, keepdim=True)) / target.std(1, keepdim=True)
    kept = sample_route(rng().uniform("route", (16,)), cfg.route_ratio, *RANGE).kept
    assert kept.shape == (4, 8 if route == "tread" else 4)
    cosines = [
        sum(F.cosine_similarity(projected[i, n], target[i, n], dim=0).item() for n in kept[i]) / len(kept[i])
        for i in range(4)
    ]
    assert loss.item() == pytest.approx(1 - np.mean(cosines), abs=1e-6)
    assert abs(loss - other) > 1e-3  # the mean over all tokens is another


@pytest.mark.parametrize("route", ["tread", "sprint"])
@pytest.mark.parametrize("projector", ["repa_mlp", "repa_attention"])
def test_checkpointing_repeats_the_route(route, projector, folders):
    plain, cfg = set_up([route, projector, "train_text_encoder"], folders)
    recomputed, _ = set_up([route, projector, "train_text_encoder", "gradient_checkpointing"], folders)
    recomputed.projector.load_state_dict(plain.projector.state_dict())
    blocks = recomputed.transformer.blocks
    seen: list[tuple[int, torch.Size]] = []
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda _block, inputs, index=index: seen.append((index, inputs[0].shape[1])))
    one, other = (
        loss_and_gradients(train_step(batch(), nets, cfg, rng()).loss, nets, cfg) for nets in (plain, recomputed)
    )
    runs.assert_same(other, one)
    few = 8 if route == "tread" else 4
    assert seen == [(0, 16), (1, few), (1, few), (0, 16)]  # forward, and again in the backward
    drawn = [sample_route(rng(step).uniform("route", (16,)), 0.5, *RANGE).kept for step in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# Whole runs: everything that belongs to a run and not to a step

EVERYTHING = {
    "transformer_config": runs.TRANSFORMER | {"patch_size": 8, "fusion_range": RANGE, "resolution_tokens": True},
    "optimizer": "muon",
    "use_ema": True,
    "ema_update_every": 1,
    "ema_decay": 0.3,
    "max_train_steps": 6,
    "checkpointing_steps": 1,
    "route_ratio": 0.75,
    "route_range": RANGE,
    "contrastive_weight": 0.05,
    "repa_weight": 0.5,
    "repa_block": 1,
    "repa_projector": "attention",
    "repa_spatial_gamma": 0.8,
    "repa_until_step": 3,
    "repa_check_steps": 2,
    "dino_weight": 0.01,
    "dino_size": 16,
    "dino_crop": True,
    "gradient_checkpointing": True,
    "caption_dropout": 0.3,
    "num_validation_samples": 2,
    "validation_prompts": ["a red circle"],
    "validation_inference_steps": 2,
}


def train_and_watch(values: dict) -> tuple[Run, dict[str, list[int]]]:
    """Train, and return the run and the steps that called teacher and projector."""
    run = runs.start(values)
    steps: dict[str, list[int]] = {"teacher": [], "projector": []}
    for name, module in (("teacher", run.nets.teacher), ("projector", run.nets.projector)):
        if module is not None:
            module.register_forward_pre_hook(lambda *_, name=name: steps[name].append(run.state.step))
    train(run)
    return run, steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory, folders) -> tuple[Run, dict[str, list[int]]]:
    """Finished run of six steps with all compatible techniques, aligned in the first three."""
    other = runs.save_teacher(tmp_path_factory.mktemp("other_teacher"))  # the losses share one where it is the same
    values = EVERYTHING | {"repa_teacher": str(folders["teacher"]), "dino_teacher": str(other)}
    return train_and_watch(runs.settings(tmp_path_factory.mktemp("whole"), folders["text_encoder"], **values))


def logged(run: Run, name: str) -> dict[int, float]:
    """Return a logged value by step."""
    return {entry["step"]: entry[name] for entry in run.state.history if name in entry}


def test_alignment_ends_at_its_step(whole):
    run, steps = whole
    assert steps == {"teacher": [0, 1, 2], "projector": [0, 1, 2]}
    assert run.nets.teacher is None  # nor does it take memory
    assert logged(run, "loss/alignment").keys() == {1, 2, 3}
    assert logged(run, "loss/flow").keys() == {1, 2, 3, 4, 5, 6}
    for name in ("contrastive", "dino", "flow"):
        assert len(logged(run, f"loss/{name}")) == 6
    assert all(np.isfinite(value) for entry in run.state.history for value in entry.values())
    weights = [runs.saved_weights(run.output_dir / f"checkpoint-{step}", "projector") for step in (1, 2, 3, 4, 6)]
    changed = [any(not torch.equal(a[k], b[k]) for k in a) for a, b in itertools.pairwise(weights)]
    assert changed == [True, True, False, False]  # the projector rests once it is not used


@pytest.mark.parametrize("step", [2, 3, 4])
def test_resuming_across_the_end_of_alignment_is_bitwise(whole, tmp_path, step):
    run, steps = whole
    runs.copy_checkpoint(run, step, tmp_path)
    changes = {"output_dir": str(tmp_path), "resume_from_checkpoint": "latest"}
    if step >= 3:
        changes["repa_teacher"] = "not there any more, and not needed"
    resumed, seen = train_and_watch(run.cfg.to_dict() | changes)
    assert seen["teacher"] == [s for s in steps["teacher"] if s >= step]
    one, other = (runs.saved_state(r.output_dir / "checkpoint-6") for r in (run, resumed))
    networks = {name.split(".")[1] for name in one if name.startswith("weights.")}
    assert networks == {"transformer", "text_encoder", "projector"}
    runs.assert_same(other, one)
    assert logged(resumed, "loss/alignment") == logged(run, "loss/alignment")


def test_gradient_cosine_is_recorded(whole):
    run, _ = whole
    record = json.loads((run.output_dir / "training.json").read_text())
    assert record["alignment_history"] == run.state.alignment_history
    assert [entry["step"] for entry in record["alignment_history"]] == [0, 2]
    assert record["alignment_history"][0]["cosine"] == 0  # the last layer of a new transformer is zero: no flow yet
    assert 0 < abs(record["alignment_history"][1]["cosine"]) < 1


def test_recorded_cosine_equals_two_backward_passes(whole, tmp_path):
    run, _ = whole
    runs.copy_checkpoint(run, 2, tmp_path)
    changes = {"output_dir": str(tmp_path), "resume_from_checkpoint": "latest"}
    resumed = runs.start(run.cfg.to_dict() | changes)
    stage = resumed.stages[0]
    nets = dataclasses.replace(resumed.nets, scheduler=PRXXPredictionScheduler(shift=1.0), lpips=None, dino=None)
    sample = next(iter(stage.training_batches(2, 0, 1, torch.device("cpu"))))
    grads = []
    for name in ("flow", "alignment"):
        nets.transformer.zero_grad()
        train_step(sample, nets, run.cfg, StepRandom(42, 2, sample["sample_index"])).losses[name].backward()
        block = nets.transformer.blocks[1]
        grads.append(np.concatenate([p.grad.double().flatten().numpy() for p in block.parameters()]))
    cosine = grads[0] @ grads[1] / np.linalg.norm(grads[0]) / np.linalg.norm(grads[1])
    assert run.state.alignment_history[1]["cosine"] == pytest.approx(cosine, rel=1e-3, abs=1e-5)


@pytest.fixture(scope="module")
def measured(tmp_path_factory, folders) -> tuple[Run, dict[str, list[int]]]:
    """Finished run whose alignment ends at the first negative cosine."""
    values = {
        "repa_weight": 0.5, "repa_block": 0, "repa_projector": "conv", "repa_teacher": str(folders["teacher"]),
        "repa_check_steps": 1, "repa_check_window": 1, "max_train_steps": 12, "checkpointing_steps": 1,
        "learning_rate": 1e-2, "repa_cache_dir": str(tmp_path_factory.mktemp("cache")),
    }  # fmt: skip
    return train_and_watch(runs.settings(tmp_path_factory.mktemp("measured"), folders["text_encoder"], **values))


def test_alignment_ends_if_its_gradient_opposes(measured):
    run, steps = measured
    history = run.state.alignment_history
    ended = run.burn_in.ended_at
    assert ended is not None
    assert 1 < ended < 12
    assert [entry["step"] for entry in history] == list(range(ended))
    assert [entry["cosine"] < 0 for entry in history] == [False] * (ended - 1) + [True]
    assert steps == {"teacher": list(range(ended)), "projector": list(range(ended))}
    assert list(logged(run, "loss/alignment")) == list(range(1, ended + 1))
    cached = list(Path(run.cfg.repa_cache_dir).rglob("*.safetensors"))
    assert len(cached) == 4 * ended  # one file for each sample that was aligned


@pytest.mark.parametrize("place", [-1, 0, 1])
def test_resuming_across_the_automatic_end_is_bitwise(measured, tmp_path, place):
    run, steps = measured
    step = run.burn_in.ended_at + place
    runs.copy_checkpoint(run, step, tmp_path)
    changes = {"output_dir": str(tmp_path), "resume_from_checkpoint": "latest", "repa_cache_dir": None}
    if place == -1:  # computed features are the cached ones but for bfloat16
        del changes["repa_cache_dir"]
    resumed, seen = train_and_watch(run.cfg.to_dict() | changes)
    assert seen["projector"] == [s for s in steps["projector"] if s >= step]
    assert seen["teacher"] == []  # over, or in the cache
    runs.assert_same(*(runs.saved_state(r.output_dir / "checkpoint-12") for r in (resumed, run)))


# Saved files

EXPORTED = ("transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")


@pytest.mark.parametrize(("resolution", "is_warned"), [(64, True), (192, False)])
def test_routing_few_tokens_prints_a_warning(resolution, is_warned, folders, tmp_path, capsys):
    """64 pixels are 64 tokens, 192 pixels are 576."""
    changes = {"route_ratio": 0.5, "route_range": [0, 1], "max_train_steps": 1, "train_batch_size": 1}
    runs.train(runs.settings(tmp_path / "run", folders["text_encoder"], **changes, resolution=resolution))
    assert ("`route_ratio` is 0.5 with 64 image tokens" in capsys.readouterr().out) == is_warned


def test_average_includes_fusion_and_mask_token(whole):
    run, _ = whole
    weights = [runs.saved_weights(run.output_dir / f"checkpoint-{step}", "transformer") for step in range(1, 7)]
    saved = load_file(run.output_dir / "transformer" / "diffusion_pytorch_model.safetensors")
    for key in ("fusion.mask_token", "fusion.linear.weight", "resolution_token_embedder.width.in_layer.weight"):
        average = weights[0][key].double()
        for update, later in enumerate(weights[1:], start=1):
            decay = min(0.3, (1 + update) / (10 + update))
            average = decay * average + (1 - decay) * later[key]
        torch.testing.assert_close(saved[key], average.float(), rtol=1e-5, atol=1e-7)
        assert not torch.allclose(saved[key], weights[-1][key], rtol=1e-4), key


def test_projector_is_saved_only_in_checkpoints(whole):
    run, _ = whole
    projector = run.nets.projector.state_dict()
    assert runs.saved_weights(run.output_dir / "checkpoint-6", "projector").keys() == projector.keys()
    of_pipeline = [*run.nets.transformer.parameters(), *run.nets.text_encoder.parameters()]
    averages = run.averages.models.values()
    assert sum(len(average.shadow_params) for average in averages) == len(of_pipeline)
    exported = [load_file(run.output_dir / part) for part in EXPORTED]
    assert sorted(map(len, exported)) == sorted(len(average.shadow_params) for average in averages)
    assert "fusion.mask_token" in exported[0]
    assert not projector.keys() & {name for weights in exported for name in weights}
    assert sorted(run.output_dir.rglob("[!c]*/*.safetensors")) == sorted(run.output_dir / part for part in EXPORTED)
    pipeline = PRXPixelPipeline.from_pretrained(run.output_dir)
    pipeline.set_progress_bar_config(disable=True)
    assert tuple(pipeline.transformer.config.fusion_range) == tuple(RANGE)
    assert sorted(pipeline.components) == ["scheduler", "text_encoder", "tokenizer", "transformer"]
    drawn = pipeline("a red circle", num_inference_steps=2, output_type="pt").images
    assert drawn.shape == (1, 3, 32, 32)
    assert drawn.isfinite().all()


def test_run_with_lpips(folders, tmp_path):
    """LPIPS is loaded from a file, logged, and not trained."""
    values = {
        "lpips_weight": 0.1, "lpips_backbone": str(runs.save_vgg16(tmp_path)), "max_train_steps": 1,
    }  # fmt: skip
    run = runs.start(runs.settings(tmp_path / "run", folders["text_encoder"], **values))
    before = {name: value.clone() for name, value in run.nets.lpips.state_dict().items()}
    train(run)
    assert 0 < logged(run, "loss/lpips")[1] < 10
    runs.assert_same(dict(run.nets.lpips.state_dict()), before)
    assert not any(p.requires_grad for p in run.nets.lpips.parameters())
