"""The training step against the formulas: one sample at a time, without padding, in float64."""

import ast
import dataclasses
import inspect
import textwrap

import pytest
import torch
from torch import nn

import runs
import tiny
from diffusers_prx.prompt_cleaning import CAPTION_CLEANINGS
from diffusers_prx.schedulers import PRXFlowMatchScheduler, PRXXPredictionScheduler
from diffusers_prx.text import encode_text, tokenize_prompts, trim_tokens
from diffusers_prx.training.rng import StepRandom
from diffusers_prx.training.step import train_step

SCHEDULERS = {"velocity": PRXFlowMatchScheduler, "x_prediction": PRXXPredictionScheduler}


def make(prediction="velocity", vae=None, **changes):
    cfg = runs.config(prediction_type=prediction, caption_dropout=0.0, **changes)
    return runs.nets(SCHEDULERS[prediction](shift=cfg.shift), vae), cfg


def rng(step=3, index=(10, 11, 12, 13)):
    return StepRandom(42, step, list(index))


def reference(batch, nets, cfg, step, timestep=None) -> list[float]:
    """Compute the loss of each sample from the formulas x_t = (1 - t) x_0 + t n and v = n - x_0."""
    losses = []
    for pixels, caption, index in zip(batch["pixels_uint8"], batch["captions"], batch["sample_index"]):
        draw = StepRandom(cfg.seed, step, [index])
        x_0 = pixels.double()[None] / 255 * 2 - 1
        if nets.vae is not None:
            gaussian = nets.vae.encode(x_0.float()).latent_dist
            z = gaussian.mean.double() + gaussian.std.double() * draw.normal("latents", gaussian.mean.shape[1:])
            x_0 = (z - nets.vae.config.shift_factor) * nets.vae.config.scaling_factor
        noise = draw.normal("noise", x_0.shape[1:]).double() * cfg.noise_scale
        if timestep is None:
            t = nets.scheduler.timesteps_from_uniforms(draw.uniform("timestep", (3,))).double()
        else:
            t = torch.full((1,), timestep).double()
        x_t = (1 - t) * x_0 + t * noise
        drop = draw.uniform("caption_dropout").item() < cfg.caption_dropout
        ids = nets.tokenizer("" if drop else caption, return_tensors="pt")["input_ids"][:, : cfg.max_sequence_length]
        text = nets.text_encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        output = nets.transformer(x_t.float(), t.float(), text, None, return_dict=False)[0].double()
        error = output - (noise - x_0)
        if cfg.prediction_type == "x_prediction":
            # both velocities are divided by max(t, 0.05); what is left is the error of the image
            error = (output - x_0) / max(t.item(), 0.05)
        losses.append((error**2).mean().item())
    return losses


@pytest.mark.parametrize("prediction", ["velocity", "x_prediction"])
@pytest.mark.parametrize("space", ["pixels", "latents"])
@pytest.mark.parametrize("changes", [{}, {"noise_scale": 2.0, "shift": 3.0}, {"caption_dropout": 0.5}], ids=str)
def test_loss_equals_the_formulas(prediction, space, changes):
    nets, cfg = make(prediction, tiny.vae_kl() if space == "latents" else None)
    cfg = dataclasses.replace(cfg, **changes)
    batch = runs.batch()
    with torch.no_grad():
        output = train_step(batch, nets, cfg, rng())
        wanted = torch.tensor(reference(batch, nets, cfg, step=3))
    torch.testing.assert_close(output.loss_per_sample, wanted, rtol=2e-5, atol=0)
    torch.testing.assert_close(output.loss, wanted.mean(), rtol=2e-5, atol=0)
    assert wanted.std() > 0.01 * wanted.mean()  # the samples do differ


