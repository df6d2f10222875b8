"""Conversion of original checkpoints, compared with an independent implementation of the original.

`OriginalPRX` has the original's names and arithmetic in float32, written step by step. It shares no code with the
package. A converted checkpoint of it must give the same predictions.
"""

import json
import math
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import tiny
import zoo
from diffusers_prx import PRXTransformer2DModel
from diffusers_prx.checkpoint_files import list_tensors
from diffusers_prx.convert import convert_transformer, find_network, main, original_tensors, read_config
from diffusers_prx.models.token_routing import TokenRoute
from diffusers_prx.pipelines import PRXPipeline, PRXPixelPipeline

HIDDEN, HEADS, DEPTH, MLP, HEIGHT, WIDTH, TOKENS = 32, 2, 4, 72, 8, 12, 5

# --- the original


def waves(values: torch.Tensor, size: int, factor: float) -> torch.Tensor:
    """Return cosines, then sines, of decreasing frequencies, (B,) -> (B, size), with the original's rounding."""
    frequencies = (torch.arange(size // 2) * -math.log(10_000) / (size // 2)).exp()
    angles = factor * values.float().reshape(-1, 1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def normalize(x: torch.Tensor) -> torch.Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()


class Scale(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.scale * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


class TwoLayers(nn.Module):
    def __init__(self, size, hidden):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(size, hidden), nn.Linear(hidden, hidden)

    def forward(self, x):
        x = self.in_layer(x)
        return self.out_layer(x * torch.sigmoid(x))


class OriginalBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.img_qkv_proj = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.txt_kv_proj = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
        self.attn_out = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.qk_norm = nn.ModuleDict({"query_norm": Scale(HIDDEN // HEADS), "key_norm": Scale(HIDDEN // HEADS)})
        self.k_norm = Scale(HIDDEN // HEADS)
        self.gate_proj = nn.Linear(HIDDEN, MLP, bias=False)
        self.up_proj = nn.Linear(HIDDEN, MLP, bias=False)
        self.down_proj = nn.Linear(MLP, HIDDEN, bias=False)
        self.modulation = nn.ModuleDict({"lin": nn.Linear(HIDDEN, 6 * HIDDEN)})

    def forward(self, img, txt, vec, places, mask):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (
            part[:, None] for part in self.modulation["lin"](vec * torch.sigmoid(vec)).split(HIDDEN, dim=1)
        )
        x = normalize(img) * (1 + scale) + shift
        query, key, value = (self.heads(part) for part in self.img_qkv_proj(x).split(HIDDEN, dim=2))
        text_key, text_value = (self.heads(part) for part in self.txt_kv_proj(txt).split(HIDDEN, dim=2))
        query, key = rotate(self.qk_norm["query_norm"](query), places), rotate(self.qk_norm["key_norm"](key), places)
        key = torch.cat((self.k_norm(text_key), key), dim=2)
        value = torch.cat((text_value, value), dim=2)
        logits = torch.einsum("bhqd,bhkd->bhqk", query, key) / math.sqrt(HIDDEN // HEADS)
        seen = torch.cat((mask, torch.ones(len(img), img.shape[1], dtype=torch.bool)), dim=1)
        weights = logits.masked_fill(~seen[:, None, None, :], -1e30).softmax(dim=-1)
        x = torch.einsum("bhqk,bhkd->bqhd", weights, value).reshape(img.shape)
        img = img + gate * self.attn_out(x)
        x = normalize(img) * (1 + scale_mlp) + shift_mlp
        gated = self.gate_proj(x)
        gated = 0.5 * gated * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gated + 0.044715 * gated**3)))
        return img + gate_mlp * self.down_proj(gated * self.up_proj(x))

    @staticmethod
    def heads(x):
        return torch.stack(x.split(HIDDEN // HEADS, dim=2), dim=1)  # (B, h, N, d)


def rotate(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rotate x (B, h, N, d) by row (first half of the features) and column of each token, `places` (B, N, 2)."""
    out = torch.empty_like(x)
    half = x.shape[-1] // 2
    for axis in range(2):
        for pair in range(half // 2):
            angle = places[..., axis].double() * 10_000 ** (-2 * pair / half)  # (B, N)
            cos, sin = angle.cos().float()[:, None], angle.sin().float()[:, None]
            a, b = axis * half + 2 * pair, axis * half + 2 * pair + 1
            out[..., a] = cos * x[..., a] - sin * x[..., b]
            out[..., b] = sin * x[..., a] + cos * x[..., b]
    return out


class OriginalPRX(nn.Module):
    """The network; `sprint` is the original's (route_start, route_end), both inclusive."""

    def __init__(self, channels=4, patch=2, bottleneck=None, sprint=None):
        super().__init__()
        self.channels, self.patch, self.sprint = channels, patch, sprint
        size = channels * patch**2
        self.img_in = nn.Linear(size, HIDDEN)
        if bottleneck is not None:
            self.img_in = nn.Sequential(nn.Linear(size, bottleneck), nn.Linear(bottleneck, HIDDEN))
        self.time_in = TwoLayers(256, HIDDEN)
        self.txt_in = nn.Linear(tiny.TEXT_WIDTH, HIDDEN)
        self.blocks = nn.ModuleList([OriginalBlock() for _ in range(DEPTH)])
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(HIDDEN, 2 * HIDDEN))
        self.final_layer = nn.ModuleDict({"linear": nn.Linear(HIDDEN, size), "adaLN_modulation": modulation})
        if sprint is not None:
            self.sprint_fuse = nn.Linear(2 * HIDDEN, HIDDEN)
            self.sprint_mask_token = nn.Parameter(torch.zeros(1, 1, HIDDEN))

    def forward(self, image, t, text, mask, resolution=None, visible=None):
        batch, _, height, width = image.shape
        p = self.patch
        patches = nn.functional.unfold(image, p, stride=p).transpose(1, 2)  # (B, N, C * p * p), row after row
        img, txt = self.img_in(patches), self.txt_in(text)
        places = torch.tensor([[row, column] for row in range(height // p) for column in range(width // p)])
        places = all_places = places.expand(batch, -1, -1)
        vec = self.time_in(waves(t, 256, 1000.0))
        if resolution is not None and resolution.mode == "vec":
            vec = vec + resolution(height, width)
        if resolution is not None and resolution.mode == "token":
            txt = torch.cat((resolution(height, width).expand(batch, 2, -1), txt), dim=1)
            mask = torch.cat((torch.ones(batch, 2, dtype=torch.bool), mask), dim=1)
        for number, block in enumerate(self.blocks):
            if self.sprint is not None and number == self.sprint[0]:
                dense = img
                if visible is not None:
                    img = torch.stack([row[kept] for row, kept in zip(img, visible)])
                    places = torch.stack([row[kept] for row, kept in zip(all_places, visible)])
            img = block(img, txt, vec, places, mask)
            if self.sprint is not None and number == self.sprint[1]:
                deep = img
                if visible is not None:
                    deep = self.sprint_mask_token.expand(dense.shape).clone()
                    for row, (kept, tokens) in enumerate(zip(visible, img)):
                        deep[row, kept] = tokens
                img, places = self.sprint_fuse(torch.cat((dense, deep), dim=2)), all_places
        shift, scale = self.final_layer["adaLN_modulation"](vec)[:, None].split(HIDDEN, dim=2)
        patches = self.final_layer["linear"](normalize(img) * (1 + scale) + shift)
        return nn.functional.fold(patches.transpose(1, 2), (height, width), p, stride=p)


class OriginalResolution(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.mode = mode
        if mode == "vec":
            self.mlp = TwoLayers(256, HIDDEN)
        else:
            self.h_embedder, self.w_embedder = TwoLayers(128, HIDDEN), TwoLayers(128, HIDDEN)

    def forward(self, height, width):
        rows, columns = waves(torch.tensor([height]), 128, 1.0), waves(torch.tensor([width]), 128, 1.0)
        if self.mode == "vec":
            return self.mlp(torch.cat((rows, columns), dim=1))
        return torch.stack((self.h_embedder(rows), self.w_embedder(columns)), dim=1)


class Averaged(nn.Module):
    def __init__(self, model, active=True):
        super().__init__()
        self.register_buffer("_is_active", torch.tensor(active))
        self.model = model


class Run(nn.Module):
    """The modules of an original run: network, moving average, resolution embedder and projector."""

    def __init__(self, resolution=None, active=True, **changes):
        super().__init__()
        self.denoiser = OriginalPRX(**changes)
        self.ema_denoiser = Averaged(OriginalPRX(**changes), active)
        self.repa_loss = nn.ModuleDict({"projector": nn.Linear(HIDDEN, HIDDEN)})
        if resolution is not None:
            self.resolution_embedder = OriginalResolution(resolution)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                center = 1.0 if name.endswith(".scale") else 0.0
                size = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
                parameter.copy_(center + size * torch.randn(parameter.shape, generator=generator))

    def predict(self, network, **changes):
        with torch.no_grad():
            return network(
                **inputs(network.channels), resolution=getattr(self, "resolution_embedder", None), **changes
            )

    def checkpoint(self) -> dict:
        """Return the nested dictionary that the trainer saves."""
        moments = {name: {"step": torch.tensor(3.0), "exp_avg": p.detach()} for name, p in self.named_parameters()}
        return {"state": {"model": self.state_dict(), "optimizers": {"AdamW": {"state": moments}}, "run_name": "a"}}


def inputs(channels=4):
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[1, 3:] = False
    return {
        "image": torch.randn(2, channels, HEIGHT, WIDTH, generator=generator),
        # powers of two, for which (1000 t) w of the original and 1000 (t w) of diffusers round equally; otherwise
        # angles of up to 1000 differ by 1e-4 and predictions by 1e-5
        "t": torch.tensor([0.25, 0.5]),
        "text": torch.randn(2, TOKENS, tiny.TEXT_WIDTH, generator=generator),
        "mask": mask,
    }


def converted_prediction(transformer, **changes):
    given = inputs(transformer.config["in_channels"])
    with torch.no_grad():
        return transformer(given["image"], given["t"], given["text"], given["mask"], **changes).sample


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def save_run(run: Run, folder: Path, form: str) -> Path:
    """Save the checkpoint in one of the supported formats."""
    if form == "folder":
        dcp.save(run.checkpoint(), checkpoint_id=folder / "folder", no_dist=True)
        return folder / "folder"
    if form == "nested.pt":
        state = run.checkpoint() | {"rng": [{"numpy": np.random.get_state(), "torch": torch.get_rng_state()}]}  # noqa: NPY002
        torch.save(state, folder / form)
    elif form == "old.pt":  # before torch 1.6
        torch.save({"state_dict": run.state_dict()}, folder / form, _use_new_zipfile_serialization=False)
    elif form == "flat.safetensors":
        save_file({f"state.model.{name}": tensor for name, tensor in run.state_dict().items()}, folder / form)
    else:  # only the network
        save_file(run.denoiser.state_dict(), folder / form)
    return folder / form


VARIANTS = {
    "plain": ({}, {}),
    "bottleneck": ({"channels": 3, "patch": 4, "bottleneck": 6}, {}),
    "resolution": ({"resolution": "vec"}, {}),
    "size_tokens": ({"resolution": "token"}, {}),
    "sprint": ({"sprint": (1, 2)}, {"fusion_range": (1, 3)}),
}
TOLERANCE = 2e-6  # relative, float32; measured: 2e-7 to 5e-7


# --- equal predictions


FORMS = ["nested.pt", "flat.safetensors"]


@pytest.mark.parametrize(
    ("variant", "form"), [*((variant, "folder") for variant in VARIANTS), *(("resolution", form) for form in FORMS)]
)
def test_converted_networks_predict_like_the_original(variant, form, tmp_path):
    settings, given = VARIANTS[variant]
    run = Run(**settings)
    path = save_run(run, tmp_path, form)
    for ema in (False, True):
        network = run.ema_denoiser.model if ema else run.denoiser
        transformer = convert_transformer(path, ema, in_channels=settings.get("channels", 4), **given)
        assert difference(converted_prediction(transformer), run.predict(network)) < TOLERANCE
    assert difference(run.predict(run.ema_denoiser.model), run.predict(run.denoiser)) > 0.1


@pytest.mark.parametrize("form", ["old.pt", "alone.safetensors"])
def test_old_files_and_networks_alone_are_read(form, tmp_path):
    run = Run()
    transformer = convert_transformer(save_run(run, tmp_path, form), in_channels=4)
    assert difference(converted_prediction(transformer), run.predict(run.denoiser)) < TOLERANCE


def test_mask_token_of_sprint_is_converted(tmp_path):
    run = Run(sprint=(1, 2))
    transformer = convert_transformer(save_run(run, tmp_path, "folder"), in_channels=4, fusion_range=(1, 3))
    visible = torch.tensor([[0, 3, 4, 20], [1, 2, 8, 23]])
    ours = converted_prediction(transformer, route=TokenRoute(1, 3, visible))
    assert difference(ours, run.predict(run.denoiser, visible=visible)) < TOLERANCE


def test_every_tensor_affects_the_prediction():
    """A change of any tensor changes the prediction by far more than the tolerance."""
    added = ("denoiser.img_in", "resolution_embedder", "denoiser.sprint")
    for settings, _ in VARIANTS.values():
        run = Run(**settings)
        changes = {"visible": torch.tensor([[0, 3], [1, 2]])} if run.denoiser.sprint else {}
        before = run.predict(run.denoiser, **changes)
        for name, parameter in run.named_parameters():
            if name.startswith(("ema_denoiser", "repa_loss")) or (settings and not name.startswith(added)):
                continue
            kept = parameter.detach().clone()
            with torch.no_grad():
                parameter.copy_(kept.flip(0) + 0.1)
            assert difference(run.predict(run.denoiser, **changes), before) > 100 * TOLERANCE, name
            with torch.no_grad():
                parameter.copy_(kept)


def test_later_names_of_norms(tmp_path):
    run = Run()
    state = {re.sub(r"\.scale$", ".weight", name): tensor for name, tensor in run.denoiser.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    transformer = convert_transformer(tmp_path / "a.safetensors", in_channels=4)
    assert difference(converted_prediction(transformer), run.predict(run.denoiser)) < TOLERANCE


def test_resolution_embedder_inside_the_network(tmp_path):
    """The released pixel model has it there, with a moving average."""
    run = Run(resolution="vec")
    state = run.state_dict()
    for name in [name for name in state if name.startswith("resolution_embedder.")]:
        tensor = state.pop(name)
        state |= {f"denoiser.{name}": tensor, f"ema_denoiser.model.{name}": -tensor}
    torch.save(state, tmp_path / "a.pt")
    plain = convert_transformer(tmp_path / "a.pt", in_channels=4)
    averaged = convert_transformer(tmp_path / "a.pt", ema=True, in_channels=4)
    assert difference(converted_prediction(plain), run.predict(run.denoiser)) < TOLERANCE
    bias = run.resolution_embedder.mlp.out_layer.bias
    assert torch.equal(averaged.resolution_embedder.mlp.out_layer.bias, -bias)


# --- the way back


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_way_back_is_equal_to_the_bit(variant, tmp_path):
    """Original to ours to original, and ours to original to ours."""
    settings, given = VARIANTS[variant]
    run = Run(**settings).to(torch.bfloat16 if variant == "plain" else torch.float32)
    flags = [word for key, value in given.items() for word in (f"--{key}", *map(str, value))]
    path = save_run(run, tmp_path, "nested.pt")
    convert(path, tmp_path / "ours", "--transformer_only", "--in_channels", run.denoiser.channels, *flags)
    convert(tmp_path / "ours", tmp_path / "back", "--to", "original")
    written = load_file(tmp_path / "back" / "denoiser.safetensors")
    expected = dict(run.denoiser.state_dict())
    if variant in ("resolution", "size_tokens"):
        expected |= {f"resolution_embedder.{key}": v for key, v in run.resolution_embedder.state_dict().items()}
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor), name
    dtype = written["txt_in.weight"].dtype
    ours = PRXTransformer2DModel.from_pretrained(tmp_path / "ours", torch_dtype=dtype)
    # the configuration is in the file
    again = PRXTransformer2DModel.from_single_file(tmp_path / "back" / "denoiser.safetensors", torch_dtype=dtype)
    configs = [json.loads(network.to_json_string()) for network in (ours, again)]
    configs = [{key: value for key, value in config.items() if not key.startswith("_")} for config in configs]
    assert configs[0] == configs[1]
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items())


def test_what_the_original_does_not_have_is_refused(tmp_path):
    both = tiny.transformer(resolution_embeds=True, resolution_tokens=True)
    with pytest.raises(ValueError, match="`resolution_embeds` and `resolution_tokens`"):
        original_tensors(both)
    newer = tiny.transformer()
    newer.register_to_config(num_registers=4)
    with pytest.raises(ValueError, match="num_registers"):
        original_tensors(newer)
    tiny.transformer().save_pretrained(tmp_path / "ours")
    with pytest.raises(SystemExit):
        convert(tmp_path / "ours", tmp_path / "out", "--to", "original", "--shift", 2)
    assert not (tmp_path / "out").exists()


# --- configuration and dtype


def test_configurations_of_the_released_models():
    """Shapes of the 1.2B model and the 7B pixel model."""
    common = {"mlp_ratio": 3.5, "num_heads": 28, "resolution_embeds": False, "resolution_tokens": False}
    latent = {"in_channels": 16, "patch_size": 2, "context_in_dim": 2304, "hidden_size": 1792}
    latent |= {"depth": 16, "axes_dim": [32, 32], "bottleneck_size": None}
    assert sizes(1792, 64, 6272, 16, 64, 2304, None, in_channels=16) == common | latent
    pixel = {"in_channels": 3, "patch_size": 16, "context_in_dim": 2048, "hidden_size": 3584}
    pixel |= {"depth": 24, "axes_dim": [64, 64], "bottleneck_size": 768}
    assert sizes(3584, 128, 12544, 24, 768, 2048, 768, in_channels=3) == common | pixel


def sizes(hidden, head, mlp, depth, values, text, bottleneck, **given):
    shapes = {
        "txt_in.weight": (hidden, text),
        "final_layer.linear.weight": (values, hidden),
        "blocks.0.attention.norm_q.weight": (head,),
        **{f"blocks.{number}.gate_proj.weight": (mlp, hidden) for number in range(depth)},
        "img_in.weight" if bottleneck is None else "img_in.0.weight": (bottleneck or hidden, values),
    }
    return read_config(shapes, given)


def test_mlp_ratio_reproduces_every_mlp_size():
    """The model truncates hidden_size * mlp_ratio."""
    for hidden in (32, 48, 96, 1792):
        for mlp in range(hidden, 4 * hidden, 7):
            assert int(hidden * sizes(hidden, 16, mlp, 1, 4, 8, None, patch_size=1)["mlp_ratio"]) == mlp


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"16 x 1\^2, 4 x 2\^2, 1 x 4\^2.*`in_channels` or `patch_size`"),
        ({"in_channels": 3}, "`in_channels` is 3"),
        ({"patch_size": 2, "fusion_range": (1, 3)}, "`fusion_range`"),
        ({"patch_size": 2, "axes_dim": (8, 4)}, "`axes_dim`"),
        ({"patch_size": 2, "axes": (8, 8)}, "axes"),
    ],
)
def test_ambiguous_configurations_are_refused(given, message, tmp_path):
    path = save_run(Run(), tmp_path, "alone.safetensors")
    with pytest.raises((ValueError, TypeError), match=message):
        convert_transformer(path, **given)


def test_sprint_requires_its_range(tmp_path):
    path = save_run(Run(sprint=(1, 2)), tmp_path, "alone.safetensors")
    with pytest.raises(ValueError, match="`fusion_range`"):
        convert_transformer(path, in_channels=4)


def test_dtypes(tmp_path):
    run = Run(sprint=(1, 2))
    given = {"in_channels": 4, "fusion_range": (1, 3)}
    run.denoiser.to(torch.bfloat16)
    path = save_run(run, tmp_path, "nested.pt")
    assert convert_transformer(path, **given).dtype is torch.bfloat16
    widened = convert_transformer(path, dtype=torch.float32, **given)
    for name, tensor in convert_transformer(path, **given).state_dict().items():
        assert tensor.dtype is torch.bfloat16
        assert torch.equal(widened.state_dict()[name], tensor.float())
    run.denoiser.sprint_fuse.float()  # as in the original
    path = save_run(run, tmp_path, "folder")
    with pytest.raises(ValueError, match="`dtype`"):
        convert_transformer(path, **given)
    assert {t.dtype for t in convert_transformer(path, dtype=torch.float16, **given).parameters()} == {torch.float16}
    run.denoiser.txt_in.weight.data = run.denoiser.txt_in.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        convert_transformer(save_run(run, tmp_path, "nested.pt"), dtype=torch.float32, **given)


# --- which network


def test_networks_are_found_by_their_tensors():
    names = {f"{start}{end}" for start in ("a.denoiser.", "a.ema_denoiser.model.") for end in ("txt_in.weight", "b")}
    names |= {"a.optimizers.denoiser.txt_in.weight.exp_avg", "a.denoiser_b"}
    listed = dict.fromkeys(sorted(names))
    assert find_network(listed) == {"b": "a.denoiser.b", "txt_in.weight": "a.denoiser.txt_in.weight"}
    assert find_network(listed, ema=True)["b"] == "a.ema_denoiser.model.b"
    assert find_network(listed, prefix="a.denoiser") == find_network(listed)
    assert find_network({"txt_in.weight": 0, "b": 0}) == {"txt_in.weight": "txt_in.weight", "b": "b"}
    with pytest.raises(ValueError, match=r"`prefix`.*'a.denoiser.', 'teacher.'"):
        find_network(listed | {"teacher.txt_in.weight": None})
    with pytest.raises(ValueError, match=r"`prefix` is 'other'.*'a.denoiser.'"):
        find_network(listed, prefix="other")
    with pytest.raises(ValueError, match="`ema` is True"):
        find_network({"txt_in.weight": 0}, ema=True)
    with pytest.raises(ValueError, match="`ema` is False"):
        find_network({"ema_denoiser.model.txt_in.weight": 0})
    with pytest.raises(ValueError, match=r"2 entries: .'a', 'b'"):
        find_network({"a": 0, "b": 0})
    both_embedders = ["denoiser.resolution_embedder.mlp", "resolution_embedder.mlp"]
    with pytest.raises(ValueError, match="resolution embedders"):
        find_network(dict.fromkeys(["denoiser.txt_in.weight", *both_embedders]))


@pytest.mark.parametrize("form", ["nested.pt", "folder"])
def test_moving_average_that_has_not_begun_is_refused(form, tmp_path):
    path = save_run(Run(active=False), tmp_path, form)
    with pytest.raises(ValueError, match="`ema`"):
        convert_transformer(path, ema=True, in_channels=4)
    convert_transformer(path, in_channels=4)


def test_entries_that_are_left_out_are_counted(tmp_path, capsys):
    run = Run(resolution="vec")
    convert_transformer(save_run(run, tmp_path, "folder"), ema=True, in_channels=4)
    printed = capsys.readouterr().out
    network = len(run.denoiser.state_dict())
    assert f"network: {network + 4} tensors" in printed
    assert f"left out: {network} entries under state.model.denoiser\n" in printed
    assert "left out: 1 entries under state.model.ema_denoiser\n" in printed  # the flag
    assert "left out: 2 entries under state.model.repa_loss\n" in printed
    assert f"left out: {2 * len(list(run.parameters()))} entries under state.optimizers.AdamW\n" in printed
    assert "the resolution embedder has no moving average: using the trained one (4 tensors)" in printed


# --- networks that differ from a PRX


def edited(tmp_path, edit):
    state = dict(Run().denoiser.state_dict())
    edit(state)
    torch.save(state, tmp_path / "edited.pt")
    return tmp_path / "edited.pt"


def test_missing_unknown_and_misshapen_tensors_are_listed(tmp_path):
    def edit(state):
        del state["blocks.1.attn_out.weight"], state["time_in.in_layer.bias"]
        state["blocks.2.extra"] = torch.ones(3)
        state["txt_in.bias"] = torch.ones(HIDDEN + 1)

    with pytest.raises(ValueError, match="differs from a PRX") as caught:
        convert_transformer(edited(tmp_path, edit), in_channels=4)
    assert str(caught.value).splitlines()[1:] == [
        f"  missing: time_in.in_layer.bias [{HIDDEN}]",
        f"  missing: blocks.1.attention.to_out.0.weight [{HIDDEN}, {HIDDEN}]",
        "  unknown: blocks.2.extra [3]",
        f"  txt_in.bias (txt_in.bias) has the shape [{HIDDEN + 1}] instead of [{HIDDEN}]",
    ]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("blocks.1.")], "block 1 is missing"),
        (lambda s: s.update({"blocks.99999999999.a": torch.ones(1)}), "block 4 is missing"),
        (lambda s: s.pop("img_in.weight"), "'img_in.weight'"),
        (lambda s: s.update({"txt_in.weight": torch.ones(3)}), "'txt_in.weight': .3,."),
        (lambda s: s.update({"blocks.0.qk_norm.query_norm.scale": torch.ones(5)}), "hidden size is 32"),
        (lambda s: s.update({"blocks.0.qk_norm.query_norm.weight": torch.ones(16)}), "same tensor"),
        (lambda s: s.update({"txt_in.note": "text"}), "'txt_in.note'"),
        (lambda s: s.update({"sprint_mask_token": torch.ones(HIDDEN)}), "unknown: sprint_mask_token"),
    ],
)
def test_invalid_networks_are_refused(edit, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert_transformer(edited(tmp_path, edit), in_channels=4)


# --- broken and hostile files


@pytest.mark.parametrize("form", ["nested.pt", "old.pt", "flat.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.99])
def test_truncated_files_are_refused(form, share, tmp_path):
    path = save_run(Run(), tmp_path, form)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="`checkpoint_path`"):
        convert_transformer(path, in_channels=4)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("share", [None, 0.1])
def test_broken_folders_are_refused(name, share, tmp_path):
    path = save_run(Run(), tmp_path, "folder")
    data = (path / name).read_bytes()
    (path / name).unlink() if share is None else (path / name).write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"\.metadata|__0_0\.distcp|broken"):
        convert_transformer(path, in_channels=4)


def test_missing_files_and_duplicate_names_are_refused(tmp_path):
    torch.save({"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)}, tmp_path / "twice.pt")
    with pytest.raises(ValueError, match=r"a\.b"):
        list_tensors(tmp_path / "twice.pt")
    with pytest.raises(ValueError, match="`checkpoint_path`"):
        convert_transformer(tmp_path / "none.pt", in_channels=4)
    with pytest.raises(ValueError, match="`checkpoint_path`"):
        convert_transformer(tmp_path, in_channels=4)


class Hostile:
    """Creates a folder when unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_hostile_pickle_runs_without_protection(tmp_path):
    """Otherwise the following tests would prove nothing."""
    pickle.loads(pickle.dumps(Hostile(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


CASES = [("outside the network", False), ("in the network", False), ("alone", False), ("in the network", True)]


@pytest.mark.parametrize(("where", "legacy"), CASES)
def test_code_in_files_does_not_run(where, legacy, tmp_path):
    hostile = Hostile(tmp_path / "ran")
    state = Run().checkpoint()
    if where == "outside the network":
        state["callbacks"] = hostile
    else:
        state["state"]["model"]["denoiser.txt_in.note"] = hostile
    torch.save(hostile if where == "alone" else state, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"posix\.mkdir"):
        convert_transformer(tmp_path / "a.pt", in_channels=4)
    assert not (tmp_path / "ran").exists()


def index_of(path):
    return pickle.loads((path / ".metadata").read_bytes())


def with_index(path, index):
    (path / ".metadata").write_bytes(pickle.dumps(index))
    return path


@pytest.mark.parametrize("where", ["alone", "inside", "method"])
def test_code_in_an_index_does_not_run(where, tmp_path):
    path, hostile = save_run(Run(), tmp_path, "folder"), tmp_path / "ran"
    index = index_of(path)
    if where == "inside":
        index.planner_data["x"] = Hostile(hostile)
    elif where == "alone":
        index = Hostile(hostile)
    with_index(path, index)
    if where == "method":  # a dotted name could lead from an allowed class to any other
        words = "".join(f"\x8c{chr(len(word))}{word}" for word in ("torch", "serialization.os.mkdir"))
        argument = f"\x8c{chr(len(str(hostile)))}{hostile}"
        (path / ".metadata").write_bytes(f"\x80\x04{words}\x93{argument}\x85R.".encode("latin-1"))
    with pytest.raises(ValueError, match=r"posix\.mkdir|torch\.serialization\.os\.mkdir"):
        convert_transformer(path, in_channels=4)
    assert not (tmp_path / "ran").exists()


def test_code_in_the_data_of_a_folder_does_not_run(tmp_path):
    """As a tensor it is refused, and as the bytes of an object it is not read."""
    name, hostile = "state.model.denoiser.txt_in.weight", Hostile(tmp_path / "ran")
    path = save_run(Run(), tmp_path, "folder")
    index = index_of(path)
    torch.save([hostile, torch.zeros(HIDDEN, tiny.TEXT_WIDTH)], path / "hostile.distcp")  # with the expected size
    size = (path / "hostile.distcp").stat().st_size
    index.storage_data = {
        key: _StorageInfo("hostile.distcp", 0, size) if key.fqn == name else info
        for key, info in index.storage_data.items()
    }
    with_index(path, index)
    with pytest.raises(ValueError, match="UnpicklingError"):
        convert_transformer(path, in_channels=4)
    index.state_dict_metadata[name] = BytesStorageMetadata()
    index.storage_data[MetadataIndex(name)] = _StorageInfo("hostile.distcp", 0, size)
    with_index(path, index)
    with pytest.raises(ValueError, match="not tensors"):
        convert_transformer(path, in_channels=4)
    assert not (tmp_path / "ran").exists()


def test_tensor_in_two_files_is_joined(tmp_path):
    """Sharded runs write the rows of each process to a separate file."""
    run, name = Run(), "state.model.denoiser.txt_in.weight"
    path = save_run(run, tmp_path, "folder")
    index, weight = index_of(path), run.denoiser.txt_in.weight.detach()
    index.storage_data = {key: info for key, info in index.storage_data.items() if key.fqn != name}
    chunks = index.state_dict_metadata[name].chunks
    chunks.clear()
    for number, (first, rows) in enumerate(((0, 20), (20, HIDDEN - 20))):
        torch.save(weight[first : first + rows].clone(), path / f"__{number + 1}_0.distcp")
        chunks.append(ChunkStorageMetadata(torch.Size([first, 0]), torch.Size([rows, tiny.TEXT_WIDTH])))
        size = (path / f"__{number + 1}_0.distcp").stat().st_size
        entry = MetadataIndex(name, torch.Size([first, 0]), number)
        index.storage_data[entry] = _StorageInfo(f"__{number + 1}_0.distcp", 0, size)
    transformer = convert_transformer(with_index(path, index), in_channels=4)
    assert torch.equal(transformer.txt_in.weight, weight)
    assert difference(converted_prediction(transformer), run.predict(run.denoiser)) < TOLERANCE
    (path / "__2_0.distcp").unlink()
    with pytest.raises(ValueError, match=r"__2_0\.distcp"):
        convert_transformer(path, in_channels=4)
    chunks.pop()
    with pytest.raises(ValueError, match=name):
        list_tensors(with_index(path, index))


def test_index_cannot_name_files_outside_its_folder(tmp_path):
    path = save_run(Run(), tmp_path, "folder")
    index = index_of(path)
    for name in ("../a.pt", "/etc/passwd", ".."):
        index.storage_data = {key: _StorageInfo(name, 0, 9) for key in index.storage_data}
        with pytest.raises(ValueError, match="inside the folder"):
            list_tensors(with_index(path, index))


def cyclic():
    tree = {}
    tree["state"] = {"model": tree}
    return tree


def nested(depth):
    tree = {}
    for _ in range(depth):
        tree = {"a": tree}
    return tree


def doubled(depth):
    """Return 2**depth entries in a few bytes."""
    tree = {"a": 1, "b": 2}
    for _ in range(depth):
        tree = {"a": tree, "b": tree}
    return tree


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (cyclic(), "contain themselves"),
        (nested(300), "contain themselves"),
        (doubled(40), "1,000,000 entries"),
        ({("a", 1): torch.ones(1)}, "tuple"),
        ([torch.ones(1)], "contains no PRX"),
        (None, "contains no PRX"),
    ],
    ids=["cyclic", "nested", "doubled", "tuple", "list", "none"],
)
def test_absurd_files_are_refused(tree, message, tmp_path):
    torch.save(tree, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        convert_transformer(tmp_path / "a.pt", in_channels=4)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1).expand(HIDDEN, 2**50), r"txt_in.weight .* only 4 bytes"),
        (torch.empty(HIDDEN, tiny.TEXT_WIDTH, device="meta"), "not a plain tensor"),
        (torch.ones(HIDDEN, tiny.TEXT_WIDTH).to_sparse(), "not a plain tensor"),
        (torch.ones(HIDDEN, tiny.TEXT_WIDTH, dtype=torch.int64), "int64"),
        (torch.ones(HIDDEN, tiny.TEXT_WIDTH, dtype=torch.complex64), "complex64"),
        (torch.full((HIDDEN, tiny.TEXT_WIDTH), torch.nan), "NaN or infinite.*txt_in.weight"),
    ],
    ids=["claimed", "meta", "sparse", "int", "complex", "nan"],
)
def test_impossible_tensors_are_refused(tensor, message, tmp_path):
    torch.save(Run().denoiser.state_dict() | {"txt_in.weight": tensor}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        convert_transformer(tmp_path / "a.pt", in_channels=4)


def test_values_outside_the_range_of_a_dtype_are_refused(tmp_path):
    torch.save(Run().denoiser.state_dict() | {"txt_in.bias": torch.full((HIDDEN,), 1e6)}, tmp_path / "a.pt")
    convert_transformer(tmp_path / "a.pt", in_channels=4)
    with pytest.raises(ValueError, match=r"torch\.float16: .*txt_in\.bias"):
        convert_transformer(tmp_path / "a.pt", dtype=torch.float16, in_channels=4)


def test_compressed_files_are_refused(tmp_path):
    path = save_run(Run(), tmp_path, "nested.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(ValueError, match="compressed"):
        convert_transformer(tmp_path / "a.pt", in_channels=4)


def test_absurd_indices_are_refused(tmp_path):
    path, name = save_run(Run(), tmp_path, "folder"), "state.model.denoiser.txt_in.weight"
    whole = (path / ".metadata").read_bytes()
    for size, message in (
        ((2**40, 2**40), "impossible size"),
        ((-1, 5), "impossible size"),
        ((2**30, 2**10), "bytes are stored"),
    ):
        index = index_of(path)
        entry = index.state_dict_metadata[name]
        entry.size = torch.Size(size)
        entry.chunks = [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size(size))]
        with pytest.raises(ValueError, match=message):
            convert_transformer(with_index(path, index), in_channels=4)
        (path / ".metadata").write_bytes(whole)
    for wrong in ({}, [], 3, None):
        index = index_of(path)
        index.state_dict_metadata = wrong
        with pytest.raises(ValueError, match=r"not an index|no PRX"):
            convert_transformer(with_index(path, index), in_channels=4)
        (path / ".metadata").write_bytes(whole)
    index = index_of(path)
    index.state_dict_metadata[name].properties.dtype = "float32"
    with pytest.raises(ValueError, match="dtype of"):
        convert_transformer(with_index(path, index), in_channels=4)
    # index 2**31 - 1 of the memo would take 34 GB in the C unpickler
    (path / ".metadata").write_bytes(b"\x80\x02Nr\xff\xff\xff\x7f.")
    with pytest.raises(ValueError, match="NoneType"):
        convert_transformer(path, in_channels=4)


# --- pipelines


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Save T5Gemma, a whole Qwen3-VL, VAEs and PRX pipelines."""
    root = tmp_path_factory.mktemp("parts")
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    vision["deepstack_visual_indexes"] = [0]
    torch.manual_seed(0)
    qwen = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=zoo.QWEN_TEXT, vision_config=vision))
    for name, model in (("t5gemma", tiny.t5gemma_model()), ("qwen", qwen)):
        model.save_pretrained(root / name)
        tiny.tokenizer(max_length=1000).save_pretrained(root / name)
    tiny.vae_kl().save_pretrained(root / "vae")
    zoo.vae_flux2().save_pretrained(root / "flux2")
    tiny.latent_pipeline(token_route=(0, 1, 0.5)).save_pretrained(root / "pipeline")
    tiny.pixel_pipeline().save_pretrained(root / "pixel_pipeline")
    pipeline = tiny.latent_pipeline()
    pipeline.text_encoder.to(torch.bfloat16)
    pipeline.save_pretrained(root / "published")  # with the encoder of a T5GemmaModel alone, as published
    shutil.rmtree(root / "published" / "text_encoder")
    pipeline.text_encoder.encoder.save_pretrained(root / "published" / "text_encoder")
    index = json.loads((root / "published" / "model_index.json").read_text())
    index["text_encoder"] = ["prx", "T5GemmaEncoder"]
    (root / "published" / "model_index.json").write_text(json.dumps(index))
    (root / "other").mkdir()
    (root / "other" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return root


def convert(path, out, *more):
    main(["--checkpoint_path", str(path), "--output_dir", str(out), *map(str, more)])


DRAW = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np", "height": 16, "width": 24}


def test_latent_pipeline_loads_in_stock_diffusers(parts, tmp_path, capsys):
    run = Run()
    flags = ["--vae_name_or_path", parts / "vae", "--text_encoder_name_or_path", parts / "t5gemma"]
    flags += ["--shift", 1.5, "--resolution", 32, "--max_sequence_length", 9]
    convert(save_run(run, tmp_path, "nested.pt"), tmp_path / "out", *flags)
    printed = capsys.readouterr().out
    assert "velocity, shift 1.5, noise_scale 1.0, 9 text tokens, caption_cleaning full" in printed
    ours = PRXPipeline.from_pretrained(tmp_path / "out")
    assert (ours.scheduler.shift, ours.max_tokens, ours.config["default_sample_size"]) == (1.5, 9, 32)
    assert (ours.config["prediction_type"], ours.caption_cleaning) == ("velocity", "full")
    assert difference(converted_prediction(ours.transformer), run.predict(run.denoiser)) < TOLERANCE
    for name, tensor in tiny.t5gemma_model().encoder.state_dict().items():
        assert torch.equal(ours.text_encoder.encoder.state_dict()[name], tensor)
    assert ours("a red cat", generator=torch.Generator().manual_seed(0), **DRAW).images.shape == (1, 16, 24, 3)
    stock = diffusers.PRXPipeline.from_pretrained(tmp_path / "out")
    given = inputs()
    with torch.no_grad():
        stock_prediction = stock.transformer(given["image"], given["t"], given["text"], given["mask"]).sample
    assert difference(stock_prediction, run.predict(run.denoiser)) < TOLERANCE


def test_pixel_pipeline_with_the_text_tower_of_qwen(parts, tmp_path):
    run = Run(channels=3, patch=4, bottleneck=6, resolution="vec")
    flags = ["--ema", "--pixel_space", "--noise_scale", 2, "--dtype", "bfloat16"]
    flags += ["--text_encoder_name_or_path", parts / "qwen"]
    convert(save_run(run, tmp_path, "folder"), tmp_path / "out", *flags)
    pipeline = PRXPixelPipeline.from_pretrained(tmp_path / "out")
    assert (pipeline.config["prediction_type"], pipeline.config["noise_scale"]) == ("x_prediction", 2)
    assert (pipeline.max_tokens, pipeline.scheduler.shift, pipeline.caption_cleaning) == (256, 3.0, "light")
    whole = Qwen3VLForConditionalGeneration.from_pretrained(parts / "qwen")
    for name, tensor in whole.model.language_model.state_dict().items():
        assert torch.equal(pipeline.text_encoder.state_dict()[name], tensor)
    expected = run.ema_denoiser.model.blocks[1].attn_out.weight.to(torch.bfloat16)
    assert torch.equal(pipeline.transformer.blocks[1].attention.to_out[0].weight, expected)
    assert isinstance(diffusers.PRXPixelPipeline.from_pretrained(tmp_path / "out"), diffusers.PRXPixelPipeline)


def test_components_of_a_saved_pipeline(parts, tmp_path):
    run = Run(sprint=(1, 2))
    flags = ["--components_from", parts / "pipeline", "--prediction_type", "x_prediction"]
    flags += ["--fusion_range", 1, 3, "--token_route", 1, 3, 0.75]
    convert(save_run(run, tmp_path, "folder"), tmp_path / "out", *flags)
    pipeline = PRXPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.config["token_route"] == (1, 3, 0.75)
    assert pipeline.config["prediction_type"] == "x_prediction"
    assert pipeline.vae.config["scaling_factor"] == tiny.vae_kl().config["scaling_factor"]
    assert difference(converted_prediction(pipeline.transformer), run.predict(run.denoiser)) < TOLERANCE
    convert(save_run(Run(), tmp_path, "nested.pt"), tmp_path / "out1", "--components_from", parts / "published")
    stored = diffusers.PRXPipeline.from_pretrained(tmp_path / "out1", dtype={"text_encoder": "auto"})
    assert stored.text_encoder.dtype is torch.bfloat16  # as stored
    for name, tensor in tiny.text_encoder().state_dict().items():
        assert torch.equal(stored.text_encoder.state_dict()[name], tensor.to(torch.bfloat16))

    run = Run(channels=3, patch=4)
    path = save_run(run, tmp_path, "flat.safetensors")
    flags = ["--components_from", parts / "pixel_pipeline", "--caption_cleaning", "full_v1"]
    convert(path, tmp_path / "out2", *flags)
    pipeline = PRXPixelPipeline.from_pretrained(tmp_path / "out2")
    assert (pipeline.transformer.config["patch_size"], pipeline.caption_cleaning) == (4, "full_v1")


def test_network_alone_loads_in_stock_diffusers(tmp_path):
    run = Run()
    convert(save_run(run, tmp_path, "nested.pt"), tmp_path / "out", "--transformer_only", "--patch_size", 2)
    stock = diffusers.PRXTransformer2DModel.from_pretrained(tmp_path / "out").eval()
    given = inputs()
    with torch.no_grad():
        stock_prediction = stock(given["image"], given["t"], given["text"], given["mask"]).sample
    assert difference(stock_prediction, run.predict(run.denoiser)) < TOLERANCE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--transformer_only", "--shift", "2"], "--shift"),
        (["--transformer_only"], "`in_channels` or `patch_size`"),
        ([], "--vae_name_or_path, --pixel_space"),
        (["--pixel_space"], "--text_encoder_name_or_path"),
        (["--pixel_space", "--vae_name_or_path", "vae"], "--vae_name_or_path, --pixel_space"),
        (["--pixel_space", "--text_encoder_name_or_path", "t5gemma"], "`in_channels` is 3"),
        (["--components_from", "vae"], "model_index.json"),
        (["--components_from", "other"], "`components_from`.*StableDiffusionPipeline"),
        (["--components_from", "pipeline", "--prediction_type", "flow_matching"], "invalid choice"),
        (["--components_from", "pipeline", "--token_route", "1", "9", "0.5"], "token_route"),
        (["--components_from", "pipeline", "--token_route", "1.5", "2", "0.5"], "`token_route`"),
        (["--components_from", "pipeline", "--shift", "nan"], "`shift`"),
        (["--components_from", "pipeline", "--token_route", "nan", "2", "0.5"], "token_route"),
        (["--components_from", "pipeline", "--time_max_period", "-3"], "`time_max_period`"),
        (["--components_from", "pipeline", "--axes_dim", "3", "13"], "axes_dim"),
        (["--components_from", "pipeline", "--resolution", "-8"], "default_sample_size|resolution"),
        (["--components_from", "pipeline", "--max_sequence_length", "0"], "--max_sequence_length"),
        (["--vae_name_or_path", "t5gemma", "--text_encoder_name_or_path", "t5gemma"], "accepted: "),
        (["--vae_name_or_path", "flux2", "--text_encoder_name_or_path", "t5gemma"], "`vae_name_or_path`"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message, parts, tmp_path, capsys):
    path = save_run(Run(), tmp_path, "alone.safetensors")
    arguments = [str(parts / a) if (parts / a).exists() else a for a in arguments]
    with pytest.raises(SystemExit) as caught:
        convert(path, tmp_path / "out", *arguments)
    assert caught.value.code != 0
    assert re.search(message, f"{caught.value.code}{capsys.readouterr().err}")
    assert not (tmp_path / "out").exists()


def test_text_encoder_of_another_width_is_refused(parts, tmp_path):
    state = Run().denoiser.state_dict() | {"txt_in.weight": torch.ones(HIDDEN, 48)}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(SystemExit, match=r"`text_encoder_name_or_path`.* 32; accepted: 48"):
        convert(tmp_path / "a.pt", tmp_path / "out", "--components_from", parts / "pipeline")


def test_existing_files_are_not_overwritten(parts, tmp_path, capsys):
    path = save_run(Run(), tmp_path, "alone.safetensors")
    with pytest.raises(SystemExit):
        convert(path, tmp_path, "--components_from", parts / "pipeline")
    assert "--output_dir" in capsys.readouterr().err
