"""Distillation: the losses against drawings of the pipeline, exact resume with stages, and an adapter as student."""

import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from accelerate import debug_launcher
from peft import LoraConfig

import runs
import tiny
from diffusers_prx import PRXPixelPipeline, apply_preset
from diffusers_prx.config.training_config import TrainingConfig
from diffusers_prx.schedulers import PRXFlowMatchScheduler, PRXXPredictionScheduler
from diffusers_prx.techniques.discriminator import Discriminator, default_blocks
from diffusers_prx.training.distill_step import distill_step, few_step_levels
from diffusers_prx.training.networks import Nets, add_reference
from diffusers_prx.training.rng import StepRandom

SCHEDULERS = {"velocity": PRXFlowMatchScheduler, "x_prediction": PRXXPredictionScheduler}
SCALE = 2.5


def make(objective: str, prediction: str = "x_prediction", **changes) -> tuple[Nets, TrainingConfig]:
    """Return networks whose student and teacher differ, and a configuration."""
    cfg = runs.config(
        prediction_type=prediction, pretrained_model_name_or_path="unused", transformer_config={},
        train_text_encoder=False, objective=objective, **changes,
    )  # fmt: skip
    nets = runs.nets(SCHEDULERS[prediction](shift=3.0))
    runs.add_other_reference(nets)
    return nets, cfg


def rng() -> StepRandom:
    return StepRandom(42, 3, [10, 11, 12, 13])


def draw(nets: Nets, cfg: TrainingConfig, transformer, caption: str, start, levels: list[float], stop: int, scale):
    """Draw with the pipeline from `start` along `levels`, and return the latents after `stop` steps."""
    if stop == 0:
        return start
    pipe = dataclasses.replace(nets, transformer=transformer).pipeline(cfg)
    pipe.set_progress_bar_config(disable=True)
    found = []

    def keep(pipe, step, timestep, tensors):
        found.append(tensors["latents"].clone())
        return {}

    pipe(
        caption, latents=start, sigmas=levels, guidance_scale=scale, height=16, width=16, output_type="latent",
        callback_on_step_end=keep,
    )  # fmt: skip
    return found[stop - 1]


@pytest.mark.parametrize("prediction", ["velocity", "x_prediction"])
def test_mean_velocity_is_that_of_the_guided_pipeline(prediction):
    """Student and teacher draw with the pipeline: the student to its level, the teacher from there to the next one."""
    nets, cfg = make(
        "mean_velocity", prediction, distill_guidance_scale=SCALE, distill_steps=3, distill_teacher_steps=6
    )
    batch, draws = runs.batch(), rng()
    output = distill_step(batch, nets, cfg, draws)
    coarse, fine = (few_step_levels(nets.scheduler, steps)[:-1].tolist() for steps in (3, 6))
    noise, places = draws.normal("noise", (3, 16, 16)), (draws.uniform("level") * 3).long().tolist()
    assert len(set(places)) > 1
    wanted = []
    for row, (caption, level) in enumerate(zip(batch["captions"], places)):
        start = draw(nets, cfg, nets.transformer, caption, noise[row : row + 1], coarse, level, 1.0)
        end = draw(nets, cfg, nets.reference, caption, start, fine[2 * level :], 2, SCALE)
        image = draw(nets, cfg, nets.transformer, caption, start, coarse[level : level + 1], 1, 1.0)  # to level 0
        t, s = coarse[level], [*coarse, 0.0][level + 1]
        wanted.append((((start - image) / t - (start - end) / (t - s)) ** 2).mean().item())
    assert output.loss_per_sample.tolist() == pytest.approx(wanted, rel=1e-4)
    assert output.loss.item() == pytest.approx(sum(wanted) / 4, rel=1e-4)


@pytest.mark.parametrize("prediction", ["velocity", "x_prediction"])
def test_guidance_distillation_predicts_the_guided_teacher(prediction):
    nets, cfg = make("guidance_distillation", prediction, distill_guidance_scale=SCALE)
    batch, draws = runs.batch(), rng()
    output = distill_step(batch, nets, cfg, draws)
    noise = draws.normal("noise", (3, 16, 16))
    wanted = []
    for row, caption in enumerate(batch["captions"]):
        t = nets.scheduler.timesteps_from_uniforms(draws.uniform("timestep", (3,))[row : row + 1])
        clean = batch["pixels_uint8"][row : row + 1].float() / 127.5 - 1
        noisy = (1 - t) * clean + t * noise[row : row + 1]
        guided = draw(nets, cfg, nets.reference, caption, noisy, [t.item()], 1, SCALE)
        own = draw(nets, cfg, nets.transformer, caption, noisy, [t.item()], 1, 1.0)
        divisor = max(t.item(), 0.05) if prediction == "x_prediction" else t.item()
        wanted.append((((guided - own) / divisor) ** 2).mean().item())
    assert output.loss_per_sample.tolist() == pytest.approx(wanted, rel=1e-4)


