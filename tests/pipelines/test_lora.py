"""LoRA adapters on both pipelines: their arithmetic against weights made by hand, refusals, and leftovers."""

import copy
import dataclasses
import functools
import json
import pickle
import random

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from diffusers_prx import PRXPixelPipeline

PROMPTS = ["a red cat", "a small blue square on the beach"]
LAYERS = ["attention.img_qkv_proj", "attention.txt_kv_proj", "attention.to_out.0", "gate_proj", "down_proj"]
MORE = [*LAYERS, "up_proj", "modulation.lin"]
TOLERANCE = 1e-5  # measured: up to 2.7e-6, of pictures in [0, 1]
CHANGED = 1e-2


def draw(pipe, **kwargs):
    settings = {"num_inference_steps": 3, "generator": tiny.generators(0, 1), "output_type": "pt"}
    return pipe(PROMPTS, **settings | kwargs).images


def make(kind):
    return tiny.pixel_pipeline() if kind == "pixel" else tiny.latent_pipeline()


def adapter(transformer, seed, layers=LAYERS, rank=2):
    """Return the tensors of a random LoRA under the names that files use."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in transformer.named_modules():
        if any(name.endswith(f".{layer}") for layer in layers):
            for part, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
                value = torch.randn(shape, generator=generator) * (0.2 if part == "A" else 0.3)
                tensors[f"transformer.{name}.lora_{part}.weight"] = value
    return tensors


@torch.no_grad()
def by_hand(pipe, *weighted):
    """Add the sum of weight * B A to the pipeline's weights."""
    pipe.transformer = copy.deepcopy(pipe.transformer)
    for weight, tensors in weighted:
        for name, module in pipe.transformer.named_modules():
            key = f"transformer.{name}.lora_"
            if f"{key}A.weight" in tensors:
                product = tensors[f"{key}B.weight"].double() @ tensors[f"{key}A.weight"].double()
                module.weight += (weight * product).float()
    return pipe


@pytest.mark.parametrize("kind", ["latent", "pixel"])
def test_adapters_add_up_with_their_weights(kind):
    pipe = make(kind)
    base = draw(pipe)
    one, two = adapter(pipe.transformer, 1), adapter(pipe.transformer, 2, MORE, rank=3)
    pipe.load_lora_weights(one, adapter_name="one")
    assert (draw(pipe) - draw(by_hand(make(kind), (1, one)))).abs().max() < TOLERANCE
    pipe.load_lora_weights(two, adapter_name="two")
    for weights in ((1.0, 1.0), (0.7, -0.4), (0.0, 0.5)):
        pipe.set_adapters(["one", "two"], list(weights))
        expected = draw(by_hand(make(kind), *zip(weights, (one, two))))
        assert (draw(pipe) - expected).abs().max() < TOLERANCE
        assert (expected - base).abs().max() > CHANGED
    assert pipe.get_list_adapters() == {"transformer": ["one", "two"]}
    pipe.set_adapters(["one", "two"], [0.0, 0.0])
    assert torch.equal(draw(pipe), base)
    pipe.set_adapters("two", 0.5)
    assert pipe.get_active_adapters() == ["two"]
    assert (draw(pipe) - draw(by_hand(make(kind), (0.5, two)))).abs().max() < TOLERANCE
    pipe.disable_lora()
    assert torch.equal(draw(pipe), base)
    pipe.enable_lora()
    pipe.delete_adapters("two")
    pipe.set_adapters("one")
    assert (draw(pipe) - draw(by_hand(make(kind), (1, one)))).abs().max() < TOLERANCE
    names = list(make(kind).transformer.state_dict())
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), base)
    assert list(pipe.transformer.state_dict()) == names


@pytest.mark.parametrize("kind", ["latent", "pixel"])
def test_fusing_and_unfusing(kind, tmp_path):
    pipe = make(kind)
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    base = draw(pipe)
    one, two = adapter(pipe.transformer, 1), adapter(pipe.transformer, 2, MORE)
    pipe.load_lora_weights(one, adapter_name="one")
    pipe.load_lora_weights(two, adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.7, 0.4])
    apart = draw(pipe)
    for scale in (1.0, 0.5):
        pipe.fuse_lora(lora_scale=scale)
        assert pipe.num_fused_loras == 2
        expected = draw(by_hand(make(kind), (0.7 * scale, one), (0.4 * scale, two)))
        assert (draw(pipe) - expected).abs().max() < TOLERANCE
        pipe.unfuse_lora()
        assert pipe.num_fused_loras == 0
        assert (draw(pipe) - apart).abs().max() < TOLERANCE  # with the weights of `set_adapters`
    pipe.disable_lora()
    assert (draw(pipe) - base).abs().max() < TOLERANCE
    pipe.enable_lora()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert (draw(pipe) - apart).abs().max() < TOLERANCE
    pipe.save_pretrained(tmp_path)  # the adapters are in the weights
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (draw(loaded) - apart).abs().max() < TOLERANCE
    assert list(loaded.transformer.state_dict()) == list(before)


