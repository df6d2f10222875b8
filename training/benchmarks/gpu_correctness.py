"""Correctness part of gpu_check.py: what the device computes against float64 on the CPU, with the same numbers."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from timing import randomize

from diffusers_prx import (
    PRXImg2ImgPipeline,
    PRXInpaintPipeline,
    PRXPipeline,
    PRXPixelImg2ImgPipeline,
    PRXPixelInpaintPipeline,
    PRXPixelPipeline,
)
from diffusers_prx.config.training_config import TrainingConfig
from diffusers_prx.models.token_routing import sample_route
from diffusers_prx.models.transformer_prx import PRXTransformer2DModel
from diffusers_prx.schedulers import PRXFlowMatchScheduler, PRXXPredictionScheduler
from diffusers_prx.techniques.losses import LPIPSLoss
from diffusers_prx.training.networks import Nets, new_projector
from diffusers_prx.training.preference_step import PreferenceInputs, preference_losses, twice
from diffusers_prx.training.step import StepInputs, compute_losses, weighted_sum

SMALL_MODEL = Path(__file__).resolve().parents[2] / "model_cards" / "prx-scenes-small"
BATCH, SIDE, TEXT_TOKENS, TEXT_WIDTH, TEACHER_WIDTH = 2, 32, 12, 64, 48
NETWORK = {
    "in_channels": 4, "patch_size": 4, "context_in_dim": TEXT_WIDTH, "hidden_size": 128, "num_heads": 4, "depth": 3,
    "axes_dim": [16, 16],
}  # fmt: skip
PIXELS = {"in_channels": 3, "bottleneck_size": 32}

# name -> settings of the training, arguments of the transformer
TECHNIQUES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "flow matching": ({}, {}),
    "x-prediction": ({"prediction_type": "x_prediction"}, PIXELS),
    "TREAD": ({"route_ratio": 0.5, "route_range": [1, 2]}, {}),
    "SPRINT": ({"route_ratio": 0.5, "route_range": [1, 2]}, {"fusion_range": [1, 2]}),
    "REPA": ({"repa_weight": 0.5, "repa_teacher": "drawn features", "repa_block": 1}, {}),
    "iREPA": (
        {"repa_weight": 0.5, "repa_teacher": "drawn features", "repa_block": 1, "repa_projector": "conv",
         "repa_spatial_gamma": 0.8},
        {},
    ),
    "contrastive": ({"contrastive_weight": 0.05}, {}),
    "LPIPS": ({"lpips_weight": 0.1, "prediction_type": "x_prediction"}, PIXELS),
    "DPO": ({"objective": "dpo", "rejected_image_column": "rejected", "dpo_beta": 10.0}, {}),
    "resolution": ({}, {"resolution_embeds": True, "resolution_tokens": True}),
}  # fmt: skip

Inputs = TypeVar("Inputs")


@dataclass(frozen=True)
class Comparison:
    """A comparison of numbers.

    Args:
        check: what was computed.
        dtype: data type on the device.
        error: norm of the difference over the norm of the reference.
        bound: largest accepted error.
    """

    check: str
    dtype: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # NaN is not


def error_bound(dtype: torch.dtype, depth: int, width: int) -> float:
    """Return the largest relative error that rounding explains.

    Every one of `depth` layers rounds its results to `dtype`, and sums `width` products in float32. Independent
    rounding errors grow with the square roots of both numbers; a layer has several roundings, hence the factor of 8.

    Example:
        >>> round(error_bound(torch.bfloat16, 4, 256), 3)
        0.063
    """
    return 8 * depth**0.5 * (torch.finfo(dtype).eps / 2 + width**0.5 * torch.finfo(torch.float32).eps / 2)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double().cpu()
    return ((found.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def move(inputs: Inputs, device: str, dtype: torch.dtype) -> Inputs:
    """Return a copy of a tensor, or of a data class of tensors, on a device; floating-point tensors get a type."""
    if isinstance(inputs, torch.Tensor):
        return inputs.to(device, dtype if inputs.is_floating_point() else inputs.dtype)
    if is_dataclass(inputs) and not isinstance(inputs, type):
        values = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
        return replace(inputs, **{name: move(value, device, dtype) for name, value in values.items()})
    return inputs


def step_of(name: str) -> tuple[TrainingConfig, Nets, StepInputs | PreferenceInputs]:
    """Return settings, random networks and random inputs of a technique, in float32 on the CPU."""
    settings, arguments = TECHNIQUES[name]
    names = {"dataset_name": "images", "text_encoder_name_or_path": "none", "transformer_config": NETWORK | arguments}
    cfg = TrainingConfig(**names | settings)
    torch.manual_seed(0)
    transformer = PRXTransformer2DModel(**NETWORK | arguments)
    randomize(transformer)
    scheduler = PRXXPredictionScheduler() if cfg.prediction_type == "x_prediction" else PRXFlowMatchScheduler()
    nets = Nets(transformer, None, None, None, scheduler, NETWORK["patch_size"])
    tokens = (SIDE // NETWORK["patch_size"]) ** 2
    clean = torch.rand(BATCH, transformer.config["in_channels"], SIDE, SIDE) * 2 - 1
    inputs = StepInputs(
        clean=clean,
        noise=torch.randn(clean.shape),
        timestep=torch.tensor([0.3, 0.8]),
        text=torch.randn(BATCH, TEXT_TOKENS, TEXT_WIDTH),
        text_mask=torch.arange(TEXT_TOKENS) < torch.tensor([[5], [TEXT_TOKENS]]),
        captions=["a cat", "a dog"],
        route=sample_route(torch.rand(BATCH, tokens), cfg.route_ratio, *cfg.route_range) if cfg.route_ratio else None,
        pixels_pm1=clean,
        teacher_features=torch.randn(BATCH, tokens, TEACHER_WIDTH) if cfg.repa_weight else None,
    )
    if cfg.repa_weight:
        nets.projector = new_projector(cfg, transformer, TEACHER_WIDTH)
        randomize(nets.projector)
    if cfg.lpips_weight:
        # imported here: a torchvision that does not match torch fails at import
        from torchvision.models import vgg16

        nets.lpips = LPIPSLoss(cfg.lpips_scale, vgg16(weights=None, init_weights=False).state_dict())
    if cfg.objective != "dpo":
        return cfg, nets, inputs
    nets.reference = copy.deepcopy(transformer)
    randomize(nets.reference, seed=1)
    rows = map(twice, (inputs.noise, inputs.timestep, inputs.text, inputs.text_mask))
    return cfg, nets, PreferenceInputs(torch.cat((clean, -clean)), *rows)


def loss_and_gradients(
    cfg: TrainingConfig, nets: Nets, inputs: StepInputs | PreferenceInputs, autocast: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss (1,) and all gradients of the transformer in one vector."""
    device = inputs.clean.device.type
    with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
        if isinstance(inputs, PreferenceInputs):
            loss = preference_losses(inputs, nets, cfg)[0]["dpo"]
        else:
            loss = weighted_sum(compute_losses(inputs, nets, cfg)[0], cfg)
    weights = [weight for weight in nets.transformer.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return loss.detach()[None], torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def on(nets: Nets, device: str, dtype: torch.dtype) -> Nets:
    """Return a copy of the networks on a device, in a data type."""
    names = ("transformer", "projector", "lpips", "reference")
    networks = {name: getattr(nets, name) for name in names}
    return replace(nets, **{n: net and copy.deepcopy(net).to(device, dtype) for n, net in networks.items()})


def check_technique(name: str, device: str) -> Iterator[Comparison]:
    """Compare loss and gradients of one training step in float32, bf16 and fp16."""
    cfg, nets, inputs = step_of(name)
    expected = loss_and_gradients(cfg, on(nets, "cpu", torch.float64), move(inputs, "cpu", torch.float64))
    moved = move(inputs, device, torch.float32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        autocast = None if dtype == torch.float32 else dtype
        found = loss_and_gradients(cfg, on(nets, device, torch.float32), moved, autocast)
        depth = 2 * NETWORK["depth"] + (13 if nets.lpips is not None else 0)  # backward as well; VGG16 has 13 layers
        bound = error_bound(dtype, depth, NETWORK["hidden_size"])
        for part, own, reference in zip(("loss", "gradients"), found, expected):
            yield Comparison(f"{name}: {part}", str(dtype)[6:], relative_error(own, reference), bound)


def compile_blocks(backend: str, transformer: torch.nn.Module) -> None:
    transformer.compile_repeated_blocks(fullgraph=True, backend=backend)


def use_backend(name: str, transformer: torch.nn.Module) -> None:
    transformer.set_attention_backend(name)


def check_forward(label: str, change: Callable[[Any], None], dtype: torch.dtype, device: str) -> Iterator[Comparison]:
    """Compare the prediction of a transformer with padded captions, after a change such as compilation."""
    _, nets, inputs = step_of("flow matching")
    reference = copy.deepcopy(nets.transformer).double()
    given = move(inputs, "cpu", torch.float64)
    network = nets.transformer.to(device, dtype)
    change(network)
    moved = move(inputs, device, dtype)
    with torch.no_grad():
        expected = reference(given.noise, given.timestep, given.text, given.text_mask, return_dict=False)[0]
        timestep = given.timestep.to(
            device, torch.float32
        )  # bf16 has too few digits for the embedding of a noise level
        found = network(moved.noise, timestep, moved.text, moved.text_mask, return_dict=False)[0]
    bound = error_bound(dtype, NETWORK["depth"], NETWORK["hidden_size"])
    yield Comparison(label, str(dtype)[6:], relative_error(found, expected), bound)


def check_scheduler(scheduler: Any, device: str) -> Iterator[Comparison]:
    """Compare the sample after eight steps with a known prediction."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)

    def run(sample: torch.Tensor) -> torch.Tensor:
        scheduler.set_timesteps(8, device=sample.device)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(torch.sin(2 * sample), timestep, sample, return_dict=False)[0]
        return sample

    expected, found = run(noise), run(noise.to(device, torch.float32))
    bound = error_bound(torch.float32, 8, 1)
    yield Comparison(type(scheduler).__name__, "float32", relative_error(found, expected), bound)


def pipelines_of(space: str) -> dict[str, Any]:
    """Return a text-to-image, an image-to-image and an inpainting pipeline that share their networks."""
    pipe: Any = PRXPixelPipeline.from_pretrained(SMALL_MODEL)
    if space == "pixels":
        return {
            "text to image": pipe,
            "image to image": PRXPixelImg2ImgPipeline.from_pipe(pipe),
            "inpainting": PRXPixelInpaintPipeline.from_pipe(pipe),
        }
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(32, 32), latent_channels=4, norm_num_groups=8, scaling_factor=1.0)
    width = pipe.transformer.config["context_in_dim"]
    transformer = PRXTransformer2DModel(**NETWORK | {"context_in_dim": width})
    randomize(transformer)
    pipe = PRXPipeline(transformer, PRXFlowMatchScheduler(), pipe.text_encoder, pipe.tokenizer, vae)
    return {
        "text to image": pipe,
        "image to image": PRXImg2ImgPipeline.from_pipe(pipe),
        "inpainting": PRXInpaintPipeline.from_pipe(pipe),
    }


def check_pipelines(space: str, device: str) -> Iterator[Comparison]:
    """Compare pictures of every pipeline in float32 with those of the CPU, in eight guided steps."""
    size = 32
    picture = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, size, size)
    mask[..., :16] = 1
    common: dict[str, Any] = {"height": size, "width": size, "num_inference_steps": 8, "guidance_scale": 3.0}
    common |= {"output_type": "pt"}
    edited: dict[str, dict[str, Any]] = {
        "text to image": {"use_resolution_binning": False},
        "image to image": {"image": picture, "strength": 0.5},
    }
    edited["inpainting"] = {"image": picture, "mask_image": mask}
    pictures: dict[str, dict[str, torch.Tensor]] = {}
    for place in ("cpu", device):
        for name, pipe in pipelines_of(space).items():
            pipe.to(place).set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(1)
            images = pipe("a big red circle", generator=generator, **common | edited[name]).images
            pictures.setdefault(name, {})[f"{place} {len(pictures.get(name, {}))}"] = images
    for name, (expected, found) in ((name, tuple(both.values())) for name, both in pictures.items()):
        # guidance of scale 3 multiplies the difference of two evaluations, and both sides round
        bound = 2 * 3 * error_bound(torch.float32, 8 * 6, 256)
        yield Comparison(f"{space}: {name}", "float32", relative_error(found, expected), bound)


def correctness(
    device: str, backends: list[str], compile_backend: str
) -> dict[str, Callable[[], Iterator[Comparison]]]:
    """Return all checks by name."""
    checks: dict[str, Callable[[], Iterator[Comparison]]] = {
        name: partial(check_technique, name, device) for name in TECHNIQUES
    }
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        label = f"compiled blocks, {str(dtype)[6:]}"
        checks[label] = partial(
            check_forward, "compiled blocks", partial(compile_blocks, compile_backend), dtype, device
        )
    for backend in backends:
        dtype = torch.bfloat16
        checks[f"attention {backend}"] = partial(
            check_forward, f"attention {backend}", partial(use_backend, backend), dtype, device
        )
    for scheduler in (PRXFlowMatchScheduler(), PRXXPredictionScheduler()):
        checks[type(scheduler).__name__] = partial(check_scheduler, scheduler, device)
    for space in ("pixels", "latents"):
        checks[f"pipelines in {space}"] = partial(check_pipelines, space, device)
    return checks