def test_student_with_a_guidance_input_predicts_the_teacher_of_each_scale():
    nets, cfg = make("guidance_distillation", "velocity", distill_guidance_max=6.0)
    nets.transformer.add_guidance_embedder()
    torch.nn.init.normal_(nets.transformer.guidance_embedder.out_layer.weight, std=0.5)
    batch, draws = runs.batch(), rng()
    output = distill_step(batch, nets, cfg, draws)
    noise, scales = draws.normal("noise", (3, 16, 16)), (1 + 5 * draws.uniform("guidance")).tolist()
    assert max(scales) - min(scales) > 0.4
    wanted = []
    for row, caption in enumerate(batch["captions"]):
        t = nets.scheduler.timesteps_from_uniforms(draws.uniform("timestep", (3,))[row : row + 1])
        noisy = (1 - t) * (batch["pixels_uint8"][row : row + 1].float() / 127.5 - 1) + t * noise[row : row + 1]
        guided = draw(nets, cfg, nets.reference, caption, noisy, [t.item()], 1, scales[row])
        own = draw(nets, cfg, nets.transformer, caption, noisy, [t.item()], 1, scales[row])
        wanted.append((((guided - own) / t) ** 2).mean().item())
    assert output.loss_per_sample.tolist() == pytest.approx(wanted, rel=1e-4)


def test_ladd_losses_and_their_gradients():
    """The hinge losses by their formulas; each changes its own network alone, and the teacher none."""
    nets, cfg = make("ladd", distill_steps=2, ladd_noise_mean=0.5)
    torch.manual_seed(0)
    nets.discriminator = Discriminator(default_blocks(2), 32, 16)
    batch, draws = runs.batch(), rng()
    output = distill_step(batch, nets, cfg, draws)
    generator_loss, discriminator_loss = output.losses["generator"], output.losses["discriminator"]

    clean = batch["pixels_uint8"].float() / 127.5 - 1
    levels = few_step_levels(nets.scheduler, 2)
    t = levels[(draws.uniform("level") * 2).long()]
    judged = torch.sigmoid(0.5 + draws.normal("judged_timestep"))
    logits = {}
    for row, caption in enumerate(batch["captions"]):
        ids = nets.tokenizer(caption, return_tensors="pt")["input_ids"]
        text = nets.text_encoder(input_ids=ids).last_hidden_state  # (1, L, E), without padding
        noisy = (1 - t[row]) * clean[row] + t[row] * draws.normal("noise", (3, 16, 16))[row]
        drawn = nets.transformer(noisy[None], t[row : row + 1], text, return_dict=False)[0]
        for name, image in (("fake", drawn), ("real", clean[row : row + 1])):
            mixed = (1 - judged[row]) * image + judged[row] * draws.normal("judged_noise", (3, 16, 16))[row]
            features = [
                nets.reference(mixed, judged[row : row + 1], text, return_dict=False, feature_block=block)[1]
                for block in nets.discriminator.blocks
            ]
            condition = torch.cat((F.layer_norm(text.mean(1), (16,)), judged[row : row + 1, None]), dim=1)
            parts = [head(feature, condition) for head, feature in zip(nets.discriminator.heads, features)]
            logits.setdefault(name, []).append(torch.cat(parts, dim=1))
    fake, real = (torch.cat(logits[name]) for name in ("fake", "real"))
    assert generator_loss.item() == pytest.approx(-fake.mean().item(), rel=1e-4)
    hinge = (1 + fake).clamp(min=0).mean() + (1 - real).clamp(min=0).mean()
    assert discriminator_loss.item() == pytest.approx(hinge.item(), rel=1e-4)
    assert output.loss.item() == pytest.approx(generator_loss.item() + discriminator_loss.item())

    networks = {"student": nets.transformer, "discriminator": nets.discriminator}
    sizes = {}
    for name, loss in (("student", generator_loss), ("discriminator", discriminator_loss)):
        for network, module in networks.items():
            grads = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
            sizes[name, network] = sum(grad.abs().sum().item() for grad in grads if grad is not None)
    assert sizes["student", "discriminator"] == sizes["discriminator", "student"] == 0
    assert min(sizes["student", "student"], sizes["discriminator", "discriminator"]) > 0
    assert all(weight.grad is None for weight in nets.reference.parameters())