def test_fused_adapters_cannot_be_changed_until_unfused():
    pipe = make("pixel")
    base = draw(pipe)
    for seed, name in enumerate(("one", "two"), 1):
        pipe.load_lora_weights(adapter(pipe.transformer, seed), adapter_name=name)
    pipe.fuse_lora(adapter_names=["one"])
    with pytest.raises(ValueError, match="`set_adapters`"):
        pipe.set_adapters("one", 0.5)
    with pytest.raises(ValueError, match="`lora_scale`"):
        pipe.fuse_lora(lora_scale=0.5, adapter_names=["two"])
    for names in ("one", ["two", "one"]):
        with pytest.raises(ValueError, match="`delete_adapters`"):
            pipe.delete_adapters(names)
    with pytest.raises(ValueError, match="`hotswap`"):
        pipe.load_lora_weights(adapter(pipe.transformer, 3), adapter_name="one", hotswap=True)
    assert pipe.get_list_adapters() == {"transformer": ["one", "two"]}
    pipe.unfuse_lora()
    pipe.delete_adapters(["one", "two"])
    assert (draw(pipe) - base).abs().max() < TOLERANCE


def test_fusing_with_scale_zero_is_refused():
    """diffusers would reset the weights to 1 on unfusing."""
    pipe = make("pixel")
    pipe.load_lora_weights(adapter(pipe.transformer, 1), adapter_name="one")
    pipe.set_adapters("one", 0.5)
    images = draw(pipe)
    with pytest.raises(ValueError, match="`lora_scale`"):
        pipe.fuse_lora(lora_scale=0.0)
    assert torch.equal(draw(pipe), images)
    pipe.fuse_lora(lora_scale=0.25)
    pipe.unfuse_lora()
    assert (draw(pipe) - images).abs().max() < TOLERANCE


def test_saved_adapter_loads_bit_by_bit(tmp_path):
    pipe = make("pixel")
    tensors = adapter(pipe.transformer, 1)
    pipe.load_lora_weights(tensors, adapter_name="one")
    images = draw(pipe)
    layers = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    for source in (tmp_path, str(tmp_path / "pytorch_lora_weights.safetensors")):
        fresh = make("pixel")
        fresh.load_lora_weights(source)
        assert torch.equal(draw(fresh), images)
    fresh.load_lora_weights(tmp_path, adapter_name="again", weight_name="pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="again already in use"):
        fresh.load_lora_weights(tmp_path, adapter_name="again")


def split(tensors, block):
    """Return a LoRA of the queries and values of one block, with other alphas and ranks, and what it adds to W."""
    name = f"transformer.blocks.{block}.attention.img_qkv_proj.lora_"
    down, up = tensors[f"{name}A.weight"], tensors[f"{name}B.weight"]
    rows = len(up) // 3
    parts = {}
    for part, index, rank in (("to_q", 0, 2), ("to_v", 2, 1)):
        key = f"transformer.blocks.{block}.attention.{part}"
        parts[f"{key}.lora_A.weight"] = down[:rank].clone()
        parts[f"{key}.lora_B.weight"] = up[index * rows : (index + 1) * rows, :rank].clone()
    return parts


def in_format(tensors, name, alpha=3.0):
    """Write a LoRA with the names of a tool, by hand."""
    start, ends = {
        "ai-toolkit": ("diffusion_model.", ("lora_A.weight", "lora_B.weight")),
        "peft": ("base_model.model.", ("lora_A.weight", "lora_B.weight")),
        "kohya": ("lora_unet_", ("lora_down.weight", "lora_up.weight")),
        "original": ("diffusion_model.", ("lora_A.weight", "lora_B.weight")),
        "original kohya": ("lora_unet_", ("lora_down.weight", "lora_up.weight")),
    }[name]
    named = {}
    for key, value in tensors.items():
        layer, _, part = key.removeprefix("transformer.").rpartition(".lora_")
        if name.startswith("original"):
            layer = layer.replace("attention.to_out.0", "attn_out").replace("attention.", "")
        layer = start + (layer.replace(".", "_") if "kohya" in name else layer)
        named[f"{layer}.{ends[part.startswith('B')]}"] = value
        if name != "peft":
            named[f"{layer}.alpha"] = torch.tensor(alpha)
    return named


@pytest.mark.parametrize("name", ["ai-toolkit", "peft", "kohya", "original", "original kohya"])
def test_files_of_other_tools_add_scale_b_a(name, tmp_path):
    """Alpha 3 at rank 2: the weights change by 1.5 B A."""
    pipe = shallow()
    tensors = adapter(pipe.transformer, 1, MORE)
    save_file(in_format(tensors, name), tmp_path / "adapter_model.safetensors")
    if name == "peft":
        with pytest.raises(OSError, match="adapter_config"):
            pipe.load_lora_weights(tmp_path)
        LoraConfig(r=2, lora_alpha=3, target_modules=MORE).save_pretrained(tmp_path)
    pipe.load_lora_weights(tmp_path)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    expected = by_hand(shallow(), (1.5, tensors)).transformer.state_dict()
    changed = shallow().transformer.state_dict()
    for key, value in pipe.transformer.state_dict().items():
        assert (value - expected[key]).abs().max() < TOLERANCE, key
        adapted = any(f".{layer}.weight" in key for layer in MORE)
        assert torch.equal(expected[key], changed[key]) != adapted, key


@pytest.mark.parametrize("alphas", [(2.0, 1.0), (3.0, 5.0)], ids=["equal scales", "other scales"])
@pytest.mark.parametrize("names", [("to_q", "to_v"), ("img_q_proj", "img_v_proj")])
def test_split_projections_are_fused_exactly(names, alphas):
    pipe = shallow()
    parts = split(adapter(pipe.transformer, 1), 0)
    weight = pipe.transformer.blocks[0].attention.img_qkv_proj.weight.clone()
    expected, rows, given = weight.double(), len(weight) // 3, {}
    for part, name, index, alpha in zip(("to_q", "to_v"), names, (0, 2), alphas):
        own = {end: parts[f"transformer.blocks.0.attention.{part}.lora_{end}.weight"] for end in "AB"}
        product = alpha / len(own["A"]) * own["B"].double() @ own["A"].double()
        expected[index * rows : (index + 1) * rows] += product
        start = f"diffusion_model.blocks.0.attention.{name}"
        given |= {f"{start}.lora_A.weight": own["A"], f"{start}.lora_B.weight": own["B"]}
        given[f"{start}.alpha"] = torch.tensor(alpha)
    pipe.load_lora_weights(given)
    pipe.fuse_lora()
    fused = pipe.transformer.blocks[0].attention.img_qkv_proj.get_base_layer().weight
    assert (fused - expected).abs().max() < 1e-6  # measured: 1.5e-7
    assert torch.equal(fused[rows : 2 * rows], weight[rows : 2 * rows])  # keys have no adapter
    assert (fused - weight).abs().max() > 0.1


@pytest.mark.parametrize("lora_format", ["comfyui", "kohya"])
@pytest.mark.parametrize("is_dora", [False, True], ids=["lora", "dora"])
def test_adapter_is_equal_after_a_round_trip_through_each_format(lora_format, is_dora, tmp_path):
    pipe = shallow()
    tensors = (dora if is_dora else adapter)(pipe.transformer, 1)
    settings = {"lora_alpha": 5, "alpha_pattern": {"gate_proj": 0.3}}
    pipe.load_lora_weights(to_file(tensors, tmp_path / "first", **settings), adapter_name="mine")
    images, folders = draw_once(pipe), (tmp_path / lora_format, tmp_path / "back")
    for folder, name in zip(folders, (lora_format, "diffusers")):
        layers = get_peft_model_state_dict(pipe.transformer, adapter_name="mine")
        metadata = pipe.transformer.peft_config["mine"].to_dict()
        pipe.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=metadata, format=name)
        pipe = shallow()
        pipe.load_lora_weights(folder, adapter_name="mine")
        assert torch.equal(draw_once(pipe), images)
    written = load_file(folders[0] / "pytorch_lora_weights.safetensors")
    start = {"comfyui": "diffusion_model.blocks.0.gate_proj", "kohya": "lora_unet_blocks_0_gate_proj"}[lora_format]
    assert {key for key in written if key.startswith(start)} == {
        f"{start}.{end}"
        for end in ["alpha", *(["dora_scale"] if is_dora else [])]
        + (["lora_down.weight", "lora_up.weight"] if lora_format == "kohya" else ["lora_A.weight", "lora_B.weight"])
    }
    assert written[f"{start}.alpha"].item() == 0.3
    back = load_file(folders[1] / "pytorch_lora_weights.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], value) for key, value in tensors.items())


def test_what_a_format_cannot_express_is_refused(tmp_path):
    pipe = shallow()
    layers = {key.removeprefix("transformer."): value for key, value in adapter(pipe.transformer, 1).items()}
    with pytest.raises(ValueError, match="`format`"):
        pipe.save_lora_weights(tmp_path, layers, format="a1111")
    biases = {key.replace("B.weight", "B.bias"): value[:, 0] for key, value in layers.items() if "lora_B" in key}
    with pytest.raises(ValueError, match=r"lora_B\.bias"):
        pipe.save_lora_weights(tmp_path, layers | biases, format="kohya")
    with pytest.raises(ValueError, match="rank"):
        pipe.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata={"r": 4}, format="kohya")
    assert not list(tmp_path.iterdir())


