"""Counts of the FLOPs and the memory of a training step, on tensors without values.

Everything here runs inside `fake_tensors`: the real modules are built and called, and nothing is allocated. The fake
tensors are on the CPU, because PyTorch's autocast does not support the meta device. Differences from a GPU are noted
where they occur.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedConfig, T5GemmaModuleConfig

from ..compat import FakeTensorMode, TorchDispatchMode, clear_dinov3_positions, tree_leaves
from ..config.training_config import TrainingConfig
from ..latents import decode, encode, latent_channels, vae_scale_factor
from ..models.token_routing import sample_route
from ..schedulers import PRXFlowMatchScheduler, PRXXPredictionScheduler
from ..techniques.losses import LPIPSLoss, dino_perceptual_loss
from ..techniques.optimizers import build_optimizer
from ..techniques.teachers import VisionTeacher, build_teacher
from ..text import encode_text, encoder_only
from ..training.distill_step import DistillationInputs, distillation_losses
from ..training.network_configs import meta_teacher, meta_text_encoder, text_config
from ..training.networks import Nets, count_uncheckpointed_blocks, new_discriminator, new_projector
from ..training.preference_step import PreferenceInputs, preference_losses, twice
from ..training.preflight import meta_networks
from ..training.reward_step import RewardInputs, draw_images, reward_losses
from ..training.step import StepInputs, alignment, compute_losses, weighted_sum


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# PyTorch's counter counts fused attention on GPUs, but takes it for zero on CPUs.
FUSED_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Context in which new tensors have shapes and types but no values (`FakeTensorMode`)."""
    clear_dinov3_positions()
    try:
        with FakeTensorMode():
            yield
    finally:
        clear_dinov3_positions()


class LiveBytes(TorchDispatchMode):
    """Count the bytes of live storages that operations allocate.

    Attributes:
        current: bytes allocated now.
        peak: most bytes allocated at any time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self.storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), inputs)
        return result

    def _add(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self.storages or address in inputs:  # a view, or changed in place
            return
        self.current += size
        self.peak = max(self.peak, self.current)
        self.storages[address] = weakref.ref(storage, lambda _: self._remove(address, size))

    def _remove(self, address: int, size: int) -> None:
        self.current -= size
        del self.storages[address]


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one micro-batch on one process.

    Args:
        forward: forward operations.
        backward: backward operations, without recomputation.
        recomputed: forward operations that gradient checkpointing repeats in the backward pass.
    """

    forward: int = 0
    backward: int = 0
    recomputed: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.recomputed


def count(run: Callable[[], torch.Tensor]) -> Flops:
    """Count the operations of a function, and of the backward pass from its result if that requires gradients."""
    with FlopCounterMode(display=False, custom_mapping=FUSED_ATTENTION) as forward:
        result = run()
    with FlopCounterMode(display=False, custom_mapping=FUSED_ATTENTION) as backward:
        if result.requires_grad:
            result.sum().backward()
    return Flops(forward.get_total_flops(), backward.get_total_flops())


def build_meta_networks(cfg: TrainingConfig) -> Nets:
    """Build every network of a run on fake tensors, frozen or trainable as in the run.

    Raises:
        ValueError: if the configuration of a network is unknown and cannot be read, or does not fit, or if the run
            trains an adapter, which is not supported.
    """
    if cfg.lora_rank is not None:
        raise ValueError(f"`lora_rank` is {cfg.lora_rank}; the planner supports full training only. Omit `lora_rank`.")
    networks = meta_networks(cfg, "cpu", tables=True)
    transformer = networks.transformer
    config: PreTrainedConfig
    if cfg.text_encoder_config:
        config = encoder_only(T5GemmaModuleConfig(**cfg.text_encoder_config, vocab_size=cfg.tokenizer_vocab_size))
    elif cfg.text_encoder_name_or_path is not None:
        config = text_config(cfg.text_encoder_name_or_path, tables=True)
    else:
        config = text_config(str(cfg.pretrained_model_name_or_path), "text_encoder")
    scheduler = PRXFlowMatchScheduler() if cfg.prediction_type == "velocity" else PRXXPredictionScheduler()
    nets = Nets(
        transformer, meta_text_encoder(config), None, networks.vae, scheduler, transformer.config["patch_size"]
    )
    for stage in cfg.stage_configs():
        _add_techniques(nets, stage)
    if any(stage.needs_reference for stage in cfg.stage_configs()):
        nets.reference = meta_networks(cfg, "cpu", tables=True).transformer
    if cfg.distill_guidance_max is not None:
        transformer.add_guidance_embedder()
    frozen = (nets.text_encoder, nets.vae, nets.lpips, nets.reference)
    for module in frozen:
        if module is not None:
            module.requires_grad_(False).eval()
    for module in nets.trainable(cfg).values():
        module.requires_grad_(True).train()
    if cfg.weights_dtype == "bf16":
        for module in transformer.modules():  # not `to`, which fake tensors do not support
            for name, weight in list(module.named_parameters(recurse=False)):
                module.register_parameter(name, nn.Parameter(weight.detach().bfloat16()))
    transformer.kept_blocks = count_uncheckpointed_blocks(cfg, transformer.config["depth"])
    if cfg.attention_backend == "_native_math":  # the others count as the default
        transformer.set_attention_backend(cfg.attention_backend)
    return nets


