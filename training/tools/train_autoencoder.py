"""Train a small autoencoder on the built-in scenes or on your own pictures.

`python training/tools/train_autoencoder.py --kind kl --output_dir outputs/tools/autoencoder_kl`

It replaces the study's autoencoders in runs without the Hub. `kl` is an AutoencoderKL, `dc` an AutoencoderDC, `flux2`
an AutoencoderKLFlux2. `rae` is an AutoencoderRAE whose frozen encoder is a random vision transformer: it has the wide
latents of RAE, but not the representations of a trained encoder. `--dataset_name` accepts the same values as in
training. The loss is L1 plus MSE, and a small KL divergence if the codes have a distribution. `--perceptual_network`
adds the features of a frozen vision network (1 minus their cosine). Afterwards, the mean and standard deviation of the
latents are measured and stored where each class keeps them, so that latents have a standard deviation of 1:
`scaling_factor` and `shift_factor` (kl), `scaling_factor` (dc, which has no shift), batch-norm statistics of every
patchified channel (flux2), statistics of every channel (rae).

`--align_to TEACHER` is a stand-in for the VAEs of REPA-E (arXiv 2504.10483), not REPA-E. There the alignment loss of a
diffusion transformer tunes the VAE through the transformer, end to end. This tool trains no transformer: it aligns
a linear projection of the latents with the teacher's patch features, and discards the projection afterwards. Whether
this has REPA-E's effect was not measured.

The folder holds the autoencoder in diffusers' format, and training.json with the settings and the statistics. It also
holds the PSNR on held-out and novel scenes, or on `--eval_splits` of your data, which is printed as well. The same
seed gives the same weights on the same machine with the same number of threads.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderRAE
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from diffusers_prx.cli import exit_with_error, parse_flags, path
from diffusers_prx.data.samples import fit_image
from diffusers_prx.data.scenes import LEVELS, ScenesDataset
from diffusers_prx.data.sources import ListedImages, load_source
from diffusers_prx.files import expand_path
from diffusers_prx.latents import VAE, EncodedImages, decode, encode, latent_channels, vae_scale_factor
from diffusers_prx.techniques.alignment import alignment_loss, teacher_features
from diffusers_prx.techniques.losses import dino_perceptual_loss
from diffusers_prx.techniques.teachers import VisionTeacher, load_teacher
from diffusers_prx.training.export import commit_of_this_package

KINDS = ("kl", "dc", "flux2", "rae")
RAE_HEAD, RAE_PATCH, RAE_LAYERS = 64, 14, 2  # head width and patch of its encoder; layers of encoder and decoder
FLUX2_PATCH = 2
NORM_GROUPS = 8
KL_WEIGHT, ALIGN_WEIGHT, PERCEPTUAL_WEIGHT, PERCEPTUAL_SIZE = 1e-4, 0.5, 0.1, 128
SCENES_SPLITS = ("heldout", "novel")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the flags. Weights of losses that are switched off become 0."""
    parser = build_parser()
    args = parse_flags(parser, argv)
    if args.latent_channels is None:
        args.latent_channels = RAE_HEAD if args.kind == "rae" else 4
    if problem := find_problem(args):
        parser.error(problem)
    for name, default, works, needs in (
        ("kl_weight", KL_WEIGHT, args.kind in ("kl", "flux2"), "--kind kl or flux2: other codes have no distribution"),
        ("align_weight", ALIGN_WEIGHT, args.align_to is not None, "--align_to"),
        ("perceptual_weight", PERCEPTUAL_WEIGHT, args.perceptual_network is not None, "--perceptual_network"),
        ("perceptual_size", PERCEPTUAL_SIZE, args.perceptual_network is not None, "--perceptual_network"),
    ):
        given = getattr(args, name)
        if given is None:
            setattr(args, name, default if works else 0)
        elif not works:
            parser.error(f"--{name} needs {needs}")
        elif not given >= 0:
            parser.error(f"--{name} must be at least 0, got {given}")
    return args


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=path, required=True, help="Folder of the autoencoder.")
    add("--kind", choices=KINDS, required=True, help="Class of the autoencoder.")
    add("--downsample", type=int, default=4, help="Pixels per latent along a side, a power of 2.")
    add(
        "--latent_channels",
        type=int,
        help=f"Channels of the codes; the latents of flux2 have four times as many. Default: 4; rae: {RAE_HEAD}.",
    )
    add("--base_channels", type=int, default=16, help="Width at full resolution; doubled twice below.")
    layers = "Layers of every level, or for dc of each; 0 at the first level of dc saves the full resolution."
    add("--layers_per_block", type=int, nargs="+", default=[1], help=layers)
    add("--kl_weight", type=float, help=f"Weight of the mean KL of a code (kl, flux2); default: {KL_WEIGHT}.")
    add("--align_to", type=expand_path, help="Vision teacher (folder or Hub id) to align the latents with.")
    add("--align_weight", type=float, help=f"Weight of 1 - cosine, with --align_to; default: {ALIGN_WEIGHT}.")
    add(
        "--perceptual_network", type=expand_path, help="Vision network (folder or Hub id) whose features are compared."
    )
    weight = f"Weight of 1 - cosine, with --perceptual_network; default: {PERCEPTUAL_WEIGHT}."
    add("--perceptual_weight", type=float, help=weight)
    add("--perceptual_size", type=int, help=f"Side in pixels that this network sees; default: {PERCEPTUAL_SIZE}.")
    add("--dataset_name", type=expand_path, default="scenes", help="Data, as in training; default: scenes.")
    add("--dataset_split", default="train", help="Split of the data to train on.")
    add("--image_column", default="image", help="Column of the data that holds the images.")
    splits = "Splits of the data for the PSNR; default: the trained one. Not for scenes."
    add("--eval_splits", nargs="+", help=splits)
    add("--level", choices=list(LEVELS), default="easy", help="Level of the scenes.")
    add("--resolution", type=int, default=32, help="Side of the pictures in pixels; scenes have 32 to 256.")
    add("--steps", type=int, default=2000)
    add("--batch_size", type=int, default=8)
    add("--learning_rate", type=float, default=2e-3, help="Highest learning rate of the cosine.")
    add("--num_eval", type=int, default=512, help="Pictures of each split for the PSNR, and for the statistics.")
    add("--mixed_precision", choices=["no", "bf16"], default="no", help="Type of the computation.")
    add("--seed", type=int, default=0, help="Seed of the weights, the order of the data and the noise.")
    add("--threads", type=int, help="CPU threads; default: PyTorch's.")
    return parser