def test_alpha_of_tensors_and_metadata_must_agree(tmp_path):
    pipe = shallow()
    tensors = adapter(pipe.transformer, 1)
    alphas = {key.replace("lora_A.weight", "alpha"): torch.tensor(4.0) for key in tensors if "lora_A" in key}
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 3})}
    save_file(tensors | alphas, tmp_path / "pytorch_lora_weights.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"\.alpha.* 4.* 3"):
        pipe.load_lora_weights(tmp_path)
    assert not pipe.get_list_adapters()


def wrong_adapters():
    """Adapters that do not fit the transformer of the pixel pipeline."""
    own = tiny.transformer(**tiny.PIXEL_SETTINGS)
    wider = tiny.transformer(**tiny.PIXEL_SETTINGS, hidden_size=64, num_heads=4)
    deeper = tiny.transformer(**tiny.PIXEL_SETTINGS, depth=3)
    good = adapter(own, 1)
    first = next(iter(good))
    return {
        "other width": (adapter(wider, 1), r"10 of 10 layers: blocks\.0\.\S+ takes lora_A"),
        "other depth": (adapter(deeper, 1), r"5 of 15 .*blocks\.2\."),
        "half of a layer": ({k: v for k, v in good.items() if k != first}, r"\['lora_B'\]"),
        "not linear": ({k.replace("gate_proj", "attention.norm_q"): v for k, v in good.items()}, "PRXRMSNorm"),
        "no prefix": ({k.removeprefix("transformer."): v for k, v in good.items()}, "has 20 tensors of 20"),
        "text encoder": ({**good, "text_encoder.q.lora_A.weight": torch.zeros(2, 2)}, "has 1 tensors of 21"),
        "kohya": ({"lora_unet_blocks_0.lora_down.weight": torch.zeros(2, 2)}, r"blocks_0 is not in the transformer"),
        "prefixes": ({**good, first.replace("transformer.", "diffusion_model."): good[first]}, "several formats"),
        "twice": ({**good, **{k.replace("attention.to_out.0", "attn_out"): v for k, v in good.items()}}, "attn_out"),
        "part twice": ({**good, **split(good, 0)}, r"attention\.to_q.*img_qkv_proj|img_qkv_proj.*to_q"),
        "alpha missing": (
            {**good, first.replace("lora_A.weight", "alpha"): torch.tensor(2.0)},
            r"\['lora_A', 'lora_B'\]",
        ),
        "alpha zero": ({**in_format(good, "kohya", 0.0)}, r"\.alpha"),
        "no tensors": ({}, "has no tensors"),
    }


@pytest.mark.parametrize("name", wrong_adapters())
def test_adapter_that_does_not_fit_is_refused_and_changes_nothing(name):
    pipe = make("pixel")
    pipe.load_lora_weights(adapter(pipe.transformer, 5), adapter_name="mine")
    names, images = list(pipe.transformer.state_dict()), draw(pipe)
    tensors, message = wrong_adapters()[name]
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(tensors)
    assert list(pipe.transformer.state_dict()) == names
    assert pipe.get_list_adapters() == {"transformer": ["mine"]}
    assert torch.equal(draw(pipe), images)


def test_rank_other_than_in_the_metadata_is_refused(tmp_path):
    pipe = make("pixel")
    layers = {n.removeprefix("transformer."): v for n, v in adapter(pipe.transformer, 1).items()}
    settings = {"r": 4, "lora_alpha": 4, "target_modules": LAYERS}
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=settings)
    with pytest.raises(ValueError, match=r"lora_A .*\(4, \d+\), not \(2, \d+\)"):
        pipe.load_lora_weights(tmp_path)
    assert not pipe.get_list_adapters()


