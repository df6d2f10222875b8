"""What smaller weights do to a trained pipeline: their size, the error of a forward, and that of the pictures.

    python training/benchmarks/smaller_error.py --model outputs/quickstart

Every way draws the same held-out scene prompts from the same noise as the pipeline in float32 does. `size` is that of
the transformer's weights over float32's. `forward` is the relative error (2-norm) of one forward on that noise, the
worst of the timesteps 0.1, 0.5 and 0.9. `picture` is the root-mean-square difference of a picture's pixels in [0, 1]:
the median, and the worst. Needs torchao: `pip install -e '.[quantization]'`.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from diffusers import TorchAoConfig

from diffusers_prx import PRXTransformer2DModel
from diffusers_prx.data.scenes import LEVELS, ScenesDataset
from diffusers_prx.evaluation.generation import load_pipeline

NOT_MODULATION = ["modulation", "time_in", "final_layer", "img_in", "txt_in"]


def weights_in_bytes(model: torch.nn.Module) -> int:
    """Of all parameters; those of torchao are made of plain tensors."""
    total = 0
    for parameter in model.parameters():
        parts = [parameter]
        if hasattr(parameter, "__tensor_flatten__"):
            parts = [getattr(parameter, name) for name in parameter.__tensor_flatten__()[0]]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


def quantized(
    model: str, dtype: torch.dtype, config: Any, keep: list[str] | None = None
) -> Callable[[], PRXTransformer2DModel]:
    settings = TorchAoConfig(config, modules_to_not_convert=keep)
    return lambda: PRXTransformer2DModel.from_pretrained(
        model, subfolder="transformer", quantization_config=settings, dtype=dtype
    )


def plain(model: str, dtype: torch.dtype) -> PRXTransformer2DModel:
    return PRXTransformer2DModel.from_pretrained(model, subfolder="transformer", dtype=dtype)


def cast(model: str, dtype: torch.dtype) -> PRXTransformer2DModel:
    transformer = plain(model, dtype)
    transformer.enable_layerwise_casting(torch.float8_e4m3fn, dtype)
    return transformer


def offloaded(model: str) -> PRXTransformer2DModel:
    transformer = plain(model, torch.float32)
    transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    return transformer


def ways(model: str) -> dict[str, Callable[[], PRXTransformer2DModel]]:
    # not above: importing it prints warnings, and `--help` needs none of it
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    found: dict[str, Callable[[], PRXTransformer2DModel]] = {"bf16": lambda: plain(model, torch.bfloat16)}
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bf16")):
        found[f"int8, computed in {name}"] = quantized(model, dtype, Int8WeightOnlyConfig())
        found[f"int8 but for modulation, {name}"] = quantized(model, dtype, Int8WeightOnlyConfig(), NOT_MODULATION)
        found[f"float8, {name}"] = quantized(model, dtype, Float8WeightOnlyConfig())
        found[f"layerwise float8, {name}"] = lambda dtype=dtype: cast(model, dtype)  # type: ignore[misc]
    return found | {"group offloading": lambda: offloaded(model)}


@torch.no_grad()
def predictions(transformer: PRXTransformer2DModel, noise: torch.Tensor, text: dict[str, Any]) -> torch.Tensor:
    """(3, B, C, H, W), at the three timesteps."""
    given = {
        "hidden_states": noise.to(transformer.dtype),
        "encoder_hidden_states": text["prompt_embeds"].to(transformer.dtype),
        "attention_mask": text["prompt_attention_mask"],
    }
    return torch.stack(
        [transformer(timestep=torch.tensor([t]), return_dict=False, **given)[0].float() for t in (0.1, 0.5, 0.9)]
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a saved pipeline of scenes: a folder")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--num_prompts", type=int, default=16)
    parser.add_argument("--num_inference_steps", type=int, default=28)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    args = parser.parse_args(argv)

    pipeline = load_pipeline(args.model)
    pipeline.set_progress_bar_config(disable=True)
    scenes = ScenesDataset("easy", LEVELS["easy"].min_resolution, args.seed, split="heldout", size=args.num_prompts)
    with torch.no_grad():
        encoded = pipeline.encode_prompt([scenes[index]["caption"] for index in range(args.num_prompts)])
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    text = dict(zip(names, encoded))
    side = (pipeline.config["default_sample_size"] or pipeline.default_resolution) // pipeline.vae_scale_factor
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.num_prompts, pipeline.transformer.config["in_channels"], side, side)
    noise = torch.randn(shape, generator=generator) * pipeline.config["noise_scale"]

    def draw() -> torch.Tensor:
        settings = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
        return pipeline(**text, **settings, latents=noise, use_resolution_binning=False, output_type="pt").images

    pictures, predicted = draw(), predictions(pipeline.transformer, noise, text)
    full = weights_in_bytes(pipeline.transformer)
    print("| weights | size | forward | picture, median | worst |\n|---|---|---|---|---|")
    for name, load in ways(args.model).items():
        pipeline.transformer = load()
        difference = predictions(pipeline.transformer, noise, text) - predicted
        error = (difference.flatten(1).norm(dim=1) / predicted.flatten(1).norm(dim=1)).max()
        rms = (draw() - pictures).square().flatten(1).mean(dim=1).sqrt()
        size = weights_in_bytes(pipeline.transformer) / full
        print(f"| {name} | {size:.3f} | {error:.4f} | {rms.median():.4f} | {rms.max():.4f} |", flush=True)


if __name__ == "__main__":
    main()