def test_deterministic_vae_draws_no_noise():
    nets, cfg = make("velocity", tiny.vae_dc())
    batch = runs.batch()
    losses = []
    with torch.no_grad():
        clean = nets.vae.encode(batch["pixels_uint8"].float() / 127.5 - 1).latent * nets.vae.config.scaling_factor
        noise = rng().normal("noise", clean.shape[1:])
        output = train_step(batch, nets, cfg, rng(), torch.ones(4))  # at t = 1 the network sees the noise alone
        ids, mask = tokenize_prompts(nets.tokenizer, batch["captions"], cfg.max_sequence_length, nets.clean_caption)
        text = encode_text(nets.text_encoder, ids, mask)
        losses = (nets.transformer(noise, torch.ones(4), text, mask)[0] - (noise - clean)).square().mean((1, 2, 3))
    torch.testing.assert_close(output.loss_per_sample, losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize("t", [0.001, 0.02, 0.05, 0.5])
def test_x_prediction_is_clamped(t):
    nets, cfg = make("x_prediction")
    batch = runs.batch()
    with torch.no_grad():
        output = train_step(batch, nets, cfg, rng(), torch.full((4,), t))
        wanted = torch.tensor(reference(batch, nets, cfg, 3, t))
    torch.testing.assert_close(output.loss_per_sample, wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("share", "dropped"), [(0.0, 0), (1.0, 4)])
def test_dropped_captions_are_encoded_as_empty(share, dropped):
    nets, cfg = make()
    cfg = dataclasses.replace(cfg, caption_dropout=share)
    batch = runs.batch()
    empty = {**batch, "captions": [""] * 4}
    plain = dataclasses.replace(cfg, caption_dropout=0.0)
    loss, as_empty, as_given = (
        train_step(b, nets, c, rng()).loss for b, c in ((batch, cfg), (empty, plain), (batch, plain))
    )
    assert not torch.equal(as_empty, as_given)
    assert torch.equal(loss, as_empty if dropped else as_given)


class Oracle(nn.Module):
    """Transformer that predicts exactly, because it knows the clean images."""

    def __init__(self, clean: torch.Tensor, prediction: str):
        super().__init__()
        self.clean, self.prediction = clean, prediction

    def forward(self, noisy, timestep, text, mask, return_dict, route, feature_block):
        velocity = (noisy - self.clean) / timestep[:, None, None, None]
        return (self.clean if self.prediction == "x_prediction" else velocity,)


@pytest.mark.parametrize("prediction", ["velocity", "x_prediction"])
@pytest.mark.parametrize("noise_scale", [1.0, 2.0])
def test_perfect_predictor_has_no_loss(prediction, noise_scale):
    nets, cfg = make(prediction, noise_scale=noise_scale)
    batch = runs.batch()
    clean = batch["pixels_uint8"].float() / 127.5 - 1
    perfect = dataclasses.replace(nets, transformer=Oracle(clean, prediction))
    wrong = dataclasses.replace(nets, transformer=Oracle(clean + 0.01, prediction))
    assert train_step(batch, perfect, cfg, rng()).loss < 1e-10
    assert train_step(batch, wrong, cfg, rng()).loss > 1e-5


@pytest.mark.parametrize("parts", [[[3, 1, 0, 2]], [[0, 1], [2, 3]], [[2], [0, 3], [1]]], ids=str)
def test_order_and_split_of_the_batch_do_not_change_losses(parts):
    nets, cfg = make("x_prediction")
    cfg = dataclasses.replace(cfg, caption_dropout=0.5)
    batch = runs.batch()
    with torch.no_grad():
        whole = train_step(batch, nets, cfg, rng()).loss_per_sample
        for part in parts:
            piece = {
                "pixels_uint8": batch["pixels_uint8"][part],
                "captions": [batch["captions"][i] for i in part],
            }
            index = [batch["sample_index"][i] for i in part]
            losses = train_step(piece, nets, cfg, rng(index=index)).loss_per_sample
            torch.testing.assert_close(losses, whole[part], rtol=1e-5, atol=0)


def gradients(nets, cfg, step=3):
    output = train_step(runs.batch(), nets, cfg, rng(step))
    for module in (nets.transformer, nets.text_encoder):
        module.zero_grad()
    output.loss.backward()
    parameters = [*nets.transformer.parameters(), *nets.text_encoder.parameters()]
    return output.loss.detach(), [p.grad.clone() if p.grad is not None else None for p in parameters]


def test_repeated_step_is_bitwise_equal():
    nets, cfg = make("x_prediction")
    (loss, grads), (_, others), (again, same) = (gradients(nets, cfg, step) for step in (3, 4, 3))
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, same))
    assert not all(torch.equal(a, b) for a, b in zip(grads, others))