def test_pickle_files_are_not_loaded(tmp_path):
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(OSError, match="pytorch_lora_weights"):
        make("pixel").load_lora_weights(str(tmp_path))


def test_misspelled_argument_is_a_type_error(tmp_path):
    pipe = make("pixel")
    save_file(adapter(pipe.transformer, 1), tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(TypeError, match="weigth_name"):
        pipe.load_lora_weights(tmp_path, weigth_name="other.safetensors")


def test_stock_transformer_takes_no_adapters(tmp_path):
    pipe = tiny.pixel_pipeline()
    pipe.transformer.save_pretrained(tmp_path)
    stock = diffusers.PRXTransformer2DModel.from_pretrained(tmp_path)
    parts = {name: value for name, value in pipe.components.items() if name != "transformer"}
    other = PRXPixelPipeline(transformer=stock, **parts)
    with pytest.raises(ValueError, match=r"`transformer` is a diffusers\S+PRXTransformer2DModel"):
        other.load_lora_weights(adapter(pipe.transformer, 1))


def test_pipeline_with_adapters_is_not_saved(tmp_path):
    pipe = make("pixel")
    pipe.load_lora_weights(adapter(pipe.transformer, 1), adapter_name="mine")
    with pytest.raises(ValueError, match=r"`transformer`.*\['mine'\]"):
        pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`transformer`.*\['mine'\]"):
        pipe.transformer.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["latent", "pixel"])
def test_bf16_adapter_has_the_dtype_of_the_weights(kind):
    pipe = make(kind).to(dtype=torch.bfloat16)
    base = draw(pipe)
    tensors = adapter(pipe.transformer, 1)
    pipe.load_lora_weights(tensors)
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16}
    images = draw(pipe)
    exact = draw(by_hand(make(kind), (1, tensors)).to(dtype=torch.bfloat16))  # torch 2.9 draws other noise in float32
    assert (images - exact).abs().mean() < 0.3 * (base - exact).abs().mean()


def test_contexts_computed_once_per_call_see_the_adapter():
    pipe = make("pixel")
    plain = tiny.EmbeddingsTransformer.from_config(pipe.transformer.config)
    plain.load_state_dict(pipe.transformer.state_dict())
    other = tiny.pixel_pipeline(transformer=plain)
    tensors = adapter(pipe.transformer, 1, MORE)
    base = draw(pipe)
    for each in (pipe, other):
        each.load_lora_weights(tensors)
    images = draw(pipe)
    assert (images - draw(other)).abs().max() < TOLERANCE
    assert (images - base).abs().max() > CHANGED


# --- any sequence of calls, against a model of their effects that does not use peft

CPU = torch.device("cpu")
POOL = {"out": (LAYERS[2:3], 2), "other": (LAYERS[2:3], 2), "mlp": (["down_proj", *LAYERS[2:3]], 3), "all": (MORE, 2)}
CHANGES = ("load", "hotswap", "fuse", "unfuse", "delete", "unload", "save")  # calls that touch weights


def shallow():
    return tiny.pixel_pipeline(transformer=tiny.transformer(**tiny.PIXEL_SETTINGS, depth=1))


@functools.cache
def in_pool(key):
    layers, rank = POOL[key]
    return adapter(shallow().transformer, list(POOL).index(key), layers, rank)


