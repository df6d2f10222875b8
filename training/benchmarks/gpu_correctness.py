"""Correctness part of gpu_check.py: what the device computes against float64 on the CPU, with the same numbers."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import attention_backend
from timing import randomize
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

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
from diffusers_prx.schedulers import PRXFlowMatchScheduler, PRXXPredictionScheduler, fast_scheduler, fast_sigmas
from diffusers_prx.techniques.losses import LPIPSLoss
from diffusers_prx.techniques.teachers import TransformerTeacher
from diffusers_prx.training.distill_step import DistillationInputs, distillation_losses
from diffusers_prx.training.networks import Nets, new_discriminator, new_projector
from diffusers_prx.training.preference_step import PreferenceInputs, preference_losses, twice
from diffusers_prx.training.reward_step import RewardInputs, reward_losses
from diffusers_prx.training.step import StepInputs, compute_losses

SMALL_MODEL = Path(__file__).resolve().parents[2] / "model_cards" / "prx-scenes-small"
BATCH, SIDE, TEXT_TOKENS, TEXT_WIDTH, TEACHER_WIDTH = 2, 32, 12, 64, 48
NETWORK: dict[str, Any] = {
    "in_channels": 4, "patch_size": 4, "context_in_dim": TEXT_WIDTH, "hidden_size": 128, "num_heads": 4, "depth": 3,
    "axes_dim": [16, 16],
}  # fmt: skip
PIXELS: dict[str, Any] = {"in_channels": 3, "bottleneck_size": 32}

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
    "DINO perceptual": (
        {"dino_weight": 0.1, "dino_teacher": "random", "dino_size": 16, "prediction_type": "x_prediction"}, PIXELS
    ),
    "DPO": ({"objective": "dpo", "rejected_image_column": "rejected", "dpo_beta": 10.0}, {}),
    "NFT": ({"objective": "nft", "reward_scorers": {"drawn scores": 1.0}, "reward_kl_weight": 0.1}, {}),
    "guidance distillation": ({"objective": "guidance_distillation"}, {}),
    "mean velocity": ({"objective": "mean_velocity", "distill_steps": 2, "distill_teacher_steps": 4}, {}),
    "LADD": ({"objective": "ladd", "distill_steps": 2}, {}),
    "resolution": ({}, {"resolution_embeds": True, "resolution_tokens": True}),
}  # fmt: skip

Inputs = TypeVar("Inputs")
AnyInputs = StepInputs | PreferenceInputs | RewardInputs | DistillationInputs
MEASURED = 4  # where rounding has no simple bound: accepted error over that of the CPU in the same data type
LOSS_SCALE = 2.0**10  # keeps the gradients of fp16 in its range, as a gradient scaler does
Change = Callable[[Any], None]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Unavailable(RuntimeError):
    """The device or the installation lacks what a check needs."""


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


def step_of(name: str) -> tuple[TrainingConfig, Nets, AnyInputs]:
    """Return settings, random networks and random inputs of a technique, in float32 on the CPU."""
    settings, arguments = TECHNIQUES[name]
    names = {"dataset_name": "images", "text_encoder_name_or_path": "none", "transformer_config": NETWORK | arguments}
    cfg = TrainingConfig(**names | ({"num_validation_samples": 0} if "objective" in settings else {}) | settings)
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
    if cfg.dino_weight:
        vision = Dinov2WithRegistersConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=4, image_size=16
        )
        network = Dinov2WithRegistersModel(vision)
        randomize(network)
        nets.dino = TransformerTeacher(network, [0.5] * 3, [0.5] * 3, "random")
    if cfg.objective == "flow":
        return cfg, nets, inputs
    nets.reference = copy.deepcopy(transformer)
    randomize(nets.reference, seed=1)
    nets.reference.requires_grad_(False)
    drawn = (inputs.noise, inputs.timestep)
    if cfg.objective == "dpo":
        rows = map(twice, (*drawn, inputs.text, inputs.text_mask))
        return cfg, nets, PreferenceInputs(torch.cat((clean, -clean)), *rows)
    if cfg.objective == "nft":
        return cfg, nets, RewardInputs(clean, *drawn, torch.tensor([1.0, -0.5]), inputs.text, inputs.text_mask)
    if cfg.objective == "ladd":
        nets.discriminator = new_discriminator(cfg, transformer)
        randomize(nets.discriminator, seed=2)
    text = (inputs.text, inputs.text_mask, inputs.text[:, :1])
    judged = (inputs.timestep.flip(0), torch.randn(clean.shape))
    return cfg, nets, DistillationInputs(clean, *drawn, torch.tensor([0, 1]), *text, *judged)


def losses_of(inputs: AnyInputs, nets: Nets, cfg: TrainingConfig) -> dict[str, torch.Tensor]:
    """Return all losses of a training step by name, unweighted; the technique's own are last."""
    if isinstance(inputs, PreferenceInputs):
        return preference_losses(inputs, nets, cfg)[0]
    if isinstance(inputs, RewardInputs):
        return reward_losses(inputs, nets, cfg)[0]
    if isinstance(inputs, DistillationInputs):
        return distillation_losses(inputs, nets, cfg)[0]
    return compute_losses(inputs, nets, cfg)[0]


