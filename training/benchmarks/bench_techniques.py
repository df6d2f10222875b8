"""Time steps with and without the study's techniques, alternating in one process.

    python training/benchmarks/bench_techniques.py                     # everything
    python training/benchmarks/bench_techniques.py --what route --repeats 9

- `route`: forward and backward of a PRX with 16 blocks at 1024 image tokens: dense, TREAD (half of the tokens bypass
the
  blocks [2, 13)) and SPRINT (three quarters are dropped there, and fused).
- `repa`: `train_step` with backward at 256 image tokens, hidden size 512 and 8 blocks: without alignment, with REPA
from
  cached features (teacher of width 192), and after the burn-in. Also the projector's share of the FLOPs of PRX-1.2B
  with a teacher of width 1024, which is counted, not timed.

A number is the median over the repeats; a ratio is a ratio of medians. bf16 autocast over float32 weights, as in
training.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import alternate
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from diffusers_prx.config.training_config import TrainingConfig
from diffusers_prx.models.token_routing import sample_route
from diffusers_prx.models.transformer_prx import PRXTransformer2DModel
from diffusers_prx.schedulers import PRXFlowMatchScheduler
from diffusers_prx.techniques.alignment import FeatureCache, build_projector
from diffusers_prx.techniques.teachers import TransformerTeacher
from diffusers_prx.training.networks import Nets, new_text_encoder, train_tokenizer
from diffusers_prx.training.rng import StepRandom
from diffusers_prx.training.step import train_step

TEXT_TOKENS = 85
ROUTE_RANGE = (2, 13)


def median_seconds(work: dict[str, Callable[[None], Any]], repeats: int) -> dict[str, float]:
    seconds = alternate(work, lambda: None, repeats)
    return {name: statistics.median(times) for name, times in seconds.items()}


def bench_route(repeats: int, batch: int) -> None:
    settings = {"in_channels": 16, "patch_size": 2, "context_in_dim": 512, "hidden_size": 384, "num_heads": 6}
    settings |= {"depth": 16, "axes_dim": [32, 32]}
    dense, sprint = (PRXTransformer2DModel(**settings, fusion_range=span) for span in (None, ROUTE_RANGE))
    latents = torch.randn(batch, 16, 64, 64)  # 1024 tokens of 2x2
    text, timestep = torch.randn(batch, TEXT_TOKENS, 512), torch.rand(batch)

    def step(model: PRXTransformer2DModel, ratio: float) -> None:
        route = sample_route(torch.rand(batch, 1024), ratio, *ROUTE_RANGE) if ratio else None
        with torch.autocast("cpu", torch.bfloat16):
            velocity = model(latents, timestep, text, return_dict=False, route=route)[0]
        F.mse_loss(velocity.float(), latents).backward()
        model.zero_grad(set_to_none=True)

    medians = median_seconds(
        {
            "dense": lambda _: step(dense, 0.0),
            "TREAD 50%": lambda _: step(dense, 0.5),
            "SPRINT 75%": lambda _: step(sprint, 0.75),
        },
        repeats,
    )
    print(f"\nroute: hidden 384, 16 blocks, 1024 tokens, batch {batch}, n = {repeats}\n")
    print("| step | ms | dense / this |\n|---|---|---|")
    for name, seconds in medians.items():
        print(f"| {name} | {1000 * seconds:.0f} | **{medians['dense'] / seconds:.2f}x** |")


def bench_repa(repeats: int, batch: int) -> None:
    tokenizer = train_tokenizer(["a red circle on a white background."] * 10, 300, 64)
    text_settings = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    text_settings |= {"head_dim": 32, "intermediate_size": 128, "query_pre_attn_scalar": 32}
    text_encoder = new_text_encoder(text_settings, tokenizer).eval().requires_grad_(False)
    transformer = PRXTransformer2DModel(
        in_channels=3, patch_size=4, context_in_dim=64, hidden_size=512, num_heads=8, depth=8, axes_dim=(32, 32)
    )
    vision = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=192, num_hidden_layers=4, num_attention_heads=6, patch_size=4, image_size=64
        )
    )
    teacher = TransformerTeacher(vision, [0.5] * 3, [0.5] * 3, "random, 192 wide")
    cfg = TrainingConfig(
        dataset_name="scenes",
        transformer_config={"hidden_size": 512},
        text_encoder_name_or_path="in memory",
        repa_weight=0.5,
        repa_teacher="in memory",
        repa_block=3,
        caption_dropout=0.0,
    )
    plain = Nets(transformer, text_encoder, tokenizer, None, PRXFlowMatchScheduler(), 4)
    generator = torch.Generator().manual_seed(0)
    data = {
        "pixels_uint8": torch.randint(0, 256, (batch, 3, 64, 64), dtype=torch.uint8, generator=generator),
        "captions": ["a big red circle at the top left on a white background."] * batch,
    }

    def step(nets: Nets) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = train_step(data, nets, cfg, StepRandom(0, 0, range(batch))).loss
        loss.backward()
        for module in (transformer, projector, wide):
            module.zero_grad(set_to_none=True)

    with tempfile.TemporaryDirectory() as folder:
        projector = build_projector("mlp", 512, 192, hidden_size=512)
        wide = build_projector("mlp", 512, 192, hidden_size=2048)
        shared = {"teacher": teacher, "teacher_cache": FeatureCache(Path(folder))}
        aligned = Nets(**vars(plain) | shared | {"projector": projector})
        aligned_wide = Nets(**vars(plain) | shared | {"projector": wide})
        uncached = Nets(**vars(plain) | {"teacher": teacher, "projector": projector})
        medians = median_seconds(
            {
                "without": lambda _: step(plain),
                "REPA, cached features": lambda _: step(aligned),
                "REPA, cached features, projector 2048 wide": lambda _: step(aligned_wide),
                "REPA, teacher in the step": lambda _: step(uncached),
                "after the burn-in": lambda _: step(Nets(**vars(aligned) | {"projector": None})),
            },
            repeats,
        )
    print(f"\nREPA: hidden 512, 8 blocks, 256 tokens, teacher 192 wide, batch {batch}, n = {repeats}\n")
    print("| step | ms | this / without |\n|---|---|---|")
    for name, seconds in medians.items():
        print(f"| {name} | {1000 * seconds:.0f} | **{seconds / medians['without']:.3f}x** |")


def count_repa() -> None:
    """Print the projector's share of the FLOPs of PRX-1.2B at 256 latent tokens, with a teacher of width 1024."""
    with torch.device("meta"):
        transformer = PRXTransformer2DModel()
        projector = build_projector("mlp", 1792, 1024, hidden_size=1792)
        latents, text, timestep = torch.randn(1, 16, 32, 32), torch.randn(1, TEXT_TOKENS, 2304), torch.rand(1)
        features = torch.randn(1, 256, 1792, requires_grad=True)
        with FlopCounterMode(display=False) as step:
            transformer(latents, timestep, text, return_dict=False)[0].sum().backward()
        with FlopCounterMode(display=False) as extra:
            projector(features, None, (16, 16)).sum().backward()
    share = extra.get_total_flops() / step.get_total_flops()
    print(f"\nPRX-1.2B, 256 tokens: the projector adds {share:.2%} to the FLOPs of forward and backward, without the")
    print("teacher, whose features may be cached (DINOv2 ViT-L: 0.3B parameters forward).")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=["route", "repa", "all"], default="all")
    parser.add_argument(
        "--train_batch_size", type=int, default=2, help="Batch size of `route`; `repa` uses eight times as many."
    )
    parser.add_argument("--repeats", type=int, default=7, help="Number of repeats. Default: 7.")
    parser.add_argument("--threads", type=int, help="Threads of PyTorch. Default: its own choice.")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.what in ("route", "all"):
        bench_route(args.repeats, args.train_batch_size)
    if args.what in ("repa", "all"):
        bench_repa(args.repeats, 8 * args.train_batch_size)
        count_repa()


if __name__ == "__main__":
    main()