@pytest.mark.parametrize("objective", ["guidance_distillation", "mean_velocity", "ladd"])
def test_adapter_and_its_base_are_student_and_teacher(objective):
    """One transformer with an adapter gives the losses and gradients of a student and a copy as its teacher."""
    nets, cfg = make(objective)
    torch.manual_seed(0)
    nets.discriminator = Discriminator([1], 32, 16) if objective == "ladd" else None
    nets.transformer = copy.deepcopy(nets.reference)
    nets.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_out.0", "up_proj"]), "default")
    tiny.randomize(nets.transformer)
    teacher = copy.deepcopy(nets.transformer)
    teacher.disable_adapters()
    found = []
    for reference in (teacher, None):
        nets.reference = reference
        nets.transformer.zero_grad()
        output = distill_step(runs.batch(), nets, cfg, rng())
        output.loss.backward()
        weights = {name: w.grad for name, w in nets.transformer.named_parameters() if w.requires_grad}
        assert {"lora" in name for name in weights} == {True}
        found.append((output.loss.item(), weights))
    assert found[0][0] == found[1][0]
    for name, gradient in found[0][1].items():
        assert gradient.abs().sum() > 0
        assert torch.equal(gradient, found[1][1][name]), name


def test_teacher_is_copied_only_where_it_is_needed():
    nets, cfg = make("ladd", text_encoder_name_or_path=None)
    nets.reference = None
    add_reference(nets, dataclasses.replace(cfg, objective="flow"))
    assert nets.reference is None
    add_reference(nets, dataclasses.replace(cfg, lora_rank=2))
    assert nets.reference is None
    add_reference(nets, cfg)
    assert not any(weight.requires_grad for weight in nets.reference.parameters())


