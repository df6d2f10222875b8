"""Vision teachers: tiny random models of the real classes, compared with direct calls of the models."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTConfig,
    ViTModel,
)

from diffusers_prx.techniques.teachers import build_teacher, load_teacher

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}
TEXT_SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}

# name: class, configuration, number of tokens before the patches, arguments of the forward
CASES = {
    "dinov2": (Dinov2Model, Dinov2Config(**SIZES), 1, {}),
    "dinov2_registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3), 4, {}),
    "dinov3": (DINOv3ViTModel, DINOv3ViTConfig(**SIZES, num_register_tokens=4), 5, {}),
    "vit": (ViTModel, ViTConfig(**SIZES), 1, {"interpolate_pos_encoding": True}),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**SIZES), 0, {"interpolate_pos_encoding": True}),
}


def saved(folder, model, **settings):
    """Save a model with random parameters, including positions and registers, and its preprocessor_config.json."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD} | settings))
    return folder


def dinov2(folder, **settings):
    """Save a DINOv2 that always has the same weights."""
    torch.manual_seed(0)
    return saved(folder, Dinov2Model(CASES["dinov2"][1]), **settings)


def images(height, width, batch=2):
    return np.random.default_rng(0).integers(0, 256, (batch, 3, height, width), dtype=np.uint8)


def pm1(pixels_uint8):
    return torch.from_numpy(pixels_uint8).float() / 127.5 - 1


def call_directly(model, leading, options, pixels_01):
    """Return the patch features of the model itself for pixels in [0, 1], numpy (B, 3, H, W), at their own size."""
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        tokens = model(torch.from_numpy((pixels_01 - mean) / std).float(), **options).last_hidden_state
    return tokens[:, leading:]


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (6, 2), (2, 8)])  # (2, 8): as many patches as in training
@pytest.mark.parametrize("case", CASES)
def test_teacher_features_equal_direct_calls_of_the_model(tmp_path, case, grid):
    cls, config, leading, options = CASES[case]
    teacher = load_teacher(saved(tmp_path, cls(config)))
    model = cls.from_pretrained(tmp_path).eval()
    pixels = images(4 * grid[0], 4 * grid[1])
    features = teacher(pm1(pixels), grid)
    assert (teacher.patch_size, teacher.hidden_size) == (4, 32)
    assert features.shape == (2, grid[0] * grid[1], 32)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, call_directly(model, leading, options, pixels / 255), rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_features_are_in_row_major_order(tmp_path, case):
    """A change of one patch of the image changes the feature at its position most."""
    cls, config, *_ = CASES[case]
    teacher = load_teacher(saved(tmp_path, cls(config)))
    rows, columns = 3, 5
    pixels = pm1(images(4 * rows, 4 * columns, batch=1))
    for row, column in [(0, 1), (1, 0), (2, 3)]:
        changed = pixels.clone()
        changed[..., 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] *= -1
        difference = (teacher(changed, (rows, columns)) - teacher(pixels, (rows, columns))).norm(dim=-1)[0]
        assert difference.argmax() == row * columns + column


def test_images_are_resized_like_pillows_bicubic_filter(tmp_path):
    teacher = load_teacher(dinov2(tmp_path))
    pixels, (rows, columns) = images(36, 35), (3, 5)
    size = (4 * columns, 4 * rows)
    channels = [Image.fromarray(c.astype(np.float32)).resize(size, Image.BICUBIC) for image in pixels for c in image]
    small = np.stack([np.asarray(channel) for channel in channels]).reshape(2, 3, 4 * rows, 4 * columns)
    expected = call_directly(Dinov2Model.from_pretrained(tmp_path).eval(), 1, {}, small / 255)
    features = teacher(pm1(pixels), (rows, columns))
    torch.testing.assert_close(features, expected, rtol=0, atol=2e-5)
    plain = torch.nn.functional.interpolate(torch.from_numpy(pixels).float(), (12, 20), mode="bicubic").numpy()
    assert (features - call_directly(teacher.model, 1, {}, plain / 255)).abs().max() > 0.1


def test_teachers_are_frozen_and_propagate_gradients_to_the_pixels(tmp_path):
    teacher = load_teacher(dinov2(tmp_path))
    pixels = pm1(images(20, 12)).requires_grad_()
    teacher(pixels, (2, 3)).square().sum().backward()
    assert pixels.grad is not None
    assert (pixels.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())