def find_problem(args: argparse.Namespace) -> str | None:
    """Return what is wrong with the flags, or None."""
    for name in ("latent_channels", "steps", "batch_size", "num_eval", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            return f"--{name} must be at least 1, got {getattr(args, name)}"
    if not args.learning_rate > 0:
        return f"--learning_rate must be positive, got {args.learning_rate}"
    if args.dataset_name == "scenes":
        if args.eval_splits:
            return f"--eval_splits is for --dataset_name; scenes have {' and '.join(SCENES_SPLITS)}"
        try:
            ScenesDataset(args.level, args.resolution)
        except ValueError as error:
            return str(error)
    if args.downsample < 2 or args.downsample.bit_count() != 1 or args.resolution % args.downsample:
        return f"--downsample must be a power of 2 that divides --resolution {args.resolution}, got {args.downsample}"
    if args.base_channels < 1 or args.base_channels % NORM_GROUPS:
        return f"--base_channels must be a multiple of {NORM_GROUPS}, got {args.base_channels}"
    levels, layers = len(block_channels(args)), args.layers_per_block
    lengths = (1, levels) if args.kind == "dc" else (1,)
    if len(layers) not in lengths or min(layers[1:] or layers) < 1 or layers[0] < 0:
        return (
            f"--layers_per_block must be at least 1 for every level (dc: one number or {levels}, of which the first "
            f"may be 0), got {' '.join(map(str, layers))}"
        )
    if args.kind == "rae" and args.latent_channels % RAE_HEAD:
        return f"--latent_channels of rae must be a multiple of {RAE_HEAD}, got {args.latent_channels}"
    width = block_channels(args)[-1]
    if args.kind == "dc" and width % args.latent_channels:
        return f"--latent_channels must divide the deepest width {width} of dc, got {args.latent_channels}"
    return None


def block_channels(args: argparse.Namespace) -> tuple[int, ...]:
    """Return the widths at full resolution, half of it, and so on; flux2 does the last halving by patchifying."""
    halvings = int(math.log2(args.downsample // (FLUX2_PATCH if args.kind == "flux2" else 1)))
    return tuple(args.base_channels * 2 ** min(i, 2) for i in range(halvings + 1))


def build_vae(args: argparse.Namespace) -> VAE:
    """Build a new autoencoder with scale 1 and shift 0."""
    if args.kind == "rae":
        width = RAE_HEAD * -(-args.base_channels // 8)
        return AutoencoderRAE(
            encoder_hidden_size=args.latent_channels,
            encoder_patch_size=RAE_PATCH,
            encoder_num_hidden_layers=RAE_LAYERS,
            encoder_input_size=RAE_PATCH * (args.resolution // args.downsample),
            decoder_hidden_size=width,
            decoder_num_hidden_layers=RAE_LAYERS,
            decoder_num_attention_heads=width // RAE_HEAD,
            decoder_intermediate_size=2 * width,
            patch_size=args.downsample,
            latents_mean=torch.zeros(args.latent_channels, 1, 1),
            latents_std=torch.ones(args.latent_channels, 1, 1),
        )
    channels = block_channels(args)
    levels = len(channels)
    if args.kind == "dc":
        layers = tuple(args.layers_per_block * (1 if len(args.layers_per_block) == levels else levels))
        no_attention = ((),) * levels
        return AutoencoderDC(
            latent_channels=args.latent_channels,
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            encoder_layers_per_block=layers,
            decoder_layers_per_block=layers,
            encoder_qkv_multiscales=no_attention,
            decoder_qkv_multiscales=no_attention,
            scaling_factor=1.0,
        )
    settings = {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": args.layers_per_block[0],
        "latent_channels": args.latent_channels,
        "norm_num_groups": NORM_GROUPS,
        "sample_size": args.resolution,
    }
    if args.kind == "kl":
        return AutoencoderKL(**settings, scaling_factor=1.0, shift_factor=0.0)
    return AutoencoderKLFlux2(**settings, patch_size=(FLUX2_PATCH, FLUX2_PATCH))


class Pictures(Dataset):
    """Pictures of a source at given indices, cut to squares: uint8 (3, H, W)."""

    def __init__(self, source: ListedImages, indices: Sequence[int], resolution: int):
        self.source, self.indices, self.size = source, indices, (resolution, resolution)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> torch.Tensor:
        image: PIL.Image.Image = self.source[self.indices[place]]["image"]
        fitted = fit_image(image, self.size, center_crop=True, random_flip=False, rng=random.Random(0))
        return torch.from_numpy(np.array(fitted, dtype=np.uint8)).permute(2, 0, 1)  # (3, H, W)


def open_split(args: argparse.Namespace, split: str, size: int) -> ListedImages:
    """Open a split of the data; scenes have `size` pictures, stored data as many as they have."""
    scenes = {"level": args.level, "resolution": args.resolution, "seed": args.seed, "split": split, "size": size}
    if args.dataset_name == "scenes":
        return load_source("scenes", caption_columns=("long",), scenes=scenes)
    return load_source(args.dataset_name, split=split, image_column=args.image_column, instance_prompt="unused")


def training_batches(args: argparse.Namespace) -> DataLoader:
    """Load the pictures to learn from, in batches: uint8 (B, 3, H, W). Stored data are shuffled in every epoch."""
    count = args.steps * args.batch_size
    source = open_split(args, args.dataset_split, count)
    indices: list[int] = []
    while len(indices) < count:
        epoch = range(len(source))
        if args.dataset_name != "scenes":
            generator = torch.Generator().manual_seed(args.seed + len(indices))
            epoch = torch.randperm(len(source), generator=generator).tolist()
        indices += epoch
    return DataLoader(Pictures(source, indices[:count], args.resolution), args.batch_size)


def first_batches(args: argparse.Namespace, split: str, start: int = 0) -> DataLoader:
    """Load `num_eval` pictures of a split, in batches: uint8 (B, 3, H, W).

    Args:
        args: arguments of the script.
        split: split of the data.
        start: first scene; of stored data the pictures are evenly spread over the split.
    """
    source = open_split(args, split, start + args.num_eval)
    indices = range(start, start + args.num_eval)
    if args.dataset_name != "scenes":
        indices = range(0, len(source), max(1, len(source) // args.num_eval))[: args.num_eval]
    return DataLoader(Pictures(source, indices, args.resolution), args.batch_size)


def to_pm1(pixels_uint8: torch.Tensor) -> torch.Tensor:
    return pixels_uint8.float() / 127.5 - 1


def kl_divergence(codes: EncodedImages) -> torch.Tensor:
    """Return the mean KL divergence of the codes from the standard normal; 0 for codes without a distribution."""
    if codes.std is None:
        return codes.mean.new_zeros(())
    return 0.5 * (codes.mean**2 + codes.std**2 - 1 - 2 * codes.std.log()).mean()


def latent_alignment(
    projector: nn.Module, teacher: VisionTeacher, latents: torch.Tensor, pixels_uint8: torch.Tensor
) -> torch.Tensor:
    """Return 1 - cosine of the projected latents (B, C, h, w) and the teacher's features on their grid, a scalar."""
    rows, columns = latents.shape[-2:]
    projected = projector(latents.flatten(2).transpose(1, 2))  # (B, h * w, E)
    return alignment_loss(projected, teacher_features(teacher, pixels_uint8, (rows, columns)), None).mean()


def train(
    vae: VAE,
    teacher: VisionTeacher | None,
    projector: nn.Module | None,
    perceptual: VisionTeacher | None,
    args: argparse.Namespace,
) -> None:
    parameters = [*vae.parameters(), *(projector.parameters() if projector else ())]
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(50, args.steps // 10), args.steps)
    progress = tqdm(training_batches(args), desc="steps", disable=None)
    for pixels_uint8 in progress:
        pixels_uint8 = pixels_uint8.to(vae.device)
        pixels_pm1 = to_pm1(pixels_uint8)  # (B, 3, H, W)
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            codes = encode(vae, pixels_pm1)
            latents = codes.draw(torch.randn_like(codes.mean))  # (B, C, h, w)
            images = decode(vae, latents).float()  # (B, 3, H, W)
            losses = {"reconstruction": F.l1_loss(images, pixels_pm1) + F.mse_loss(images, pixels_pm1)}
            if args.kl_weight:
                losses["kl"] = args.kl_weight * kl_divergence(codes)
            if teacher is not None and projector is not None:
                losses["alignment"] = args.align_weight * latent_alignment(projector, teacher, latents, pixels_uint8)
            if perceptual is not None:
                distance = dino_perceptual_loss(perceptual, images, pixels_pm1, args.perceptual_size).mean()
                losses["perceptual"] = args.perceptual_weight * distance
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix({name: f"{value.item():.4f}" for name, value in losses.items()})


@torch.no_grad()
def normalize_latents(vae: VAE, args: argparse.Namespace) -> dict[str, float]:
    """Measure the latents on scenes after the trained ones, or on the trained data, and store the scale and the shift
    that make them standard.

    A transformer is trained on drawn latents, so their variance counts: the variance of the means plus the mean of
    the variances.
    """
    count = 0
    total = squares = torch.zeros((), dtype=torch.float64, device=vae.device)
    start = args.steps * args.batch_size
    for pixels_uint8 in first_batches(args, args.dataset_split, start):
        codes = encode(vae, to_pm1(pixels_uint8.to(vae.device)))
        means = codes.mean.double()
        variances = torch.zeros_like(means) if codes.std is None else codes.std.double() ** 2
        count += means[:, 0].numel()
        total = total + means.sum(dim=(0, 2, 3))  # (C,)
        squares = squares + (means**2 + variances).sum(dim=(0, 2, 3))  # (C,)
    channel_mean, channel_square = total / count, squares / count  # (C,)
    mean = channel_mean.mean().item()
    std = (channel_square.mean().item() - mean**2) ** 0.5
    if isinstance(vae, AutoencoderKLFlux2):
        # until here its statistics were 0 and 1, so that `encode` has divided by sqrt(1 + eps)
        divided = 1 + vae.config["batch_norm_eps"]
        vae.bn.running_mean.copy_(channel_mean * divided**0.5)
        vae.bn.running_var.copy_((channel_square - channel_mean**2) * divided)
    elif isinstance(vae, AutoencoderRAE):
        statistics = {"latents_mean": channel_mean, "latents_std": (channel_square - channel_mean**2).sqrt()}
        for name, value in statistics.items():
            getattr(vae, f"_{name}").copy_(value[:, None, None])  # (C, 1, 1)
            vae.register_to_config(**{name: value[:, None, None].tolist()})
    elif isinstance(vae, AutoencoderKL):
        vae.register_to_config(scaling_factor=1 / std, shift_factor=mean)
    else:
        vae.register_to_config(scaling_factor=1 / std)
    return {"codes_mean": mean, "codes_std": std}


@torch.no_grad()
def mean_psnr(vae: VAE, args: argparse.Namespace, split: str) -> float:
    """Return the peak signal-to-noise ratio in dB of images decoded from the mean latents, averaged over images."""
    values = []
    for pixels_uint8 in first_batches(args, split):
        pixels_pm1 = to_pm1(pixels_uint8.to(vae.device))
        images = decode(vae, encode(vae, pixels_pm1).mean).clamp(-1, 1)  # (B, 3, H, W)
        error = (images - pixels_pm1).double().square().mean(dim=(1, 2, 3))  # (B,)
        values.append(10 * torch.log10(2**2 / error))  # the range of the pixels is 2
    return torch.cat(values).mean().item()


@torch.no_grad()
def mean_alignment(
    vae: VAE, teacher: VisionTeacher, projector: nn.Module, args: argparse.Namespace, split: str
) -> float:
    """Measure the cosine on a split, of codes as they were in training: before `normalize_latents`."""
    losses = []
    for pixels_uint8 in first_batches(args, split):
        pixels_uint8 = pixels_uint8.to(vae.device)
        latents = encode(vae, to_pm1(pixels_uint8)).mean  # (B, C, h, w)
        losses.append((len(latents), latent_alignment(projector, teacher, latents, pixels_uint8).item()))
    return 1 - sum(size * loss for size, loss in losses) / sum(size for size, _ in losses)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        teacher = load_teacher(args.align_to).to(device) if args.align_to is not None else None
        perceptual = load_teacher(args.perceptual_network).to(device) if args.perceptual_network is not None else None
    except ValueError as error:
        exit_with_error(error)
    torch.manual_seed(args.seed)
    vae = build_vae(args).to(device)
    assert vae_scale_factor(vae) == args.downsample
    projector = nn.Linear(latent_channels(vae), teacher.hidden_size).to(device) if teacher is not None else None

    splits = SCENES_SPLITS if args.dataset_name == "scenes" else args.eval_splits or [args.dataset_split]
    start = time.perf_counter()
    try:
        for split in splits:  # fail before the training if a split is missing
            open_split(args, split, args.num_eval)
        train(vae, teacher, projector, perceptual, args)
    except ValueError as error:  # data that cannot be read, a size that the network does not take
        exit_with_error(error)
    seconds = time.perf_counter() - start
    vae.eval()
    measured: dict[str, Any] = {}
    if teacher is not None and projector is not None:
        measured["alignment_cosine"] = mean_alignment(vae, teacher, projector, args, splits[0])
    measured.update(normalize_latents(vae, args))
    measured["psnr"] = {split: mean_psnr(vae, args, split) for split in splits}
    measured["steps_per_second"] = round(args.steps / seconds, 2)

    vae.save_pretrained(args.output_dir)
    report = {
        **measured,
        "seconds": round(seconds, 1),
        "commit": commit_of_this_package(),
        "settings": vars(args) | {"output_dir": str(args.output_dir)},
    }
    (args.output_dir / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
