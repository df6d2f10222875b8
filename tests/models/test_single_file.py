"""`from_single_file`: a transformer or a pipeline from one file, with the original's names and our own."""

import diffusers
import pytest
import torch
from safetensors.torch import save_file

import tiny
from diffusers_prx import PRXPipeline, PRXPixelPipeline, PRXTransformer2DModel
from diffusers_prx.convert import original_tensors


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red cat", num_inference_steps=2, generator=tiny.generators(0), output_type="pt").images


def has_equal_weights(model, other):
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Return a pipeline in pixels, its folder, and a file with the original's names and prefix."""
    folder, pipe = tmp_path_factory.mktemp("published"), tiny.pixel_pipeline()
    pipe.save_pretrained(folder / "pipe")
    tensors = {f"state.model.denoiser.{key}": value for key, value in original_tensors(pipe.transformer).items()}
    save_file(tensors, folder / "original.safetensors")
    return pipe, folder / "pipe", folder / "original.safetensors"


def test_names_and_prefixes_of_files(tmp_path):
    model = tiny.transformer(axes_dim=[4, 12], theta=500)
    model.save_pretrained(tmp_path / "model")
    files = {"own": model.state_dict(), "original": original_tensors(model)}
    files["comfyui"] = {f"model.diffusion_model.{key}": value for key, value in files["original"].items()}
    files["comfyui"]["first_stage_model.decoder.weight"] = torch.zeros(2)
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        loaded = PRXTransformer2DModel.from_single_file(
            tmp_path / f"{name}.safetensors", config=tmp_path / "model", torch_dtype=torch.float32
        )
        assert has_equal_weights(loaded, model)
        assert (loaded.config["theta"], list(loaded.config["axes_dim"])) == (500, [4, 12])
        assert not loaded.training
    inferred = PRXTransformer2DModel.from_single_file(files["own"], in_channels=4, torch_dtype=torch.bfloat16)
    assert (inferred.dtype, inferred.config["patch_size"], inferred.config["theta"]) == (torch.bfloat16, 2, 10000)


@pytest.mark.parametrize(
    ("edit", "given", "message"),
    [
        (lambda tensors: None, {}, "`in_channels` or `patch_size`"),
        (lambda tensors: tensors.pop("txt_in.bias"), {"in_channels": 4}, r"missing: txt_in\.bias"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), {"in_channels": 4}, "unknown: extra"),
        (lambda tensors: tensors.update({"txt_in.bias": torch.zeros(3)}), {"in_channels": 4}, "txt_in.bias"),
        (lambda tensors: None, {"in_channels": 4, "depths": 3}, "depths"),
    ],
)
def test_file_that_is_not_exactly_a_transformer_is_refused(edit, given, message):
    tensors = dict(tiny.transformer().state_dict())
    edit(tensors)
    with pytest.raises((ValueError, TypeError), match=message):
        PRXTransformer2DModel.from_single_file(tensors, **given)


def test_other_files_are_refused(tmp_path):
    for name in ("model.ckpt", "model.pt"):
        with pytest.raises(ValueError, match=r"model\.(ckpt|pt)"):
            PRXTransformer2DModel.from_single_file(tmp_path / name)
    (tmp_path / "broken.safetensors").write_bytes(b"12345678901234567890")
    with pytest.raises(ValueError, match="broken"):
        PRXTransformer2DModel.from_single_file(tmp_path / "broken.safetensors")


def test_pipeline_from_a_file_draws_the_same(published):
    pipe, folder, file = published
    from_config = PRXPixelPipeline.from_single_file(file, config=folder)
    parts = {name: value for name, value in pipe.components.items() if name != "transformer"}
    settings = {"default_sample_size": 32, "prompt_max_tokens": tiny.MAX_TOKENS}
    from_parts = PRXPixelPipeline.from_single_file(file, **parts, **settings)
    assert torch.equal(draw(from_config), draw(pipe))
    assert torch.equal(draw(from_parts), draw(pipe))
    assert from_parts.text_encoder is pipe.text_encoder


def test_missing_components_are_named(published):
    with pytest.raises(ValueError, match=r"\['scheduler', 'text_encoder', 'tokenizer', 'vae'\]"):
        PRXPipeline.from_single_file(published[2])


def test_gguf_file_computes_with_its_dequantized_weights(tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install -e '.[gguf]'")
    model, dequantized = tiny.transformer(), {}
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "prx")
    for name, value in original_tensors(model).items():
        dequantized[name] = value
        if name.startswith("blocks.") and value.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quants.quantize(value.numpy(), kind)
            # diffusers multiplies scale and integer in float16
            dequantized[name] = torch.from_numpy(gguf.quants.dequantize(data, kind).copy()).half().float()
            writer.add_tensor(name, data, raw_dtype=kind)
        else:
            writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="`quantization_config`"):
        PRXTransformer2DModel.from_single_file(tmp_path / "model.gguf", in_channels=4)
    quantization = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
    loaded = PRXTransformer2DModel.from_single_file(
        tmp_path / "model.gguf", in_channels=4, quantization_config=quantization
    )
    plain = PRXTransformer2DModel.from_single_file(dequantized, in_channels=4)
    assert loaded.blocks[0].gate_proj.weight.dtype is torch.uint8
    given = (torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), torch.randn(2, 5, tiny.TEXT_WIDTH))
    with torch.no_grad():
        images, expected, exact = (network(*given).sample for network in (loaded, plain, model))
    assert (images - expected).abs().max() < 1e-5
    assert (exact - expected).abs().max() > 1e-3
    pipe = tiny.latent_pipeline(transformer=loaded)
    assert torch.isfinite(draw(pipe)).all()
