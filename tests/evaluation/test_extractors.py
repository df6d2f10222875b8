"""Extractors against tiny saved models of the real classes with transformers' own processors."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

import tiny
import zoo
from diffusers_prx.evaluation import extractors
from diffusers_prx.evaluation.clip_score import load_clip_score
from diffusers_prx.evaluation.distances import resampled_counts
from diffusers_prx.evaluation.extractors import InceptionExtractor, load_extractor, resize_and_crop, wrap_colors
from diffusers_prx.evaluation.metrics import FrechetDistance, MaximumMeanDiscrepancy

SIZE = 28
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": SIZE,
    "patch_size": 7,
}
REGISTERS = Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3)
CONV = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
DINOV3 = DINOv3ViTConfig(**SIZES, num_register_tokens=4)
CLIP_VISION = CLIPVisionConfig(**SIZES, projection_dim=24)
SQUARE = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
# name -> (class, configuration, processor of transformers, output that is the feature)
CASES = {
    "clip": (CLIPVisionModelWithProjection, CLIP_VISION, CLIPImageProcessor, lambda out: out.image_embeds),
    "dinov2": (Dinov2Model, Dinov2Config(**SIZES), BitImageProcessor, lambda out: out.pooler_output),
    "dinov2_registers": (Dinov2WithRegistersModel, REGISTERS, BitImageProcessor, lambda out: out.pooler_output),
    "dinov3": (DINOv3ViTModel, DINOV3, BitImageProcessor, lambda out: out.pooler_output),
    "vit": (ViTModel, ViTConfig(**SIZES), BitImageProcessor, lambda out: out.last_hidden_state[:, 0]),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**SIZES), BitImageProcessor, lambda out: out.pooler_output),
}


def saved(folder, case):
    """Save a model with random parameters and its processor, and return both."""
    cls, config, processor_cls, _ = CASES[case]
    model = cls(config)
    tiny.randomize(model)
    model.eval().save_pretrained(folder)
    processor = processor_cls(**SQUARE)
    processor.save_pretrained(folder)
    return model, processor


def photos(height, width, count=3):
    """Return images with structure at all scales, without saturated noise, on which resizers differ most."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(0, 255, (count, 3, 6, 6)))
    smooth = F.interpolate(coarse, (height, width), mode="bicubic")
    return (smooth + torch.from_numpy(rng.normal(0, 6, smooth.shape))).round().clamp(0, 255).to(torch.uint8)


SHAPES = [(SIZE, SIZE), (61, 61), (20, 20), (50, 70)]


@pytest.mark.parametrize(
    ("case", "shape"), [*((case, (83, 61)) for case in CASES), *(("clip", shape) for shape in SHAPES)]
)
def test_features_equal_those_of_the_model_with_its_own_processor(tmp_path, case, shape):
    model, processor = saved(tmp_path, case)
    extractor = load_extractor(tmp_path)
    images = photos(*shape)
    pil = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    pixels = processor(images=pil, return_tensors="pt")["pixel_values"]
    ours = (resize_and_crop(images, SIZE) / 255 - extractor.mean) / extractor.std
    levels = ((pixels - ours) * extractor.std * 255).abs()
    assert levels.max() < 2.01  # of 255, from rounding; one level unless the image is enlarged
    assert levels.mean() < 0.02
    with torch.no_grad():
        expected = F.normalize(CASES[case][3](model(pixels)), dim=-1)
    features = extractor(images)
    assert features.shape == (3, extractor.num_features)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))
    spread = (expected[0] - expected[1]).norm()
    assert (features - expected).norm(dim=-1).max() < 0.02 * spread + 1e-5


def test_features_do_not_depend_on_the_batch(tmp_path):
    saved(tmp_path, "dinov2_registers")
    extractor = load_extractor(tmp_path).train()
    assert not extractor.model.training
    images = photos(40, 40)
    with torch.autocast("cpu", torch.bfloat16):  # features stay float32
        together = extractor(images)
    torch.testing.assert_close(torch.cat([extractor(image[None]) for image in images]), together, rtol=0, atol=2e-6)


def test_name_and_size(tmp_path):
    saved(tmp_path / "scenes ViT", "dinov2_registers")
    extractor = load_extractor(tmp_path / "scenes ViT")
    assert (extractor.name, extractor.size, extractor.num_features) == ("scenes ViT", SIZE, 32)
    described = extractor.describe()
    assert described["resizing"] == "bicubic, antialiased, shorter side to 28, center crop"
    assert described["source"] == str(tmp_path / "scenes ViT")