STAGES = [
    {"max_train_steps": 2},
    {"objective": "guidance_distillation", "max_train_steps": 2},
    {"objective": "mean_velocity", "distill_steps": 2, "distill_teacher_steps": 4, "max_train_steps": 2},
    {"objective": "ladd", "distill_steps": 2, "max_train_steps": 2},
]
RUN = {
    "stages": STAGES, "train_text_encoder": False, "checkpointing_steps": 1, "lr_warmup_steps": 0, "use_ema": True,
    "ema_update_every": 1, "ema_decay": 0.3, "learning_rate": 1e-2, "adam_epsilon": 1e-4, "max_grad_norm": 10.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Fine-tuning, then each kind of distillation, as stages of one run."""
    text_encoder = runs.save_text_encoder(tmp_path_factory.mktemp("text_encoder"))
    return runs.train(runs.settings(tmp_path_factory.mktemp("whole"), text_encoder, **RUN))


@pytest.mark.parametrize("step", [3, 4, 5, 7])
def test_stages_resume_bitwise(whole, tmp_path, step):
    """Also in the middle of a stage, whose teacher are the averaged weights at its beginning."""
    runs.copy_checkpoint(whole, step, tmp_path)
    values = whole.cfg.to_dict() | {"output_dir": str(tmp_path), "resume_from_checkpoint": "latest"}
    resumed = runs.train(values)
    runs.assert_same(*(runs.saved_state(run.output_dir / "checkpoint-8") for run in (resumed, whole)))


def test_teacher_of_a_stage_is_the_average_at_its_beginning(whole):
    state = runs.saved_state(whole.output_dir / "checkpoint-6")
    averages = runs.saved_weights(whole.output_dir / "checkpoint-4", "transformer", "average")
    for name, average in averages.items():
        assert torch.equal(state[f"reference.{name}"], average)
    assert not any(name.startswith("reference.") for name in runs.saved_state(whole.output_dir / "checkpoint-2"))


def test_result_is_an_ordinary_pipeline(whole):
    history = whole.state.history
    names = [{name.removeprefix("loss/") for name in entry if name.startswith("loss/")} for entry in history]
    assert names[1::2] == [{"flow"}, {"guidance_distillation"}, {"mean_velocity"}, {"generator", "discriminator"}]
    pipe = PRXPixelPipeline.from_pretrained(whole.output_dir)
    assert set(pipe.transformer.state_dict()) == set(whole.nets.transformer.state_dict())
    pipe, fast = apply_preset(pipe, "fast")
    assert fast == {"num_inference_steps": 2, "guidance_scale": 1.0}
    image = pipe(runs.CAPTIONS[0], output_type="pt", **fast).images
    assert image.isfinite().all()


@pytest.mark.slow
def test_compiled_adapter_learns_what_the_plain_one_does(whole, tmp_path):
    """With more variants of a block (adapter, gradients, mask, lengths) than dynamo allows by default."""
    values = {
        "pretrained_model_name_or_path": str(whole.output_dir), "transformer_config": {}, "train_text_encoder": False,
        "objective": "mean_velocity", "distill_teacher_steps": 8, "lora_rank": 2, "max_train_steps": 6,
        "lr_warmup_steps": 0, "adam_epsilon": 1e-4,
    }  # fmt: skip
    plain, compiled = (
        runs.train(runs.settings(tmp_path / str(compile), **values, compile=compile)) for compile in (False, True)
    )
    for entry, wanted in zip(compiled.state.history, plain.state.history, strict=True):
        assert entry["loss/mean_velocity"] == pytest.approx(wanted["loss/mean_velocity"], rel=1e-3)


def test_result_with_a_guidance_input_draws_and_resumes(whole, tmp_path):
    values = {
        "pretrained_model_name_or_path": str(whole.output_dir), "transformer_config": {}, "train_text_encoder": False,
        "objective": "guidance_distillation", "distill_guidance_max": 5.0, "max_train_steps": 4, "adam_epsilon": 1e-4,
        "prediction_type": whole.cfg.prediction_type, "learning_rate": 1e-2,
    }  # fmt: skip
    run = runs.train(runs.settings(tmp_path / "run", **values))
    runs.copy_checkpoint(run, 2, tmp_path / "resumed")
    resumed = runs.train(
        run.cfg.to_dict() | {"output_dir": str(tmp_path / "resumed"), "resume_from_checkpoint": "latest"}
    )
    runs.assert_same(*(runs.saved_state(each.output_dir / "checkpoint-4") for each in (resumed, run)))
    pipe = PRXPixelPipeline.from_pretrained(run.output_dir)
    low, high = (
        pipe(runs.CAPTIONS[0], num_inference_steps=1, guidance_scale=scale, output_type="pt",
             generator=torch.Generator().manual_seed(0)).images
        for scale in (1.0, 5.0)
    )  # fmt: skip
    assert (low - high).abs().max() > 1e-3
    with pytest.raises(ValueError, match="guidance_embeds"):
        runs.start(
            runs.settings(tmp_path / "again", **values | {"pretrained_model_name_or_path": str(run.output_dir)})
        )


def test_two_processes_equal_one(whole, tmp_path):
    values = whole.cfg.to_dict() | {"output_dir": str(tmp_path), "train_batch_size": 2}
    debug_launcher(runs.train_on_a_rank, (values,), num_processes=2)
    history = json.loads((tmp_path / "training.json").read_text())["history"]
    for entry, wanted in zip(history, whole.state.history, strict=True):
        for name in (name for name in wanted if name.startswith("loss/") or name == "grad_norm"):
            assert entry[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-6), (entry["step"], name)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"distill_teacher_steps": 27}, "distill_teacher_steps"),
        ({"distill_guidance_max": 4.0}, "distill_guidance_max"),
        ({"train_text_encoder": True}, "train_text_encoder"),
        ({"caption_dropout": 0.2}, "caption_dropout"),
        ({"route_ratio": 0.5}, "route_ratio"),
        ({"num_validation_samples": 2}, "num_validation_samples"),
        ({"ladd_noise_mean": 0.0}, "ladd_noise_mean"),
        ({"objective": "flow", "distill_steps": 2}, "distill_steps"),
        ({"objective": "ladd", "lora_rank": 2, "gradient_checkpointing": True}, "gradient_checkpointing"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, name):
    values = {
        "pretrained_model_name_or_path": "unused", "transformer_config": {}, "train_text_encoder": False,
        "objective": "mean_velocity", "text_encoder_name_or_path": None,
    }  # fmt: skip
    TrainingConfig(**runs.settings("unused", **values))
    with pytest.raises(ValueError, match=f"`{name}`"):
        TrainingConfig(**runs.settings("unused", **values | changes))


def test_new_transformer_is_no_teacher(tmp_path):
    text_encoder = runs.save_text_encoder(tmp_path / "text")
    values = runs.settings(tmp_path / "run", text_encoder, train_text_encoder=False, objective="mean_velocity")
    with pytest.raises(ValueError, match="`objective` is mean_velocity, which starts from a trained model"):
        runs.start(values)
