"""Adapters on both pipelines: their arithmetic against weights made by hand, what is refused, what is left behind."""

import copy
import pickle

import diffusers
import pytest
import torch
from safetensors.torch import save_file

import tiny
from diffusers_prx import PRXPixelPipeline

pytest.importorskip("peft")

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
    """The tensors of a random LoRA by the names that files have."""
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
    """The pipeline with sum of weight * B A added to its weights."""
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
def test_fusing_and_back(kind, tmp_path):
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
        assert (draw(pipe) - apart).abs().max() < TOLERANCE  # also their weights are as before
    pipe.disable_lora()
    assert (draw(pipe) - base).abs().max() < TOLERANCE
    pipe.enable_lora()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert (draw(pipe) - apart).abs().max() < TOLERANCE
    pipe.save_pretrained(tmp_path)  # with the adapters in the weights, under the names of any pipeline
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (draw(loaded) - apart).abs().max() < TOLERANCE
    assert list(loaded.transformer.state_dict()) == list(before)


def test_what_is_fused_is_not_changed_behind_its_back():
    pipe = make("pixel")
    pipe.load_lora_weights(adapter(pipe.transformer, 1), adapter_name="one")
    pipe.load_lora_weights(adapter(pipe.transformer, 2), adapter_name="two")
    pipe.fuse_lora(adapter_names=["one"])
    with pytest.raises(ValueError, match=r"`set_adapters` needs `unfuse_lora` first: \['one'\] are fused"):
        pipe.set_adapters("one", 0.5)
    with pytest.raises(ValueError, match=r"`lora_scale` is 0.5, but \['one'\] are fused already"):
        pipe.fuse_lora(lora_scale=0.5, adapter_names=["two"])
    with pytest.raises(ValueError, match=r"`delete_adapters` needs `unfuse_lora` first: \['one'\] are fused"):
        pipe.delete_adapters("one")


def test_what_was_fused_can_be_deleted_after_unfusing():
    pipe = make("pixel")
    base = draw(pipe)
    for seed, name in enumerate(("one", "two"), 1):
        pipe.load_lora_weights(adapter(pipe.transformer, seed), adapter_name=name)
    pipe.fuse_lora(adapter_names=["one"])
    for names in ("one", ["two", "one"]):
        with pytest.raises(ValueError, match="`delete_adapters` needs"):
            pipe.delete_adapters(names)
    with pytest.raises(ValueError, match="`hotswap` needs `unfuse_lora` first"):
        pipe.load_lora_weights(adapter(pipe.transformer, 3), adapter_name="one", hotswap=True)
    assert pipe.get_list_adapters() == {"transformer": ["one", "two"]}
    pipe.unfuse_lora()
    pipe.delete_adapters(["one", "two"])
    assert (draw(pipe) - base).abs().max() < TOLERANCE


def test_a_scale_of_zero_would_lose_the_weights():
    """diffusers sets them to 1 when it takes a scale of 0 back."""
    pipe = make("pixel")
    pipe.load_lora_weights(adapter(pipe.transformer, 1), adapter_name="one")
    pipe.set_adapters("one", 0.5)
    images = draw(pipe)
    with pytest.raises(ValueError, match="`lora_scale` is 0, which `unfuse_lora` cannot take back"):
        pipe.fuse_lora(lora_scale=0.0)
    assert torch.equal(draw(pipe), images)
    pipe.fuse_lora(lora_scale=0.25)
    pipe.unfuse_lora()
    assert (draw(pipe) - images).abs().max() < TOLERANCE


def test_a_file_comes_back_bit_by_bit(tmp_path):
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


def test_hotswap_puts_another_in_its_place():
    pipe = make("latent")
    one, two = adapter(pipe.transformer, 1), adapter(pipe.transformer, 2)
    pipe.load_lora_weights(one, adapter_name="mine")
    pipe.load_lora_weights(two, adapter_name="mine", hotswap=True)
    assert pipe.get_list_adapters() == {"transformer": ["mine"]}
    assert (draw(pipe) - draw(by_hand(make("latent"), (1, two)))).abs().max() < TOLERANCE