def test_teachers_stay_in_evaluation_mode(tmp_path):
    """In training mode DINOv3 scales its positions at random."""
    cls, config, *_ = CASES["dinov3"]
    teacher = load_teacher(saved(tmp_path, cls(config)))
    pixels = pm1(images(12, 20))
    before = teacher(pixels, (3, 5))
    teacher.model.train()
    assert (teacher(pixels, (3, 5)) - before).abs().max() > 1e-3  # the mode matters
    assert teacher.train() is teacher
    assert not any(module.training for module in teacher.modules())
    assert torch.equal(teacher(pixels, (3, 5)), before)


def test_the_image_half_of_an_image_text_model_is_loaded(tmp_path):
    config = SiglipConfig(text_config=TEXT_SIZES | {"intermediate_size": 32}, vision_config=SIZES)
    teacher = load_teacher(saved(tmp_path, SiglipModel(config)))
    assert type(teacher.model) is SiglipVisionModel
    model = SiglipModel.from_pretrained(tmp_path).eval().vision_model
    pixels = images(12, 20)
    expected = call_directly(model, 0, {"interpolate_pos_encoding": True}, pixels / 255)
    torch.testing.assert_close(teacher(pm1(pixels), (3, 5)), expected, rtol=0, atol=2e-5)


def test_the_normalization_of_the_file_is_used(tmp_path):
    half, none, own = (tmp_path / name for name in ("half", "none", "own"))
    teachers = [
        load_teacher(dinov2(half, image_mean=[0.5] * 3, image_std=[0.5] * 3)),
        load_teacher(dinov2(none, do_normalize=False)),
        load_teacher(dinov2(own)),
    ]
    pixels = images(12, 20)
    for teacher, values in zip(teachers, [pixels / 127.5 - 1, pixels / 255]):
        with torch.no_grad():
            expected = teacher.model(torch.from_numpy(values).float()).last_hidden_state[:, 1:]
        torch.testing.assert_close(teacher(pm1(pixels), (3, 5)), expected, rtol=0, atol=2e-5)
    features = [teacher(pm1(pixels), (3, 5)) for teacher in teachers]
    assert (features[0] - features[1]).abs().max() > 1e-2
    assert (features[0] - features[2]).abs().max() > 1e-2


def test_an_incomplete_normalization_is_refused(tmp_path):
    file = dinov2(tmp_path) / "preprocessor_config.json"
    for settings, message in [
        ({"image_std": STD}, "`image_mean` None"),
        ({"image_mean": MEAN, "image_std": 0.5}, "`image_std` 0.5"),
        ({"image_mean": MEAN, "image_std": STD, "rescale_factor": 1.0}, "`rescale_factor` 1.0"),
    ]:
        file.write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=message):
            load_teacher(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json"):
        load_teacher(tmp_path)


def test_the_fingerprint_depends_on_weights_settings_and_normalization(tmp_path):
    folders = [tmp_path / name for name in ("here", "there", "mean", "weight", "setting")]
    for folder in folders:
        dinov2(folder, image_mean=[0.5, 0.456, 0.406] if folder.name == "mean" else MEAN)
    weights = load_file(tmp_path / "weight" / "model.safetensors")
    weights["layernorm.bias"][3] += 1e-3
    save_file(weights, tmp_path / "weight" / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((tmp_path / "setting" / "config.json").read_text()) | {"layer_norm_eps": 1e-3}
    (tmp_path / "setting" / "config.json").write_text(json.dumps(settings))
    here, there, *others = (load_teacher(folder).fingerprint for folder in folders)
    assert here == there
    assert len({here, *others}) == 4


def test_the_fingerprint_ignores_unused_weights(tmp_path):
    """A checkpoint without a pooler gets a random one whenever it is loaded."""
    saved(tmp_path, ViTModel(CASES["vit"][1], add_pooling_layer=False))
    first, second = load_teacher(tmp_path), load_teacher(tmp_path)
    assert not torch.equal(first.model.pooler.dense.weight, second.model.pooler.dense.weight)
    assert first.fingerprint == second.fingerprint


def test_pixels_of_another_shape_are_refused(tmp_path):
    teacher = load_teacher(dinov2(tmp_path))
    for shape in [(3, 8, 8), (1, 4, 8, 8)]:
        with pytest.raises(ValueError, match="`pixels_pm1`"):
            teacher(torch.zeros(shape), (2, 2))


def test_missing_weights_are_refused(tmp_path):
    file = dinov2(tmp_path) / "model.safetensors"
    weights = load_file(file)
    del weights["encoder.layer.1.mlp.fc1.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights \['encoder\.layer\.1\.mlp\.fc1\.weight'\]"):
        load_teacher(tmp_path)


def test_models_without_square_patches_are_refused():
    tall = ViTModel(ViTConfig(**SIZES | {"patch_size": [4, 2]}))
    with pytest.raises(ValueError, match="`patch_size`"):
        build_teacher(tall, MEAN, STD, "x")
    swin = SwinModel(SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 1], image_size=16, window_size=2))
    with pytest.raises(ValueError, match=r"4 tokens for a grid of 4 x 4.* 16 patches"):
        build_teacher(swin, MEAN, STD, "x")(torch.zeros(1, 3, 16, 16), (4, 4))