@dataclasses.dataclass
class ExpectedState:
    """State that a pipeline must draw with. Values are names in `POOL`; `room` is the entry that was loaded first."""

    loaded: dict = dataclasses.field(default_factory=dict)
    room: dict = dataclasses.field(default_factory=dict)
    weights: dict = dataclasses.field(default_factory=dict)
    active: list = dataclasses.field(default_factory=list)
    enabled: bool = True
    fused: bool = False
    scale: float = 1.0
    kept: list = dataclasses.field(default_factory=list)

    def drawn(self):
        """Return (weight, tensors) of everything that is added to the weights."""
        used = self.active if self.enabled else []
        return self.kept + [(self.weights[name] * self.scale, in_pool(self.loaded[name])) for name in used]

    def after(self, call, name, key, weight, refused=()):
        """Return the state after a call, or None if it must be refused, as are the calls in `refused`."""
        new = copy.deepcopy(self)
        if call in refused and (self.fused if call == "unfuse" else self.loaded or call in ("load", "save")):
            return None
        if self.fused and call in ("load", "hotswap", "set", "disable", "delete"):
            return None
        if call in ("hotswap", "set", "delete") and name not in self.loaded:
            return None
        if call == "load":
            if name in self.loaded:
                return None
            new.loaded[name], new.room[name], new.weights[name], new.active = key, key, 1.0, [name]
        elif call == "hotswap":
            layers, rank = POOL[self.room[name]]
            if not set(POOL[key][0]) <= set(layers) or POOL[key][1] > rank:
                return None
            new.loaded[name] = key
        elif call == "set":
            new.active = [name, *[other for other in self.loaded if other != name][:1]]
            new.weights |= dict.fromkeys(new.active, weight)
        elif call in ("disable", "enable"):
            new.enabled = call == "enable" or not self.loaded
        elif call == "fuse":
            if not self.active or not self.enabled or (self.fused and weight != 1):
                return None
            new.fused, new.scale = True, self.scale if self.fused else weight
        elif call == "unfuse":
            new.fused, new.scale = False, 1.0
        elif call == "delete":
            del new.loaded[name]
            new.active = [other for other in self.active if other != name] or list(new.loaded)[-1:]
            new.enabled = self.enabled or not new.loaded
        elif call == "unload":
            new = ExpectedState(kept=self.drawn() if self.fused else self.kept)
        elif call == "save" and self.loaded:
            return None
        return new


def make_call(pipe, folder, call, name, key, weight):
    others = [other for other in pipe.get_list_adapters().get("transformer", []) if other != name][:1]
    {
        "load": lambda: pipe.load_lora_weights(in_pool(key), adapter_name=name),
        "hotswap": lambda: pipe.load_lora_weights(in_pool(key), adapter_name=name, hotswap=True),
        "set": lambda: pipe.set_adapters([name, *others], weight),
        "disable": pipe.disable_lora,
        "enable": pipe.enable_lora,
        "fuse": lambda: pipe.fuse_lora(lora_scale=weight),
        "unfuse": pipe.unfuse_lora,
        "delete": lambda: pipe.delete_adapters(name),
        "unload": pipe.unload_lora_weights,
        "save": lambda: pipe.save_pretrained(folder),
    }[call]()


def draw_once(pipe):
    return draw(pipe, num_inference_steps=1, guidance_scale=1.0)


def follow(pipe, calls, reference, folder, refused=(), state=None):
    """Make calls and compare the picture after each with that of weights made by hand."""
    state, images, done = state or ExpectedState(), draw_once(pipe), []
    for call in calls:
        done.append(call)
        before, state = state, state.after(*call, refused)
        if state is None:
            with pytest.raises(ValueError):  # noqa: PT011 - each refusal has its own test
                make_call(pipe, folder / str(len(done)), *call)
            state = before
            assert torch.equal(draw_once(pipe), images), done
        else:
            make_call(pipe, folder / str(len(done)), *call)
            images = draw_once(pipe)
            difference = (images - draw_once(by_hand(reference(), *state.drawn()))).abs().max()
            assert difference < TOLERANCE, (done, difference)
        assert pipe.get_list_adapters() == ({"transformer": list(state.loaded)} if state.loaded else {}), done
        assert pipe.num_fused_loras == (len(state.active) if state.fused else 0), done
        modules = pipe.transformer.modules()
        assert not [m for m in modules if m.training and hasattr(m, "lora_A")], done
    return state


def walk(seed, length=6):
    """Draw random calls. Some names are parts of others, because peft looks for names inside names of weights."""
    rng = random.Random(seed)
    calls = ["load", "load", "hotswap", "set", "disable", "enable", "fuse", "unfuse", "delete", "unload", "save"]
    return [
        (rng.choice(calls), rng.choice(["x", "x2", "lora_A"]), rng.choice(list(POOL)), rng.choice([1.0, 0.3, -2.0]))
        for _ in range(length)
    ]


@pytest.mark.parametrize("seed", range(6))
def test_random_calls_have_their_documented_effects(seed, tmp_path):
    follow(shallow(), walk(seed), shallow, tmp_path)


@torch.no_grad()
def with_weights(weight_of):
    """Return a plain pipeline whose linear layers have the given weights."""
    pipe = shallow()
    for name, module in pipe.transformer.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(weight_of(name, module.weight))
    return pipe


def compile_whole(pipe, folder):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def compile_blocks(pipe, folder):
    pipe.transformer.compile_repeated_blocks(backend="eager")


def to_int8(module):
    quantization = pytest.importorskip(
        "torchao.quantization", reason="torchao is not installed: pip install -e '.[quantization]'"
    )
    quantization.quantize_(module, quantization.Int8WeightOnlyConfig())


def quantized_reference():
    small = shallow().transformer
    to_int8(small)
    return with_weights(lambda name, weight: small.get_submodule(name).weight.dequantize())


def cast_reference():
    small = shallow().transformer
    small.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    return with_weights(lambda name, weight: small.get_submodule(name).weight.float())


LEAVES = {"offload_type": "leaf_level"}
BLOCKS = {"offload_type": "block_level", "num_blocks_per_group": 1}