@pytest.mark.parametrize("trained", [True, False])
def test_text_encoder_gets_gradients_only_if_trained(trained):
    nets, cfg = make(vae=tiny.vae_kl())
    cfg = dataclasses.replace(cfg, train_text_encoder=trained)
    train_step(runs.batch(), nets, cfg, rng()).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in nets.transformer.parameters())
    reached = [name for name, p in nets.text_encoder.named_parameters() if p.grad is not None]
    assert reached == ([name for name, _ in nets.text_encoder.named_parameters()] if trained else [])
    assert all(p.grad is None for p in nets.vae.parameters())


def test_no_graph_without_gradients():
    nets, cfg = make()
    assert train_step(runs.batch(), nets, cfg, rng()).loss.requires_grad
    with torch.no_grad():
        output = train_step(runs.batch(), nets, cfg, rng())
    assert not any(v.requires_grad for v in (output.loss, output.loss_per_sample, *output.losses.values()))
    assert not train_step(runs.batch(), nets, cfg, rng()).loss_per_sample.requires_grad


def test_gradient_checkpointing_does_not_change_gradients():
    nets, cfg = make("x_prediction")
    nets.transformer.train()
    loss, plain = gradients(nets, cfg)
    nets.transformer.enable_gradient_checkpointing()
    again, recomputed = gradients(nets, cfg)
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed))


def test_truncated_captions_are_counted():
    nets, cfg = make()
    lengths = [len(nets.tokenizer(caption)["input_ids"]) for caption in runs.batch()["captions"]]
    assert len(set(lengths)) == 4
    for limit in (min(lengths) - 1, *lengths):
        short = dataclasses.replace(cfg, max_sequence_length=limit)
        assert train_step(runs.batch(), nets, short, rng()).truncated == sum(n > limit for n in lengths)


def test_loss_under_autocast_is_float32():
    nets, cfg = make("x_prediction")
    with torch.no_grad():
        exact = train_step(runs.batch(), nets, cfg, rng()).loss
        with torch.autocast("cpu", torch.bfloat16):
            output = train_step(runs.batch(), nets, cfg, rng())
    assert output.loss.dtype == torch.float32
    assert 0 < abs(output.loss / exact - 1) < 0.02


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("encoder", [tiny.text_encoder, tiny.qwen_text_tower])
def test_padding_does_not_change_the_text(encoder, side):
    prompts = ["a red cat", "", "the green dog on a tram"]
    tokens, mask = tokenize_prompts(tiny.tokenizer(side, max_length=24), prompts, 24, str.strip)
    ids, trimmed = trim_tokens(tokens, mask)
    assert ids.shape == trimmed.shape == (3, 7)
    with torch.no_grad():
        whole, short = (encode_text(encoder(), i, m) for i, m in ((tokens, mask), (ids, trimmed)))
    torch.testing.assert_close(short[trimmed], whole[mask], rtol=1e-5, atol=1e-5)


def test_captions_equal_after_cleaning_are_not_negatives():
    nets, cfg = make(contrastive_weight=0.05)
    nets = dataclasses.replace(nets, caption_cleaning="light")
    written = ["Cats &amp; dogs", "Cats & dogs ", "Cats &amp;amp; dogs", "Cats & dogs"]
    output = train_step(runs.batch() | {"captions": written}, nets, cfg, rng())
    assert output.losses["contrastive"] == 0
    output = train_step(runs.batch() | {"captions": [*written[:3], "a bird"]}, nets, cfg, rng())
    assert output.losses["contrastive"] > 0


def test_train_step_fits_on_one_screen():
    function = ast.parse(textwrap.dedent(inspect.getsource(train_step))).body[0]
    assert isinstance(function, ast.FunctionDef)
    lines = ast.unparse(ast.Module(function.body[1:], [])).splitlines()  # without docstring, comments, blank lines
    source = inspect.getsource(train_step).splitlines()
    code = [
        line for line in source[function.body[1].lineno - 1 :] if line.strip() and not line.strip().startswith("#")
    ]
    assert max(len(lines), len(code)) <= 60


@pytest.mark.parametrize("cleaning", CAPTION_CLEANINGS)
def test_nets_and_pipeline_clean_captions_alike(cleaning):
    for vae in (None, tiny.vae_kl()):
        nets, cfg = make(vae=vae)
        nets = dataclasses.replace(nets, caption_cleaning=cleaning)
        assert nets.pipeline(cfg).caption_cleaning == cleaning
        cleaned = nets.clean_caption("A Red <b>Circle</b>  ")
        assert cleaned == ("A Red <b>Circle</b>" if cleaning == "light" else "a red <b>circle< b>")