@pytest.mark.parametrize(
    ("name", "case", "metric"), [("clip", "clip", "CMMD"), ("dinov2", "dinov2_registers", "DINO-MMD")]
)
def test_encoders_of_the_study_have_named_metrics(tmp_path, monkeypatch, name, case, metric):
    """Small models replace them, with another image size than in training, as for DINOv2."""
    model, _ = saved(tmp_path, case)
    monkeypatch.setitem(extractors.NAMED_EXTRACTORS, name, (str(tmp_path), 42))
    extractor = load_extractor(name)
    assert (extractor.name, extractor.size) == (name, 42)
    assert MaximumMeanDiscrepancy(extractor).name == metric
    assert FrechetDistance(extractor).name == f"FID ({name})"
    images = photos(42, 42)
    pixels = (images / 255 - extractor.mean) / extractor.std
    options = {"interpolate_pos_encoding": True} if name == "clip" else {}
    with torch.no_grad():
        expected = F.normalize(CASES[case][3](model(pixels, **options)), dim=-1)
    torch.testing.assert_close(extractor(images), expected, rtol=0, atol=2e-6)


def test_fingerprint_changes_with_weights_and_preprocessing(tmp_path):
    for name in ("one", "copy", "weights", "normalization"):
        saved(tmp_path / name, "dinov2_registers")
    weights = load_file(tmp_path / "weights" / "model.safetensors")
    weights["embeddings.cls_token"][0, 0, 0] += 1e-6
    save_file(weights, tmp_path / "weights" / "model.safetensors", {"format": "pt"})
    settings = json.loads((tmp_path / "normalization" / "preprocessor_config.json").read_text())
    (tmp_path / "normalization" / "preprocessor_config.json").write_text(
        json.dumps(settings | {"image_mean": [0.5, 0.5, 0.5]})
    )
    found = {name: load_extractor(tmp_path / name).fingerprint for name in ("one", "copy", "weights", "normalization")}
    assert found["one"] == found["copy"]
    assert len(set(found.values())) == 3


def test_projection_of_a_whole_clip_is_loaded(tmp_path):
    vision = CLIP_VISION.to_dict()
    text = CLIPTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision, projection_dim=24)).eval()
    model.save_pretrained(tmp_path)
    CLIPImageProcessor(**SQUARE).save_pretrained(tmp_path)
    extractor = load_extractor(tmp_path)
    images = photos(SIZE, SIZE)
    with torch.no_grad():
        pixels = (images / 255 - extractor.mean) / extractor.std
        pooled = model.vision_model(pixels).pooler_output
        expected = F.normalize(model.visual_projection(pooled), dim=-1)
    torch.testing.assert_close(extractor(images), expected, rtol=0, atol=1e-6)


def test_models_that_are_not_encoders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"The encoder .* has no preprocessor_config\.json"):
        load_extractor(tmp_path)
    ResNetModel(CONV).save_pretrained(tmp_path / "resnet")
    CLIPImageProcessor().save_pretrained(tmp_path / "resnet")
    with pytest.raises(ValueError, match="`image_size`"):
        load_extractor(tmp_path / "resnet")
    saved(tmp_path / "vit", "vit")
    weights = load_file(tmp_path / "vit" / "model.safetensors")
    del weights["embeddings.cls_token"]
    save_file(weights, tmp_path / "vit" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights \['embeddings.cls_token'\]"):
        load_extractor(tmp_path / "vit")
    with pytest.raises(ValueError, match="`weights`"):
        load_extractor(tmp_path / "inception.pth")


def test_features_of_a_convolutional_network_are_the_mean_over_its_last_stage(tmp_path):
    torch.manual_seed(0)
    model = ResNetModel(CONV).eval()
    model.config.image_size = 48  # the folder states it, the extractor uses it
    tiny.randomize(model)
    model.save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}).save_pretrained(tmp_path)
    extractor = load_extractor(tmp_path)
    images = photos(48, 48)
    with torch.no_grad():
        places = model((images / 255 - extractor.mean) / extractor.std).last_hidden_state  # (B, 12, 6, 6)
    expected = torch.stack([places[:, :, row, column] for row in range(6) for column in range(6)]).sum(dim=0) / 36
    assert (extractor.size, extractor.num_features) == (48, 12)
    torch.testing.assert_close(extractor(images), F.normalize(expected, dim=-1), rtol=0, atol=1e-6)


# Inception