def misfits():
    own = tiny.transformer(**tiny.PIXEL_SETTINGS)
    wider = tiny.transformer(**tiny.PIXEL_SETTINGS, hidden_size=64, num_heads=4)
    deeper = tiny.transformer(**tiny.PIXEL_SETTINGS, depth=3)
    good = adapter(own, 1)
    first = next(iter(good))
    return {
        "width": (adapter(wider, 1), r"not fit this transformer, in 10 of 10 layers: blocks\.0\.\S+ takes lora_A"),
        "depth": (adapter(deeper, 1), r"in 5 of 15 .*blocks\.2\.\S+ is not there"),
        "half": ({k: v for k, v in good.items() if k != first}, r"has only \['lora_B'\] in the file"),
        "no linear layer": (
            {k.replace("gate_proj", "attention.norm_q"): v for k, v in good.items()},
            "is a PRXRMSNorm, not a linear layer",
        ),
        "no prefix": ({k.removeprefix("transformer."): v for k, v in good.items()}, "no part of a LoRA or DoRA"),
        "text encoder": ({**good, "text_encoder.q.lora_A.weight": torch.zeros(2, 2)}, "has 1 tensors of 21 that"),
        "kohya": ({"lora_unet_blocks_0.lora_down.weight": torch.zeros(2, 2)}, "accepted are transformer.LAYER"),
        "nothing": ({}, "0 tensors of 0"),
    }  # fmt: skip


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("name", misfits())
def test_what_does_not_fit_is_refused_and_changes_nothing(name, loaded):
    pipe = make("pixel")
    if loaded:
        pipe.load_lora_weights(adapter(pipe.transformer, 5), adapter_name="mine")
    names, adapters = list(pipe.transformer.state_dict()), pipe.get_list_adapters()
    images = draw(pipe)
    tensors, message = misfits()[name]
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(tensors)
    assert list(pipe.transformer.state_dict()) == names
    assert pipe.get_list_adapters() == adapters
    assert torch.equal(draw(pipe), images)


def test_a_rank_that_is_not_the_one_stated_is_refused(tmp_path):
    pipe = make("pixel")
    layers = {n.removeprefix("transformer."): v for n, v in adapter(pipe.transformer, 1).items()}
    settings = {"r": 4, "lora_alpha": 4, "target_modules": LAYERS}
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=settings)
    with pytest.raises(ValueError, match=r"takes lora_A of the shape \(4, \d+\), not \(2, \d+\)"):
        pipe.load_lora_weights(tmp_path)
    assert not pipe.get_list_adapters()


def test_nothing_is_unpickled(tmp_path):
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(OSError, match="pytorch_lora_weights"):
        make("pixel").load_lora_weights(str(tmp_path))


def test_a_misspelt_argument_is_an_error(tmp_path):
    pipe = make("pixel")
    save_file(adapter(pipe.transformer, 1), tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(TypeError, match="weigth_name"):
        pipe.load_lora_weights(tmp_path, weigth_name="other.safetensors")


def test_the_class_of_stock_takes_no_adapters(tmp_path):
    pipe = tiny.pixel_pipeline()
    pipe.transformer.save_pretrained(tmp_path)
    stock = diffusers.PRXTransformer2DModel.from_pretrained(tmp_path)
    parts = {name: value for name, value in pipe.components.items() if name != "transformer"}
    other = PRXPixelPipeline(transformer=stock, **parts)
    with pytest.raises(
        ValueError, match=r"`transformer` is a diffusers\S+PRXTransformer2DModel, which takes no adapt"
    ):
        other.load_lora_weights(adapter(pipe.transformer, 1))


def test_a_pipeline_with_adapters_is_not_saved(tmp_path):
    pipe = make("pixel")
    pipe.load_lora_weights(adapter(pipe.transformer, 1), adapter_name="mine")
    with pytest.raises(ValueError, match=r"`transformer` has the adapters \['mine'\]"):
        pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["latent", "pixel"])
def test_in_bf16_the_adapter_has_the_type_of_the_weights(kind):
    pipe = make(kind).to(dtype=torch.bfloat16)
    base = draw(pipe)
    tensors = adapter(pipe.transformer, 1)
    pipe.load_lora_weights(tensors)
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16}
    images = draw(pipe)
    exact = draw(by_hand(make(kind), (1, tensors)))
    assert (images - exact).abs().mean() < 0.3 * (base - exact).abs().mean()


def test_text_and_time_once_for_all_steps_see_the_adapter():
    """The pipeline's contexts, against a transformer that is given text and timesteps at every step."""

    class Plain(tiny.PRXTransformer2DModel):
        def forward(self, hidden_states, timestep, encoder_hidden_states, attention_mask=None, return_dict=True):
            return super().forward(
                hidden_states, timestep, encoder_hidden_states, attention_mask, return_dict=return_dict
            )

    pipe = make("pixel")
    plain = Plain.from_config(pipe.transformer.config)
    plain.load_state_dict(pipe.transformer.state_dict())
    other = tiny.pixel_pipeline(transformer=plain)
    tensors = adapter(pipe.transformer, 1, MORE)
    base = draw(pipe)
    for each in (pipe, other):
        each.load_lora_weights(tensors)
    images = draw(pipe)
    assert (images - draw(other)).abs().max() < TOLERANCE
    assert (images - base).abs().max() > CHANGED