def _add_techniques(nets: Nets, cfg: TrainingConfig) -> None:
    """Add the networks that the losses of a stage need."""
    if cfg.repa_weight:
        nets.teacher = nets.teacher or _teacher("repa_teacher", str(cfg.repa_teacher))
        nets.projector = nets.projector or new_projector(cfg, nets.transformer, nets.teacher.hidden_size)
    if cfg.lpips_weight and nets.lpips is None:
        # imported here: a torchvision that does not match torch fails at import, and only this loss needs it
        from torchvision.models import vgg16

        nets.lpips = LPIPSLoss(cfg.lpips_scale, vgg16(weights=None, init_weights=False).state_dict())
    if cfg.dino_weight and nets.dino is None:
        is_shared = nets.teacher is not None and nets.teacher.name == cfg.dino_teacher
        nets.dino = nets.teacher if is_shared else _teacher("dino_teacher", str(cfg.dino_teacher))
    if cfg.objective == "ladd" and nets.discriminator is None:
        nets.discriminator = new_discriminator(cfg, nets.transformer)


def _teacher(setting: str, name: str) -> VisionTeacher:
    return build_teacher(meta_teacher(setting, name, tables=True), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), name)


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of one stage as the training step sees it.

    Args:
        nets: networks on fake tensors, from `Nets.for_losses`.
        cfg: settings of the stage.
        text_tokens: length of the longest caption, L.
    """

    nets: Nets
    cfg: TrainingConfig
    text_tokens: int

    @property
    def grid(self) -> tuple[int, int]:
        side = self.cfg.resolution // self.nets.pixels_per_token
        return side, side

    @property
    def cached(self) -> bool:
        return self.cfg.precomputed_dir is not None

    def autocast(self) -> AbstractContextManager:
        return torch.autocast("cpu", torch.bfloat16) if self.cfg.mixed_precision != "no" else nullcontext()

    def pixels(self) -> torch.Tensor:
        size = self.cfg.resolution
        return torch.rand(self.cfg.train_batch_size, 3, size, size)  # (B, 3, H, W)

    def latents_shape(self) -> tuple[int, ...]:
        side = self.cfg.resolution // vae_scale_factor(self.nets.vae)
        return self.cfg.train_batch_size, latent_channels(self.nets.vae), side, side

    def encode_images(self) -> torch.Tensor:
        with torch.no_grad():
            latents = encode(self.nets.vae, self.pixels())
        return latents.draw(None if latents.std is None else torch.randn(self.latents_shape()))  # (B, C, h, w)

    def encode_captions(self) -> torch.Tensor:
        ids = torch.zeros(self.cfg.train_batch_size, self.text_tokens, dtype=torch.long)
        with torch.set_grad_enabled(self.cfg.train_text_encoder):
            return encode_text(self.nets.text_encoder, ids, torch.ones_like(ids).bool())  # (B, L, E)

    def teacher_features(self) -> torch.Tensor:
        with torch.no_grad():
            return self.nets.teacher(self.pixels(), self.grid)  # (B, N, E)

    def inputs(self) -> StepInputs:
        """Return the inputs of the losses, encoded as in the training step, with padded captions."""
        cfg, nets, batch = self.cfg, self.nets, self.cfg.train_batch_size
        tokens = self.grid[0] * self.grid[1]
        pixels = self.pixels()
        if nets.vae is None:
            clean = pixels
        else:
            clean = torch.randn(self.latents_shape()) if self.cached else self.encode_images()  # (B, C, h, w)
        width = nets.transformer.config["context_in_dim"]
        features = None
        if nets.projector is not None:
            cached = (batch, tokens, nets.teacher.hidden_size)
            features = torch.randn(cached) if self.cached else self.teacher_features()  # (B, N, E)
        return StepInputs(
            clean=clean,
            noise=cfg.noise_scale * torch.randn(clean.shape),
            timestep=torch.rand(batch),
            text=torch.randn(batch, self.text_tokens, width) if self.cached else self.encode_captions(),  # (B, L, E)
            text_mask=torch.ones(batch, self.text_tokens, dtype=torch.bool),
            captions=[f"caption {n}" for n in range(batch)],
            route=sample_route(torch.rand(batch, tokens), cfg.route_ratio, *cfg.route_range)
            if cfg.route_ratio
            else None,
            pixels_pm1=pixels,
            teacher_features=features,
            dino_crop=torch.rand(batch, 2) if nets.dino is not None and cfg.dino_crop else None,
        )

    def distillation_inputs(self) -> DistillationInputs:
        """Return the inputs of the losses of distillation; the empty caption has one token."""
        inputs = self.inputs()
        return DistillationInputs(
            clean=inputs.clean,
            noise=inputs.noise,
            timestep=inputs.timestep,
            level=torch.zeros(len(inputs.clean), dtype=torch.long),
            text=inputs.text,
            text_mask=inputs.text_mask,
            negative_text=inputs.text[:, :1],
            judged_timestep=inputs.timestep,
            judged_noise=inputs.noise,
            guidance=None if self.cfg.distill_guidance_max is None else 1 + inputs.timestep,
        )

    def preference_inputs(self) -> PreferenceInputs:
        """Return the inputs of the loss of preferences; the images of a pair are encoded in one batch."""
        inputs = self.inputs()
        rejected = inputs.clean if self.nets.vae is None else self.encode_images()  # (B, C, h, w)
        assert inputs.text_mask is not None
        rows = (inputs.noise, inputs.timestep, inputs.text, inputs.text_mask)
        return PreferenceInputs(torch.cat((inputs.clean, rejected)), *map(twice, rows))

    def decode_images(self) -> torch.Tensor:
        """Decode the images that the reward step draws, (B * K, 3, H, W)."""
        batch, *shape = self.latents_shape()
        with torch.no_grad():
            return decode(self.nets.vae, torch.randn(batch * self.cfg.reward_images_per_prompt, *shape))

    def reward_loss(self) -> torch.Tensor:
        """Return the loss of a reward step, with drawn images and without their scores."""
        cfg, (batch, *shape) = self.cfg, self.latents_shape()
        count = cfg.reward_images_per_prompt
        text = self.encode_captions().repeat_interleave(count, dim=0)  # (B * K, L, E)
        mask = torch.ones(text.shape[:2], dtype=torch.bool)
        noise, timestep = torch.randn(batch * count, *shape), torch.rand(batch * count)
        negative_text = text[:, :1] if cfg.reward_guidance_scale > 1 else None  # (B * K, 1, E)
        clean = draw_images(noise, text, mask, negative_text, self.nets, cfg)  # (B * K, C, h, w)
        self.decode_images()
        inputs = RewardInputs(clean, noise, timestep, timestep, text, mask)
        losses, _ = reward_losses(inputs, self.nets, cfg)
        return torch.stack(list(losses.values())).sum()

    def loss(self) -> torch.Tensor:
        """Return the loss of a whole step, including the encoding of its inputs."""
        if self.cfg.objective == "nft":
            return self.reward_loss()
        if self.cfg.objective == "dpo":
            return preference_losses(self.preference_inputs(), self.nets, self.cfg)[0]["dpo"]
        if self.cfg.objective != "flow":
            losses, _ = distillation_losses(self.distillation_inputs(), self.nets, self.cfg)
            return torch.stack(list(losses.values())).sum()
        losses, _ = compute_losses(self.inputs(), self.nets, self.cfg)
        return weighted_sum(losses, self.cfg)

    def flops(self) -> dict[str, Flops]:
        """Return the FLOPs by part; `recomputed` follows `cfg.gradient_checkpointing`."""
        nets = self.nets
        with self.autocast():
            parts = self._flops_besides_transformer()
            nets.transformer.disable_gradient_checkpointing()
            whole = count(self.loss)
            recomputed = 0
            if self.cfg.gradient_checkpointing:
                nets.transformer.enable_gradient_checkpointing()
                recomputed = count(self.loss).backward - whole.backward
        clear_gradients(nets, self.cfg)
        forward = whole.forward - sum(part.forward for part in parts.values())
        backward = whole.backward - sum(part.backward for part in parts.values())
        return {"transformer": Flops(forward, backward, recomputed)} | parts

    def _flops_besides_transformer(self) -> dict[str, Flops]:
        """Return the FLOPs of every part but the transformer."""
        nets, parts = self.nets, {}
        if not self.cached:
            if nets.vae is not None:
                drawn = self.cfg.objective == "nft"
                parts["autoencoder"] = count(self.decode_images if drawn else self.encode_images)
            parts["text encoder"] = count(self.encode_captions)
        if nets.projector is not None:
            if not self.cached:
                parts["teacher"] = count(self.teacher_features)
            tokens, batch = self.grid[0] * self.grid[1], self.cfg.train_batch_size
            indices = None
            start, stop = self.cfg.route_range
            if self.cfg.route_ratio and start <= self.cfg.repa_block < stop:
                route = sample_route(torch.rand(batch, tokens), self.cfg.route_ratio, start, stop)
                indices = route.kept  # (B, K)
            kept = tokens if indices is None else indices.shape[1]
            features = torch.randn(batch, kept, nets.transformer.config["hidden_size"], requires_grad=True)
            target = torch.randn(batch, tokens, nets.teacher.hidden_size)
            parts["projector"] = count(lambda: alignment(features, indices, target, nets, self.cfg, self.grid))
        predicted, pixels = self.pixels().requires_grad_(), self.pixels()
        lpips = nets.lpips
        if lpips is not None:
            parts["LPIPS"] = count(lambda: lpips(predicted, pixels).mean())
        if nets.dino is not None:
            crop = torch.rand(self.cfg.train_batch_size, 2) if self.cfg.dino_crop else None
            parts["DINO"] = count(
                lambda: dino_perceptual_loss(nets.dino, predicted, pixels, self.cfg.dino_size, crop).mean()
            )
        if nets.vae is not None and (nets.lpips is not None or nets.dino is not None):
            latents = torch.randn(self.latents_shape(), requires_grad=True)
            parts["decoder"] = count(lambda: decode(nets.vae, latents))
        return parts

    def activations(self, checkpointing: bool) -> int:
        """Return the peak bytes of forward and backward pass beyond weights, gradients and optimizer state.

        They include the batch, saved activations, temporary tensors, and autocast's bf16 copies of the weights.
        Gradients of an earlier micro-batch are assumed to exist.
        """
        transformer = self.nets.transformer
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        else:
            transformer.disable_gradient_checkpointing()
        for weight in trained_weights(self.nets, self.cfg):
            weight.grad = torch.zeros_like(weight)
        with LiveBytes() as live:
            with self.autocast():
                loss = self.loss()
            loss.backward()
        clear_gradients(self.nets, self.cfg)
        return live.peak


def trained_weights(nets: Nets, cfg: TrainingConfig) -> list[nn.Parameter]:
    """Return the weights that a run trains."""
    return [weight for module in nets.trainable(cfg).values() for weight in module.parameters()]


def clear_gradients(nets: Nets, cfg: TrainingConfig) -> None:
    """Remove the gradients of all trained weights."""
    for weight in trained_weights(nets, cfg):
        weight.grad = None


def optimizer_bytes(nets: Nets, cfg: TrainingConfig) -> tuple[int, int]:
    """Return the peak bytes of temporary tensors in an optimizer step on one process.

    Returns:
        Bytes counted on the CPU, and additional bytes of AdamW on a GPU: there it updates all weights at once and
        holds the square root of every second moment (PyTorch's `foreach`).
    """
    optimizer = build_optimizer(replace(cfg, stages=[]), nets.trainable(cfg))
    for weight in trained_weights(nets, cfg):
        weight.grad = torch.zeros_like(weight)
    optimizer.step()  # creates the state
    with LiveBytes() as live:
        optimizer.step()
    clear_gradients(nets, cfg)
    groups = [group for group in optimizer.param_groups if group.get("kind") != "muon"]
    return live.peak, sum(weight.nbytes for group in groups for weight in group["params"])


def stored_bytes(modules: list[nn.Module]) -> int:
    """Return the bytes of weights and buffers; a module that is listed twice counts once."""
    tensors = {id(t): t.nbytes for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(tensors.values())