def offload(level, disk=False):
    def change(pipe, folder):
        path = {"offload_to_disk_path": str(folder)} if disk else {}
        pipe.transformer.enable_group_offload(onload_device=CPU, **level, **path)

    return change


def offload_models(pipe, folder):
    pipe.enable_model_cpu_offload(device="cpu")


def cast(pipe, folder):
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def quantize(pipe, folder):
    to_int8(pipe.transformer)


SETTINGS = {  # change of the pipeline, plain pipeline with the same weights, calls that are refused
    "plain": (lambda pipe, folder: None, shallow, ()),
    "compiled": (compile_whole, shallow, ()),
    "compiled blocks": (compile_blocks, shallow, ()),
    "leaves in memory": (offload(LEAVES), shallow, ()),
    "blocks in memory": (offload(BLOCKS), shallow, ()),
    "leaves on disk": (offload(LEAVES, disk=True), shallow, CHANGES),
    "blocks on disk": (offload(BLOCKS, disk=True), shallow, CHANGES),
    "offloaded models": (offload_models, shallow, ()),
    "cast": (cast, cast_reference, ("fuse", "unfuse")),
    "quantized": (quantize, quantized_reference, ("fuse", "unfuse", "save")),
}
EVERY_CALL = [
    ("load", "x", "mlp", 1.0),
    ("load", "x2", "all", 1.0),
    ("load", "x", "out", 1.0),  # the name is taken
    ("set", "x", "", 0.5),
    ("hotswap", "x", "out", 1.0),
    ("hotswap", "x", "all", 1.0),  # no room
    ("fuse", "", "", 0.3),
    ("hotswap", "x", "mlp", 1.0),  # fused
    ("unfuse", "", "", 1.0),
    ("disable", "", "", 1.0),
    ("load", "y", "out", 1.0),
    ("enable", "", "", 1.0),
    ("save", "", "", 1.0),  # there are adapters
    ("delete", "y", "", 1.0),
    ("unload", "", "", 1.0),
    ("save", "", "", 1.0),
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_call_in_every_offloading_and_quantization(setting, fresh_dynamo, tmp_path):
    change, reference, refused = SETTINGS[setting]
    pipe = shallow()
    change(pipe, tmp_path)
    follow(pipe, EVERY_CALL, reference, tmp_path / "saved", refused)


@pytest.mark.parametrize(
    "setting",
    [
        *(name for name, (_, reference, _) in SETTINGS.items() if reference is shallow and "compiled" not in name),
        "cast",
        # torchao would quantize the adapters as well
        *(pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS if "compiled" in name),
    ],
)
def test_every_call_when_adapters_were_loaded_first(setting, fresh_dynamo, tmp_path):
    change, reference, refused = SETTINGS[setting]
    pipe = shallow()
    state = follow(pipe, EVERY_CALL[:2], shallow, tmp_path / "saved")
    change(pipe, tmp_path)
    follow(pipe, EVERY_CALL[2:], reference, tmp_path / "saved", refused, state)


def to_file(tensors, folder, **settings):
    layers = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    metadata = {"r": 2, "lora_alpha": 2, "target_modules": LAYERS} | settings
    PRXPixelPipeline.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=metadata)
    return folder


def test_dropout_in_the_metadata_is_not_applied(tmp_path):
    pipe = make("pixel")
    tensors = adapter(pipe.transformer, 1)
    pipe.load_lora_weights(to_file(tensors, tmp_path, lora_dropout=0.5))
    images = draw(pipe)
    assert torch.equal(draw(pipe), images)
    assert (images - draw(by_hand(make("pixel"), (1, tensors)))).abs().max() < TOLERANCE


def test_hotswap_keeps_the_weight_and_takes_the_new_alpha(tmp_path):
    pipe = make("pixel")
    one, two = adapter(pipe.transformer, 1), adapter(pipe.transformer, 2, rank=1)
    pipe.load_lora_weights(one, adapter_name="mine")
    pipe.set_adapters("mine", 0.5)
    pipe.load_lora_weights(to_file(two, tmp_path, r=1, lora_alpha=3), adapter_name="mine", hotswap=True)
    assert (draw(pipe) - draw(by_hand(make("pixel"), (1.5, two)))).abs().max() < TOLERANCE
    pipe.set_adapters("mine", 0.25)
    assert (draw(pipe) - draw(by_hand(make("pixel"), (0.75, two)))).abs().max() < TOLERANCE


def test_hotswap_to_a_higher_rank_after_enable_lora_hotswap():
    pipe = make("pixel")
    pipe.enable_lora_hotswap(target_rank=4)
    one, two = adapter(pipe.transformer, 1), adapter(pipe.transformer, 2, rank=4)
    with pytest.raises(ValueError, match="`target_rank`"):
        pipe.load_lora_weights(adapter(pipe.transformer, 3, rank=5), adapter_name="mine")
    pipe.load_lora_weights(one, adapter_name="mine")
    pipe.set_adapters("mine", 0.5)
    pipe.load_lora_weights(two, adapter_name="mine", hotswap=True)
    assert (draw(pipe) - draw(by_hand(make("pixel"), (0.5, two)))).abs().max() < TOLERANCE
    assert isinstance(pipe.transformer.blocks[0].down_proj.scaling["mine"], torch.Tensor)  # compiled once