def resnet():
    torch.manual_seed(0)
    return ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"))


def timm_network(**model_args):
    """Build timm's smallest EfficientNet, whose stage 2 has 24 channels per 8 x 8 pixels."""
    pytest.importorskip("timm", reason="timm is not installed (the extra `vision`)")
    torch.manual_seed(0)
    settings = {"architecture": "test_efficientnet", "do_pooling": False, "num_labels": 0}
    return TimmWrapperModel(TimmWrapperConfig(**settings, model_args=model_args))


def randomized(model):
    """Randomize the statistics of a model's batch norms."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return model


def test_a_convolutional_teacher_returns_the_features_of_its_configured_stage(tmp_path):
    """The reference calls the layers of the whole network one by one."""
    timm = pytest.importorskip("timm", reason="timm is not installed (the extra `vision`)")
    whole = randomized(timm.create_model("test_efficientnet", pretrained=False)).eval()
    model = timm_network(features_only=True, out_indices=[2])
    model.timm_model.load_state_dict({key: whole.state_dict()[key] for key in model.timm_model.state_dict()})
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    teacher = load_teacher(tmp_path)
    rows, columns = 3, 5
    pixels = images(8 * rows, 8 * columns)
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        features = whole.bn1(whole.conv_stem(torch.from_numpy((pixels / 255 - mean) / std).float()))
        for block in whole.blocks[:3]:
            features = block(features)
    assert (teacher.patch_size, teacher.hidden_size) == (8, features.shape[1])
    expected = torch.stack([features[:, :, row, column] for row in range(rows) for column in range(columns)], dim=1)
    torch.testing.assert_close(teacher(pm1(pixels), (rows, columns)), expected, rtol=0, atol=2e-5)


def test_a_convolutional_teacher_resizes_images_to_the_grid(tmp_path):
    """ResNet returns its last stage: one feature per 8 x 8 pixels."""
    teacher = load_teacher(saved(tmp_path, randomized(resnet())))
    pixels = pm1(images(64, 64))
    large = torch.nn.functional.interpolate(pixels, (96, 96), mode="bicubic", antialias=True)
    features = teacher(pixels, (12, 12))
    assert (teacher.patch_size, teacher.hidden_size, features.shape) == (8, 12, (2, 144, 12))
    torch.testing.assert_close(features, teacher(large, (12, 12)), rtol=0, atol=2e-5)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.train().model.training


def test_a_convolutional_teacher_propagates_gradients_and_has_a_fingerprint(tmp_path):
    teacher = load_teacher(saved(tmp_path / "a", timm_network(features_only=True, out_indices=[2])))
    pixels = pm1(images(32, 32)).requires_grad_()
    teacher(pixels, (4, 4)).sum().backward()
    assert pixels.grad.abs().max() > 0
    other = load_teacher(saved(tmp_path / "b", timm_network(features_only=True, out_indices=[1])))
    assert load_teacher(tmp_path / "a").fingerprint == teacher.fingerprint != other.fingerprint


def test_a_network_without_a_feature_map_is_refused():
    pytest.importorskip("timm", reason="timm is not installed (the extra `vision`)")
    pooled = TimmWrapperModel(TimmWrapperConfig(architecture="test_vit", model_args={"img_size": 224}, num_labels=0))
    with pytest.raises(ValueError, match=r"TimmWrapperModel .*feature map"):
        build_teacher(pooled, MEAN, STD, "x")
