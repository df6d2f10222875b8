"""Who optimizes what, and the learning rate at every step."""

import math

import pytest
import torch

import runs
from diffusers_prx.schedulers import PRXXPredictionScheduler
from diffusers_prx.training.optimization import build_lr_scheduler, build_optimizers


@pytest.fixture(scope="module")
def nets():
    return runs.nets(PRXXPredictionScheduler())


def names_of(optimizer, modules):
    names = {id(p): f"{m}.{name}" for m, module in modules.items() for name, p in module.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("text_encoder", [True, False])
def test_every_trainable_parameter_is_in_exactly_one_group(nets, optimizer, text_encoder):
    cfg = runs.config(optimizer=optimizer, train_text_encoder=text_encoder)
    modules = nets.trainable(cfg)
    assert list(modules) == ["transformer", "text_encoder"][: 1 + text_encoder]
    optimizers = build_optimizers(cfg, list(modules.values()))
    found = [name for o in optimizers for name in names_of(o, modules)]
    wanted = [f"{m}.{name}" for m, module in modules.items() for name, _ in module.named_parameters()]
    assert sorted(found) == sorted(wanted)
    assert [type(o) for o in optimizers] == [torch.optim.Muon, torch.optim.AdamW][optimizer == "adamw" :]


def test_muon_gets_exactly_the_matrices_of_the_repeated_layers(nets):
    cfg = runs.config(optimizer="muon")
    modules = nets.trainable(cfg)
    muon, adamw = (names_of(o, modules) for o in build_optimizers(cfg, list(modules.values())))
    of_block = ["attention.img_qkv_proj", "attention.txt_kv_proj", "attention.to_out.0", "gate_proj", "up_proj"]
    of_block += ["down_proj", "modulation.lin"]
    of_layer = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    wanted = [f"transformer.blocks.{i}.{name}.weight" for i in range(2) for name in of_block]
    wanted += [f"text_encoder.encoder.layers.0.{name}.weight" for name in of_layer]
    assert sorted(muon) == sorted(wanted)
    assert "text_encoder.encoder.embed_tokens.weight" in adamw
    assert "transformer.final_layer.linear.weight" in adamw
    assert "transformer.txt_in.weight" in adamw


def test_frozen_parameters_are_left_out(nets):
    cfg = runs.config(optimizer="muon", train_text_encoder=False)
    frozen = nets.transformer.blocks[0].up_proj.weight.requires_grad_(False)
    try:
        groups = [g for o in build_optimizers(cfg, [nets.transformer]) for g in o.param_groups]
        assert all(p is not frozen for g in groups for p in g["params"])
    finally:
        frozen.requires_grad_(True)


def test_the_settings_reach_the_optimizers(nets):
    cfg = runs.config(
        optimizer="muon", learning_rate=0.5, adam_beta1=0.1, adam_beta2=0.2, adam_epsilon=0.3, adam_weight_decay=0.4,
        muon_momentum=0.6,
    )  # fmt: skip
    muon, adamw = (o.param_groups[0] for o in build_optimizers(cfg, [nets.transformer]))
    assert (muon["lr"], muon["momentum"], muon["weight_decay"], muon["nesterov"]) == (0.5, 0.6, 0.0, True)
    assert (adamw["lr"], adamw["betas"], adamw["eps"], adamw["weight_decay"]) == (0.5, (0.1, 0.2), 0.3, 0.4)


def rates(**changes) -> list[float]:
    cfg = runs.config(learning_rate=2.0, max_train_steps=20, **changes)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.learning_rate)
    scheduler = build_lr_scheduler(cfg, optimizer)
    found = []
    for _ in range(20):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 1, 5, 20])
def test_warm_up_then_constant(warmup):
    assert rates(lr_warmup_steps=warmup) == [2.0 * min(1, s / warmup if warmup else 1) for s in range(20)]


@pytest.mark.parametrize(("warmup", "decay"), [(4, 6), (0, 20), (4, None), (0, None), (10, 10), (0, 1)])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_warm_up_constant_and_decay_to_zero(kind, warmup, decay):
    length = decay or 20 - warmup
    wanted = []
    for step in range(20):
        done = max(0, step - (20 - length)) / length  # share of the decay before this step
        factor = 1 - done if kind == "linear" else (1 + math.cos(math.pi * done)) / 2
        wanted.append(2.0 * factor * (step / warmup if step < warmup else 1))
    assert rates(lr_scheduler=kind, lr_warmup_steps=warmup, lr_decay_steps=decay) == pytest.approx(wanted, abs=1e-12)
