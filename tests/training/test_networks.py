"""Loading of autoencoders and text encoders, and new transformers that fit them."""

import json

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import BartConfig, BartModel, SiglipConfig, SiglipModel, T5GemmaConfig, T5GemmaModel

import runs
import tiny
import zoo
from diffusers_prx.config.training_config import TrainingConfig
from diffusers_prx.latents import encode, load_vae
from diffusers_prx.text import encode_text, load_text_encoder, tokenize_prompts
from diffusers_prx.training.networks import build_nets, text_width

VAES = {"kl": tiny.vae_kl, "flux2": zoo.vae_flux2, "dc": tiny.vae_dc, "tiny": zoo.vae_tiny, "rae": zoo.vae_rae}


# what is saved, its tokenizer, and the part of it that is the text encoder
TEXTS = {
    "t5": (zoo.t5_model, tiny.tokenizer, lambda whole: whole.encoder),
    "t5_encoder": (zoo.t5_encoder, tiny.tokenizer, lambda whole: whole),
    "t5gemma": (tiny.t5gemma_model, tiny.tokenizer, lambda whole: whole.encoder),
    "t5gemma_encoder": (tiny.text_encoder, tiny.tokenizer, lambda whole: whole),
    "clip": (zoo.clip_model, zoo.clip_tokenizer, lambda whole: whole.text_model),
    "clip_text": (zoo.clip_text, zoo.clip_tokenizer, lambda whole: whole),
    "qwen3_vl": (zoo.qwen_model, tiny.tokenizer, lambda whole: whole.language_model),
    "qwen3_vl_text": (tiny.qwen_text_tower, tiny.tokenizer, lambda whole: whole),
    "bert": (zoo.bert, tiny.tokenizer, lambda whole: whole),
}
LOADED_CLASS = {
    "t5": "T5EncoderModel",
    "t5gemma": "T5GemmaEncoderModel",
    "clip": "CLIPTextModel",
    "qwen3_vl": "Qwen3VLTextModel",
    "bert": "BertModel",
}


def save_text(name, folder):
    make, make_tokenizer, part = TEXTS[name]
    whole = make()
    whole.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return part(whole)


@pytest.mark.parametrize("subfolder", ["", "vae"])
@pytest.mark.parametrize("name", VAES)
@torch.no_grad()
def test_load_vae(name, subfolder, tmp_path):
    vae = VAES[name]()
    vae.to(torch.bfloat16).save_pretrained(tmp_path / subfolder)
    loaded = load_vae(str(tmp_path))
    assert type(loaded) is type(vae)
    assert loaded.dtype == torch.float32
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(encode(loaded, pixels).mean, encode(vae.float(), pixels).mean)


def test_unsupported_vae_class_is_rejected(tmp_path):
    AsymmetricAutoencoderKL(
        norm_num_groups=4, down_block_out_channels=(4,), up_block_out_channels=(4,)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`vae_name_or_path` is a AsymmetricAutoencoderKL.*AutoencoderKLFlux2"):
        load_vae(str(tmp_path))


@pytest.mark.parametrize("name", TEXTS)
@torch.no_grad()
def test_load_text_encoder(name, tmp_path):
    """The encoder computes the same as within the complete model, and loads again under its public class."""
    part = save_text(name, tmp_path / "whole")
    encoder, tokenizer = load_text_encoder(str(tmp_path / "whole"))
    kind = name.removesuffix("_encoder").removesuffix("_text")
    assert type(encoder).__name__ == LOADED_CLASS[kind]
    ids, mask = tokenize_prompts(tokenizer, ["a red cat", "dog"], 12, str.strip)
    embeds = encode_text(encoder, ids, mask)
    expected = part(input_ids=ids, attention_mask=mask).last_hidden_state
    assert embeds.std() > 1e-3
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-6)
    assert text_width(encoder) == embeds.shape[-1]
    encoder.save_pretrained(tmp_path / "again")
    again = type(encoder).from_pretrained(tmp_path / "again")
    assert torch.equal(encode_text(again, ids, mask), embeds)


def lose(file, part):
    """Remove weights with `part` in their name from a file, and return their names."""
    weights = load_file(file)
    lost = [name for name in weights if part in name]
    save_file({name: value for name, value in weights.items() if name not in lost}, file, {"format": "pt"})
    return lost