def test_loading_does_not_change_the_tensors_of_the_caller():
    pipe = make("pixel")
    one, two = adapter(pipe.transformer, 1), adapter(pipe.transformer, 2)
    kept = {name: value.clone() for name, value in two.items()}
    given = dict(two)
    pipe.load_lora_weights(one, adapter_name="mine")
    pipe.set_adapters("mine", 0.5)
    pipe.load_lora_weights(given, adapter_name="mine", hotswap=True)
    pipe.load_lora_weights(one, adapter_name="mine", hotswap=True)
    assert all(given[name] is two[name] and torch.equal(two[name], kept[name]) for name in kept)


def dora(transformer, seed):
    generator, tensors = torch.Generator().manual_seed(seed), adapter(transformer, seed)
    for name, module in transformer.named_modules():
        if f"transformer.{name}.lora_A.weight" in tensors:
            lengths = module.weight.norm(dim=1) * (1 + 0.3 * torch.rand(module.out_features, generator=generator))
            tensors[f"transformer.{name}.lora_magnitude_vector"] = lengths.detach()
    return tensors


def test_dora_needs_to_read_the_weights():
    pipe = make("pixel")
    one, two = (dora(pipe.transformer, seed) for seed in (1, 2))
    pipe.load_lora_weights(one, adapter_name="mine")
    pipe.set_adapters("mine", 0.5)
    pipe.load_lora_weights(two, adapter_name="mine", hotswap=True)
    images, other = draw(pipe), make("pixel")
    other.load_lora_weights(two, adapter_name="other")
    other.set_adapters("other", 0.5)
    assert torch.equal(draw(other), images)
    with pytest.raises(ValueError, match="hotswap"):
        pipe.load_lora_weights(adapter(make("pixel").transformer, 3), adapter_name="mine", hotswap=True)
    pipe.fuse_lora(safe_fusing=True)
    assert (draw(pipe) - images).abs().max() < TOLERANCE
    offload(LEAVES)(other, None)  # the weights have left when the DoRA reads them
    with pytest.raises(ValueError, match="DoRA"):
        draw(other)
    other.disable_lora()
    assert (draw(other) - draw(make("pixel"))).abs().max() < TOLERANCE
    stored = make("pixel")
    cast(stored, None)
    with pytest.raises(ValueError, match="DoRA"):
        stored.load_lora_weights(one)
    assert not stored.get_list_adapters()


HOSTILE = "(.+)+!"  # as a regular expression on a layer name, this runs for minutes
REFUSED_METADATA = [
    *(
        {name: value}
        for name in ("target_modules", "exclude_modules", "layers_pattern")
        for value in (HOSTILE, [HOSTILE])
    ),
    *({name: {HOSTILE: 4}} for name in ("rank_pattern", "alpha_pattern")),
    *({"lora_alpha": value} for value in (0, float("nan"), float("inf"), "2", True)),
    *({"r": value} for value in (0, -1, 2.5, "2", 3)),
    {"alpha_pattern": [1]},
    {"alpha_pattern": {"down_proj": float("nan")}},
    {"use_rslora": 1},
    *(
        {"init_lora_weights": value} for value in ("pissa", "olora", "loftq", "corda")
    ),  # these change the weights under them
    {"peft_type": "LOKR"},
    {"modules_to_save": ["down_proj"]},
    {"bias": "all"},
    {"trainable_token_indices": [1]},
    {"layer_replication": [[0, 1]]},
]


@pytest.mark.parametrize("settings", REFUSED_METADATA, ids=str)
def test_unsupported_metadata_are_refused(settings, tmp_path):
    pipe = shallow()
    with pytest.raises(ValueError, match=next(iter(settings)) if settings != {"r": 3} else "metadata"):
        pipe.load_lora_weights(to_file(adapter(pipe.transformer, 1), tmp_path, **settings))
    assert not pipe.get_list_adapters()


@pytest.mark.parametrize("metadata", [b"[1]", b"{", b"[" * 100_000], ids=["list", "broken", "deep"])
def test_broken_metadata_are_refused(metadata, tmp_path):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(adapter(shallow().transformer, 1), file, metadata={"lora_adapter_metadata": metadata.decode()})
    with pytest.raises(ValueError, match=r"metadata|pytorch_lora_weights"):
        shallow().load_lora_weights(tmp_path)


def test_damaged_file_is_named(tmp_path):
    to_file(adapter(shallow().transformer, 1), tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=str(tmp_path)):
        shallow().load_lora_weights(tmp_path)


def test_peft_settings_are_read_as_peft_reads_them(tmp_path):
    """A whole LoraConfig, with patterns for ranks and alphas."""
    pipe = shallow()
    tensors = adapter(pipe.transformer, 1, ["gate_proj"], rank=4) | adapter(
        pipe.transformer, 2, ["down_proj", "up_proj"]
    )
    settings = {"lora_alpha": 6, "use_rslora": True, "init_lora_weights": "gaussian", "lora_dropout": 0.1}
    patterns = {"rank_pattern": {"gate_proj": 4}, "alpha_pattern": {"^blocks.0.up_proj": 1, "down_proj": 3}}
    config = LoraConfig(r=2, target_modules=["gate_proj", "down_proj", "up_proj"], **settings, **patterns)
    pipe.load_lora_weights(to_file(tensors, tmp_path, **config.to_dict()))
    scale = {"gate_proj": 6 / 4**0.5, "up_proj": 1 / 2**0.5, "down_proj": 3 / 2**0.5}
    weighted = [(w, {k: v for k, v in tensors.items() if f".{layer}." in k}) for layer, w in scale.items()]
    assert (draw(pipe) - draw(by_hand(shallow(), *weighted))).abs().max() < TOLERANCE
    peft = tiny.transformer(**tiny.PIXEL_SETTINGS, depth=1)
    peft.add_adapter(config, "mine")
    for name, scaling in scale.items():
        assert peft.blocks[0].get_submodule(name).scaling["mine"] == pytest.approx(scaling)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_values_that_overflow_in_the_dtype_of_the_weights_are_refused(value):
    pipe = shallow()
    pipe.transformer.to(torch.float16)  # up to 65,504
    tensors = adapter(pipe.transformer, 1)
    name = list(tensors)[-1]
    tensors[name][0, 0] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        pipe.load_lora_weights(tensors)
    assert not pipe.get_list_adapters()