def losses_and_gradients(
    cfg: TrainingConfig, nets: Nets, inputs: AnyInputs, autocast: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Return the losses of a step, and the gradients of each as one vector over all weights that it trains.

    The gradients are those of each loss alone: in a weighted sum, that of the flow would hide the others.
    """
    with torch.autocast(inputs.clean.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        losses = losses_of(inputs, nets, cfg)
    trained = [net for net in (nets.transformer, nets.projector, nets.discriminator) if net is not None]
    weights = [weight for net in trained for weight in net.parameters() if weight.requires_grad]
    trained_losses = {name: loss for name, loss in losses.items() if loss.requires_grad}  # others are for the log
    found = {f"{name} loss": loss.detach()[None] for name, loss in trained_losses.items()}
    last = list(trained_losses)[-1]
    for name, loss in trained_losses.items():
        keep = name != last  # compiled graphs with several losses would have to be compiled without buffer donation
        gradients = torch.autograd.grad(LOSS_SCALE * loss, weights, allow_unused=True, retain_graph=keep)
        used = [gradient.flatten() / LOSS_SCALE for gradient in gradients if gradient is not None]
        found[f"gradients of {name}"] = torch.cat(used)
    return found


def on(nets: Nets, device: str, dtype: torch.dtype) -> Nets:
    """Return a copy of the networks on a device, in a data type."""
    names = ("transformer", "projector", "lpips", "dino", "discriminator", "reference")
    networks = {name: getattr(nets, name) for name in names}
    return replace(nets, **{n: net and copy.deepcopy(net).to(device, dtype) for n, net in networks.items()})


def compare_training(
    label: str, technique: str, device: str, change: Change = lambda network: None, dtypes: Iterable[Any] = DTYPES
) -> Iterator[Comparison]:
    """Compare losses and gradients of a training step: weights in float32, autocast to bf16 and fp16.

    Clamped pixels, ReLU and maxima make the gradients of perceptual losses jump where rounding moves a value across
    the kink. Their bound is therefore at least four times the error of the CPU in the same data type.

    Args:
        label: name in the report.
        technique: a key of `TECHNIQUES`.
        device: "cuda" or "cpu".
        change: what is done with the transformer on the device, such as compilation.
        dtypes: data types of the computation.
    """
    cfg, nets, inputs = step_of(technique)
    expected = losses_and_gradients(cfg, on(nets, "cpu", torch.float64), move(inputs, "cpu", torch.float64))
    depth = 2 * NETWORK["depth"] * (1 if nets.reference is None else 2)  # forward and backward pass
    jumps = nets.lpips is not None or nets.dino is not None
    for dtype in dtypes:
        autocast = None if dtype == torch.float32 else dtype
        on_device = on(nets, device, torch.float32)
        change(on_device.transformer)
        found = losses_and_gradients(cfg, on_device, move(inputs, device, torch.float32), autocast)
        bound = error_bound(dtype, depth, NETWORK["hidden_size"])
        rounded = None
        if jumps:
            on_cpu = on(nets, "cpu", torch.float32)
            rounded = losses_and_gradients(cfg, on_cpu, move(inputs, "cpu", torch.float32), autocast)
        for part, reference in expected.items():
            own = 0.0 if rounded is None else relative_error(rounded[part], reference)
            error = relative_error(found[part], reference)
            yield Comparison(f"{label}: {part}", str(dtype)[6:], error, max(bound, MEASURED * own))


def compile_blocks(backend: str, transformer: torch.nn.Module) -> None:
    transformer.compile_repeated_blocks(fullgraph=True, backend=backend)


def compare_forward(
    label: str, device: str, change: Change = lambda network: None, dtypes: Iterable[Any] = DTYPES, padded: bool = True
) -> Iterator[Comparison]:
    """Compare the prediction of a transformer whose weights have the data type, with or without padded captions."""
    _, nets, inputs = step_of("flow matching")
    assert isinstance(inputs, StepInputs)
    mask = inputs.text_mask if padded else None
    reference, given = copy.deepcopy(nets.transformer).double(), move(inputs, "cpu", torch.float64)
    expected = predict(reference, given, mask)
    for dtype in dtypes:
        network = copy.deepcopy(nets.transformer).to(device, dtype)
        change(network)
        # timestep in float32: bf16 has too few digits for the embedding of a noise level
        moved = replace(move(inputs, device, dtype), timestep=inputs.timestep.to(device))
        found = predict(network, moved, moved.text_mask if padded else None)
        bound = error_bound(dtype, NETWORK["depth"], NETWORK["hidden_size"])
        yield Comparison(label, str(dtype)[6:], relative_error(found, expected), bound)


@torch.no_grad()
def predict(network: Any, inputs: StepInputs, mask: torch.Tensor | None) -> torch.Tensor:
    return network(inputs.noise, inputs.timestep, inputs.text, mask, return_dict=False)[0]


def check_compiled(backend: str, device: str) -> Iterator[Comparison]:
    """Compare forward and backward pass of compiled blocks."""
    change = partial(compile_blocks, backend)
    yield from compare_forward("compiled blocks", device, change)
    yield from compare_training("compiled blocks", "flow matching", device, change)


def check_backend(name: str, device: str) -> list[Comparison]:
    """Compare an attention backend in bf16 and fp16: prediction, and gradients if it is one of PyTorch's.

    A backend that takes no mask is compared without padded captions.

    Raises:
        Unavailable: if the installation lacks its package, or the device its kernel.
        ValueError: if diffusers has no such backend.
    """

    def use(transformer: Any) -> None:
        transformer.set_attention_backend(name)

    label, dtypes = f"attention {name}", (torch.bfloat16, torch.float16)
    with attention_backend("native"):  # `set_attention_backend` also sets diffusers' own default, which this restores
        try:
            use(step_of("flow matching")[1].transformer)
        except (RuntimeError, ImportError) as error:
            raise Unavailable(str(error)) from error
        try:
            found = list(compare_forward(label, device, use, dtypes))
            if name.startswith(("native", "_native")):
                found += compare_training(label, "flow matching", device, use, dtypes)
        except ValueError as error:
            if "attn_mask" not in str(error):
                raise
            found = list(compare_forward(f"{label}, no padding", device, use, dtypes, padded=False))
        except RuntimeError as error:
            if any(reason in str(error) for reason in ("No viable backend", "No available kernel")):
                raise Unavailable(str(error)) from error
            raise
    return found


def check_scheduler(scheduler: Any, device: str) -> Iterator[Comparison]:
    """Compare the sample after eight steps with a known prediction."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)

    def run(sample: torch.Tensor) -> torch.Tensor:
        own = copy.deepcopy(scheduler)
        if hasattr(own, "scale_noise"):
            own.set_timesteps(8, device=sample.device)
        else:  # diffusers' multistep solver on our levels
            own.set_timesteps(sigmas=np.array(fast_sigmas(8)), device=sample.device)
        for timestep in own.timesteps:
            sample = own.step(torch.sin(2 * sample), timestep, sample, return_dict=False)[0]
        return sample

    expected, found = run(noise), run(noise.to(device, torch.float32))
    # an expanding map: a rounding error grows with exp(2 * 1), the slope of sin(2x) over the unit of time
    bound = 8 * error_bound(torch.float32, 8, 1)
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


def check_pipelines(space: str, device: str, change: Change = lambda network: None) -> Iterator[Comparison]:
    """Compare pictures of every pipeline, in eight guided steps, with those of float64 on the CPU.

    How far rounding moves a picture depends on the network. It is therefore measured: the device may be four times as
    far from float64 as the CPU in the same data type, and sum its products in another order.

    Args:
        space: "pixels" or "latents".
        device: "cuda" or "cpu".
        change: what is done with the transformer on the device.
    """
    generator = torch.Generator().manual_seed(0)
    size = 32
    picture = torch.rand(1, 3, size, size, generator=generator)
    mask = torch.zeros(1, 1, size, size)
    mask[..., :16] = 1
    channels = 3 if space == "pixels" else 4
    side = size if space == "pixels" else size // 2
    noise = torch.randn(1, channels, side, side, generator=generator)  # given: another type draws other numbers
    common: dict[str, Any] = {
        "latents": noise,
        "height": size,
        "width": size,
        "num_inference_steps": 8,
        "guidance_scale": 3.0,
    }
    edited: dict[str, dict[str, Any]] = {
        "text to image": {"use_resolution_binning": False},
        "image to image": {"image": picture, "strength": 0.5},
        "inpainting": {"image": picture, "mask_image": mask},
    }

    def draw(place: str, dtype: torch.dtype, change: Change = lambda network: None) -> dict[str, torch.Tensor]:
        pipelines = pipelines_of(space)
        change(pipelines["text to image"].to(place, dtype).transformer)
        drawn = {}
        for name, pipe in pipelines.items():
            pipe.set_progress_bar_config(disable=True)
            seeded = torch.Generator().manual_seed(1)
            drawn[name] = pipe("a big red circle", generator=seeded, output_type="pt", **common | edited[name]).images
        return drawn

    expected = draw("cpu", torch.float64)
    for dtype in DTYPES:
        rounded, found = draw("cpu", dtype), draw(device, dtype, change)
        for name, reference in expected.items():
            bound = MEASURED * relative_error(rounded[name], reference) + error_bound(torch.float32, 1, 256)
            yield Comparison(f"{space}: {name}", str(dtype)[6:], relative_error(found[name], reference), bound)


def correctness(
    device: str, backends: list[str], compile_backend: str
) -> dict[str, Callable[[], Iterable[Comparison]]]:
    """Return all checks by name."""
    checks: dict[str, Callable[[], Iterable[Comparison]]] = {
        name: partial(compare_training, name, name, device) for name in TECHNIQUES
    }
    checks["prediction"] = partial(compare_forward, "prediction", device)
    checks["compiled blocks"] = partial(check_compiled, compile_backend, device)
    for backend in backends:
        checks[f"attention {backend}"] = partial(check_backend, backend, device)
    for scheduler in (PRXFlowMatchScheduler(), PRXXPredictionScheduler(), fast_scheduler()):
        checks[type(scheduler).__name__] = partial(check_scheduler, scheduler, device)
    for space in ("pixels", "latents"):
        checks[f"pipelines in {space}"] = partial(check_pipelines, space, device)
    return checks
