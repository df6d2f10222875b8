"""Everything that is trained is stored in float32; otherwise the run stops."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import runs
from diffusers_prx.training.precision import check_precision, resolve_precision
from diffusers_prx.training.run import Run
from diffusers_prx.training.trainer import train

BF16 = {
    "mixed_precision": "bf16",
    "max_train_steps": 2,
    "checkpointing_steps": 9,
    "use_ema": True,
    "ema_update_every": 1,
}


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory) -> Path:
    return runs.save_text_encoder(tmp_path_factory.mktemp("text_encoder"))


@pytest.fixture
def run(text_encoder, tmp_path) -> Run:
    """Run before its first step, with bf16 computation and float32 storage."""
    return runs.start(runs.settings(tmp_path, text_encoder, **BF16))


def test_values_are_counted_by_data_type():
    named = [
        ("a", torch.zeros(3)), ("b", torch.zeros(2, 2, dtype=torch.bfloat16)), ("steps", torch.zeros(9).long()),
        ("c", torch.zeros(5)),
    ]  # fmt: skip
    assert check_precision(named, torch.bfloat16) == {"float32": 8, "bfloat16": 4}
    assert check_precision(named[:1], torch.float32) == {"float32": 3}


@pytest.mark.parametrize(("capability", "mixed", "muon"), [("AVX512", "bf16", "bf16"), ("AVX2", "no", "fp32")])
def test_auto_is_the_type_that_the_cpu_computes_fast(monkeypatch, capability, mixed, muon):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)

    def resolved(**changes) -> tuple[str, str]:
        cfg = resolve_precision(runs.config(**{"mixed_precision": "auto"} | changes))
        return cfg.mixed_precision, cfg.muon_newton_schulz_dtype

    assert resolved() == (mixed, muon)
    assert resolved(mixed_precision="bf16", muon_newton_schulz_dtype="fp32") == ("bf16", "fp32")
    assert resolved(mixed_precision="no", muon_newton_schulz_dtype="bf16") == ("no", "bf16")
    assert resolved(weights_dtype="bf16") == ("bf16", muon)


def test_run_records_the_type_that_it_computes_in(text_encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    run = runs.start(runs.settings(tmp_path, text_encoder, mixed_precision="auto", optimizer="muon"))
    assert (run.cfg.mixed_precision, run.accelerator.mixed_precision) == ("no", "no")
    assert run.optimizer.optimizer.newton_schulz_dtype == torch.float32
    assert "`mixed_precision` is auto: float32" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_data_types_are_listed(dtype):
    named = [("a", torch.zeros(3)), ("b", torch.zeros(2, dtype=dtype)), ("c", torch.zeros(2, dtype=dtype))]
    with pytest.raises(ValueError, match=rf"torch.float32.*: b \({dtype}\), c \({dtype}\)"):
        check_precision(named, torch.float32)
    if dtype != torch.bfloat16:
        with pytest.raises(ValueError, match=rf"b \({dtype}\)"):
            check_precision(named, torch.bfloat16)


def test_mixed_precision_stores_float32(run, capsys):
    train(run)
    assert {p.dtype for module in run.modules.values() for p in module.parameters()} == {torch.float32}
    values = sum(p.numel() for p in run.parameters)
    steps = sum("step" in state for state in run.optimizer.state.values())
    assert "weights float32" in (run.output_dir / "README.md").read_text()
    # weights, their two moments and their average, and AdamW's own count of steps of each
    assert f"stored values by data type: {{'float32': {4 * values + steps}}}" in capsys.readouterr().out


def test_bf16_weight_stops_the_run(run):
    run.nets.transformer.txt_in.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"torch.float32.* transformer\.txt_in\.weight \(torch.bfloat16"):
        train(run)


def test_bf16_weight_stops_the_run_before_the_first_step(text_encoder, tmp_path):
    run = runs.start(runs.settings(tmp_path, text_encoder, **BF16))
    run.nets.text_encoder.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"text_encoder\.\S+ \(torch.bfloat16\)"):
        run.check_precision()  # what a run does when it is set up


class ShortMoments(torch.optim.AdamW):
    """Optimizer with moments in bf16."""

    def step(self, closure=None):
        super().step(closure)
        for state in self.state.values():
            state["exp_avg_sq"] = state["exp_avg_sq"].bfloat16()


def test_bf16_moment_stops_the_run(run):
    run.optimizer = run.accelerator.prepare(ShortMoments(run.parameters))
    with pytest.raises(ValueError, match=r"exp_avg_sq of transformer\.img_in\.0\.weight \(torch.bfloat16\)"):
        train(run)
    assert run.state.step == 0  # nothing was counted or saved


def test_bf16_average_stops_the_run(run):
    run.averages.models["text_encoder"].to(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"average of text_encoder\.\S+ \(torch.bfloat16\)") as error:
        train(run)
    assert "of transformer." not in str(error.value)


def test_weights_dtype_bf16_trains_with_a_warning(text_encoder, tmp_path, capsys):
    run = runs.train(runs.settings(tmp_path, text_encoder, **BF16, weights_dtype="bf16"))
    assert {p.dtype for p in run.nets.transformer.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in run.nets.text_encoder.parameters()} == {torch.float32}
    printed = capsys.readouterr().out
    assert "`weights_dtype` is bf16" in printed
    assert "'bfloat16': " in printed
    saved = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert "weights bf16" in (tmp_path / "README.md").read_text()


def test_float32_run_prints_no_warning(text_encoder, tmp_path, capsys):
    runs.start(runs.settings(tmp_path, text_encoder, **BF16))
    assert "weights_dtype" not in capsys.readouterr().out