def test_adapter_names_are_checked_and_generated():
    pipe = shallow()
    for name in ("", "a.b", "keys", 7):
        with pytest.raises(ValueError, match="`adapter_name`"):
            pipe.load_lora_weights(in_pool("out"), adapter_name=name)
    for key in ("out", "mlp", "all", "out"):
        pipe.load_lora_weights(in_pool(key))
    assert pipe.get_list_adapters() == {"transformer": [f"default_{number}" for number in range(4)]}
    pipe.delete_adapters("default_1")
    pipe.load_lora_weights(in_pool("out"))
    assert pipe.get_active_adapters() == ["default_1"]


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["mine", "other"], 1.0, "`adapter_names`"),
        (["mine", "mine"], 1.0, "`adapter_names`"),
        ("mine", [1.0, 2.0], "`adapter_weights`"),
        *(("mine", weight, "`adapter_weights`") for weight in (float("nan"), float("inf"), "1", True, {"unet": 1.0})),
    ],
)
def test_wrong_adapter_weights_are_refused(names, weights, message):
    pipe = shallow()
    pipe.load_lora_weights(in_pool("out"), adapter_name="mine")
    pipe.set_adapters("mine", {"transformer": 0.5})
    images = draw_once(pipe)
    with pytest.raises(ValueError, match=message):
        pipe.set_adapters(names, weights)
    assert torch.equal(draw_once(pipe), images)


def test_safe_fusing_changes_nothing_when_it_fails():
    pipe = shallow()
    pipe.load_lora_weights({name: value * 1e25 for name, value in in_pool("all").items()}, adapter_name="large")
    pipe.load_lora_weights(in_pool("out"), adapter_name="mine")
    images = draw_once(pipe)
    with pytest.raises(ValueError, match="safe_fusing"):
        pipe.fuse_lora(safe_fusing=True, adapter_names=["mine", "large"], lora_scale=0.5)
    assert not pipe.fused_loras
    assert pipe.get_active_adapters() == ["mine"]
    assert torch.equal(draw_once(pipe), images)


@pytest.mark.parametrize("scale", [0.5, 0, -3.1])
def test_scale_of_a_call_multiplies_the_adapter_weights(scale):
    pipe = shallow()
    for name, key in (("one", "mlp"), ("two", "all")):
        pipe.load_lora_weights(in_pool(key), adapter_name=name)
    pipe.set_adapters(["one", "two"], [0.7, 0.1])
    images = draw(pipe)
    expected = draw(by_hand(shallow(), (0.7 * scale, in_pool("mlp")), (0.1 * scale, in_pool("all"))))
    assert (draw(pipe, attention_kwargs={"scale": scale}) - expected).abs().max() < TOLERANCE
    assert (expected - images).abs().max() > CHANGED

    def fail(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, attention_kwargs={"scale": scale}, callback_on_step_end=fail)
    assert torch.equal(draw(pipe), images)
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="`attention_kwargs`"):
        draw(pipe, attention_kwargs={"scale": scale})


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.int64(2)])
def test_numpy_numbers_are_accepted(number):
    pipe = shallow()
    pipe.load_lora_weights(in_pool("mlp"), adapter_name="mine")
    scaled = draw(pipe, attention_kwargs={"scale": number})
    assert torch.equal(scaled, draw(pipe, attention_kwargs={"scale": number.item()}))
    pipe.set_adapters("mine", number)
    assert (draw(pipe) - scaled).abs().max() < TOLERANCE
    pipe.set_adapters("mine")
    pipe.fuse_lora(lora_scale=number)
    assert (draw(pipe) - scaled).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "value", [{"scale": 10**400}, {"scale": float("nan")}, {"scale": "1"}, {"scale": None}, {"other": 1}, 0.5]
)
def test_wrong_attention_kwargs_are_refused(value):
    with pytest.raises(ValueError, match="`attention_kwargs`"):
        draw(shallow(), attention_kwargs=value)


def test_scale_without_adapters_changes_nothing():
    assert torch.equal(draw(shallow(), attention_kwargs={"scale": 0.5}), draw(shallow(), attention_kwargs={}))


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_component_offloaded_to_disk_is_not_saved(part, tmp_path):
    pipe = shallow()
    disk = {"offload_type": "leaf_level", "offload_to_disk_path": str(tmp_path / "disk")}
    diffusers.hooks.apply_group_offloading(getattr(pipe, part), onload_device=CPU, **disk)
    with pytest.raises(ValueError, match=f"`{part}`"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    if part == "transformer":
        with pytest.raises(ValueError, match="`transformer`"):
            pipe.transformer.save_pretrained(tmp_path / "saved")
    if part == "text_encoder":  # whose weights an adapter does not touch
        pipe.load_lora_weights(in_pool("mlp"))
        assert (draw_once(pipe) - draw_once(by_hand(shallow(), (1, in_pool("mlp"))))).abs().max() < TOLERANCE