@pytest.mark.parametrize(
    ("name", "part"), [("t5", "0.layer.0"), ("clip_text", "layers.0.mlp"), ("qwen3_vl", "o_proj")]
)
def test_text_encoder_with_missing_weights_is_rejected(name, part, tmp_path):
    save_text(name, tmp_path)
    assert lose(tmp_path / "model.safetensors", part)
    with pytest.raises(ValueError, match=rf"`text_encoder_name_or_path` {tmp_path} lacks weights .*{part}"):
        load_text_encoder(str(tmp_path))


def test_autoencoder_with_missing_weights_is_rejected(tmp_path):
    tiny.vae_kl().save_pretrained(tmp_path)
    assert lose(tmp_path / "diffusion_pytorch_model.safetensors", "decoder.conv_in")
    with pytest.raises(ValueError, match=rf"`vae_name_or_path` {tmp_path} lacks weights .*decoder.conv_in.bias"):
        load_vae(str(tmp_path))


def test_text_width_equals_that_of_the_encoder():
    """T5Gemma has encoders and decoders of different widths."""
    encoder, decoder = tiny.t5gemma_module_config(hidden_size=48), tiny.t5gemma_module_config(hidden_size=32)
    model = T5GemmaModel(T5GemmaConfig(encoder=encoder, decoder=decoder, vocab_size=64))
    assert text_width(model) == model.encoder.get_input_embeddings().embedding_dim == 48


def bart():
    settings = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartModel(BartConfig(vocab_size=64, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **settings))


def siglip():
    vision = zoo.SMALL | {"image_size": 16, "patch_size": 8}
    return SiglipModel(SiglipConfig(text_config=zoo.SMALL, vision_config=vision))


@pytest.mark.parametrize("make", [bart, siglip])
def test_unsupported_text_encoders_are_rejected(make, tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"`text_encoder_name_or_path` is a {make.__name__},.*T5Gemma"):
        load_text_encoder(str(tmp_path))


def config(tmp_path, **changes):
    settings = {
        "text_encoder_name_or_path": str(tmp_path / "text"),
        "vae_name_or_path": str(tmp_path / "vae"),
        "train_text_encoder": False,
        "prediction_type": "velocity",
        "max_sequence_length": 12,
        "transformer_config": {key: value for key, value in runs.TRANSFORMER.items() if key != "bottleneck_size"}
        | {"patch_size": 2},
    }
    return TrainingConfig(**runs.settings(tmp_path / "out", **settings | changes))


@pytest.mark.parametrize("vae", VAES)
@pytest.mark.parametrize("text", ["clip", "t5"])
def test_new_transformer_fits_the_other_networks(vae, text, tmp_path):
    save_text(text, tmp_path / "text")
    VAES[vae]().save_pretrained(tmp_path / "vae")
    changes = {"resolution": 16} if vae == "rae" else {}  # its only size
    nets = build_nets(config(tmp_path, **changes))
    transformer = nets.transformer.config
    assert transformer.in_channels == {"kl": 4, "flux2": 12, "dc": 4, "tiny": 4, "rae": 64}[vae]
    assert transformer.context_in_dim == tiny.TEXT_WIDTH
    pipeline = nets.pipeline(config(tmp_path, **changes))
    pipeline.save_pretrained(tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", type(nets.vae).__name__]
    assert index["text_encoder"] == ["transformers", LOADED_CLASS[text]]


def test_resolution_must_fit_flux2(tmp_path):
    save_text("clip", tmp_path / "text")
    zoo.vae_flux2().save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"`resolution` must be a multiple of 8 .*got 36"):
        build_nets(config(tmp_path, resolution=36))


def test_vae_without_scale_is_rejected(tmp_path):
    save_text("clip", tmp_path / "text")
    zoo.vae_flux2().save_pretrained(tmp_path / "wrong")
    AutoencoderKL.from_pretrained(tmp_path / "wrong", low_cpu_mem_usage=False).save_pretrained(tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    stored = json.loads(path.read_text())
    del stored["scaling_factor"]
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="scaling_factor"):
        build_nets(config(tmp_path))


def test_token_limit_must_fit_the_text_encoder(tmp_path):
    save_text("clip", tmp_path / "text")
    zoo.vae_tiny().save_pretrained(tmp_path / "vae")
    build_nets(config(tmp_path, max_sequence_length=24))
    with pytest.raises(ValueError, match=r"`max_sequence_length` is 25.* 24"):
        build_nets(config(tmp_path, max_sequence_length=25))