class Unloaded(FeatureExtractorInceptionV3):
    """Return torch-fidelity's network without downloading its weights."""

    def load_state_dict(self, *args, **kwargs):
        pass


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """Save random weights of the real size in torch-fidelity's format."""
    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    network = Unloaded("random", ["2048"], str(folder / "empty.pth"))
    torch.save(network.state_dict(), folder / "random-inception.pth")
    return folder / "random-inception.pth"


@pytest.fixture(scope="module")
def inception(inception_weights):
    return load_extractor(inception_weights)


def test_inception_equals_torch_fidelity(inception):
    """At 299 pixels, without resizing."""
    assert (inception.name, inception.size, inception.num_features) == ("random-inception", 299, 2048)
    images = photos(299, 299, count=2)
    theirs = FeatureExtractorInceptionV3.forward(inception.network, images)[0]
    torch.testing.assert_close(inception(images), theirs, rtol=1e-5, atol=1e-6)


def test_inception_resizes_with_antialiasing(inception):
    """A checkerboard of single pixels becomes gray; without antialiasing it would be black or white."""
    board = ((torch.arange(598)[:, None] + torch.arange(598)) % 2 * 255).to(torch.uint8).expand(1, 3, 598, 598)
    grey, black = (torch.full((1, 3, 299, 299), level, dtype=torch.uint8) for level in (127, 0))
    features = [inception(images) for images in (board, grey, black)]
    assert (features[0] - features[1]).norm() < 0.05 * (features[2] - features[1]).norm()


def test_compat_equals_the_color_inversion_of_the_public_code(inception_weights):
    """torchmetrics' FID with normalize=True on uint8 images is exactly the FID of inverted images."""
    reference, generated = photos(64, 64, count=2), 255 - photos(64, 64, count=2) // 2
    fid = FrechetInceptionDistance(64, normalize=True, feature_extractor_weights_path=str(inception_weights))
    found = {}
    for name in ("wrong", "right", "ours"):
        fid.normalize = name == "wrong"
        change = wrap_colors if name == "ours" else torch.clone
        fid.update(change(reference), real=True)
        fid.update(change(generated), real=False)
        found[name] = fid.compute().item()
        fid.reset()
    assert found["wrong"] == found["ours"]
    assert abs(found["wrong"] / found["right"] - 1) > 0.1


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="`weights`"):
        InceptionExtractor(tmp_path / "other.pth")


def test_missing_inception_weights_are_explained(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="weights-inception-2015"):
        load_extractor("inception")
    no_network.clear()  # it did ask


# CLIP score


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "tiny CLIP"
    return folder, zoo.save_clip(folder)


def test_clip_score_equals_the_cosine_of_the_model(clip):
    folder, model = clip
    metric = load_clip_score(str(folder))
    images = photos(16, 16, count=4)
    captions = ["a red cat", "two dogs on the beach", "a tram", "the big blue square and a circle"]
    for part in (slice(0, 1), slice(1, 4)):
        metric.update(images[part], captions[part])
    encoded = zoo.clip_tokenizer(max_length=24)(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        pixels = (images / 255 - metric.extractor.mean) / metric.extractor.std
        output = model(encoded["input_ids"], pixels, encoded["attention_mask"])
    expected = 100 * (output.image_embeds * output.text_embeds).sum(-1).clamp(min=0)
    assert metric.compute().item() == pytest.approx(expected.mean().item(), abs=1e-3)
    details = metric.details(resamples=50)
    resamples = expected.sort().values.double().repeat(50, 1) * resampled_counts(4, 50, seed=0)
    means = resamples.sum(dim=1).numpy() / 4
    interval = details["value"] + np.quantile(means - means.mean(), [0.025, 0.975])
    assert details["interval"] == pytest.approx(interval, abs=1e-3)
    assert (details["num_images"], details["captions_cut"], metric.name) == (4, 0, "CLIP score (tiny CLIP)")
    metric.reset()
    with pytest.raises(ValueError, match="CLIP score"):
        metric.compute()


def test_clip_score_counts_truncated_captions(clip):
    metric = load_clip_score(str(clip[0]))
    metric.update(photos(16, 16, count=2), ["a cat " * 30, "a cat"])
    assert metric.details()["captions_cut"] == 1
    with pytest.raises(ValueError, match="`captions`"):
        metric.update(photos(16, 16, count=2), ["a cat"])


def test_clip_score_needs_a_whole_clip(tmp_path):
    saved(tmp_path / "dino", "dinov2_registers")
    saved(tmp_path / "half", "clip")
    for folder in ("dino", "half"):
        with pytest.raises(ValueError, match="`metrics`"):
            load_clip_score(str(tmp_path / folder))
