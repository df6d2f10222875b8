"""Auxiliary losses against independent references, with random backbones and teachers instead of downloads."""

import copy
import json
import math
import re

import numpy as np
import pytest
import torch
import torchmetrics
from PIL import Image
from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, ResNetConfig, ResNetModel

from diffusers_prx.techniques.losses import (
    LPIPSLoss,
    contrastive_loss,
    dino_perceptual_loss,
    masked_mean,
    negative_indices,
    random_crop,
)
from diffusers_prx.techniques.teachers import build_teacher, load_teacher
from diffusers_prx.training.rng import StepRandom

PATCH = 4
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def resized(images, height, width, filter):
    """Pillow's antialiased resizing, one channel of float numbers at a time."""
    channels = [
        np.asarray(Image.fromarray(channel.numpy(), "F").resize((width, height), filter))
        for channel in images.flatten(0, 1).float()
    ]
    return torch.from_numpy(np.stack(channels)).view(*images.shape[:2], height, width)


def pair(batch=2, height=64, width=64):
    """A prediction that carries a gradient, and an image that would take one too, smooth enough to be an image."""
    images = 1.6 * resized(torch.rand(2 * batch, 3, 6, 5), height, width, Image.Resampling.BICUBIC) - 0.8
    predicted, pixels = (images + 0.05 * torch.randn_like(images)).clamp(-1, 1).chunk(2)
    return predicted.clone().requires_grad_(), pixels.clone().requires_grad_()


@pytest.mark.parametrize("selected", [3, 0])
def test_masked_mean_ignores_other_values_and_is_zero_without_any(selected):
    values = torch.tensor([1.0, 2.0, 6.0, math.nan, 100.0], requires_grad=True)
    mean = masked_mean(values, torch.arange(5) < selected)
    assert mean.item() == (3.0 if selected else 0.0)
    mean.backward()
    expected = [1 / 3] * 3 + [0.0] * 2 if selected else [0.0] * 5
    torch.testing.assert_close(values.grad, torch.tensor(expected))


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (["a", "b", "c"], [1, 2, 0]),
        (["a", "a", "b"], [2, 2, 0]),
        (["b", "a", "a", "c", "a"], [1, 3, 3, 4, 0]),
        (["a", "a", "a"], [-1, -1, -1]),
        (["a"], [-1]),
        ([], []),
        (["", "a", "b"], [-1, 2, 1]),  # a dropped caption has no negative and is none
        (["a", "", ""], [-1, -1, -1]),
        (["", "a", "", "a"], [-1, -1, -1, -1]),
    ],
)
def test_negative_indices_are_the_next_other_caption(captions, expected):
    negatives = negative_indices(captions)
    assert negatives.dtype == torch.long
    assert negatives.tolist() == expected


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        # predictions 1, 2, 4; targets 0, 3, 1: squared errors 1, 1, 9
        (["a", "b", "c"], 11 / 3 - 0.05 * (4 + 1 + 16) / 3),  # against 3, 1, 0
        (["a", "a", "b"], 11 / 3 - 0.05 * (0 + 1 + 16) / 3),  # against 1, 1, 0
        (["a", "b", ""], 11 / 3 - 0.05 * (4 + 4) / 2),  # against 3, 0, none
        (["a", "a", "a"], 11 / 3),
        (["", "a", "a"], 11 / 3),
    ],
)
def test_contrastive_objective_equals_a_manual_calculation(captions, expected):
    predicted, velocity = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 3.0, 1.0])
    predicted, velocity = predicted.view(3, 1, 1, 1).requires_grad_(), velocity.view(3, 1, 1, 1)
    flow = ((predicted - velocity) ** 2).mean()
    total = flow - 0.05 * contrastive_loss(predicted, velocity, captions)
    assert total.item() == pytest.approx(expected, rel=1e-6)


def test_contrastive_loss_equals_a_loop():
    captions = ["a cat", "a dog", "a dog", "", "a cat", "a tram", "a cat"]
    predicted, velocity = torch.randn(2, 7, 4, 3, 5, dtype=torch.float64)
    total, count = 0.0, 0
    for i in range(7):
        for step in range(1, 7):
            j = i + step if i + step < 7 else i + step - 7
            if captions[i] and captions[j] and captions[j] != captions[i]:
                difference = predicted[i].numpy() - velocity[j].numpy()
                total, count = total + np.square(difference).sum() / difference.size, count + 1
                break
    assert count == 6
    assert contrastive_loss(predicted, velocity, captions).item() == pytest.approx(total / count, rel=1e-6)


def test_contrastive_objective_has_the_papers_minimum():
    """The gradient is zero at (target - w other target) / (1 - w)."""
    velocity = torch.randn(4, 2, 3, 3)
    predicted = ((velocity - 0.05 * velocity.roll(-1, dims=0)) / 0.95).requires_grad_()
    loss = ((predicted - velocity) ** 2).mean() - 0.05 * contrastive_loss(predicted, velocity, list("abcd"))
    loss.backward()
    flow_alone = 2 * (predicted - velocity).abs().max() / velocity.numel()
    assert predicted.grad.abs().max() < 1e-5 * flow_alone


def test_contrastive_gradients_flow_to_the_prediction_only():
    predicted, velocity = torch.randn(2, 3, 2, 4, 4).unbind()
    predicted, velocity = predicted.clone().requires_grad_(), velocity.clone().requires_grad_()
    contrastive_loss(predicted, velocity, ["a", "b", "b"]).backward()
    others = velocity.detach()[[1, 0, 0]]
    torch.testing.assert_close(predicted.grad, 2 * (predicted.detach() - others) / others.numel())
    assert velocity.grad is None


def test_contrastive_loss_without_negatives_is_exactly_zero():
    predicted = torch.randn(3, 2, 4, 4, requires_grad=True)
    loss = contrastive_loss(predicted, torch.randn(3, 2, 4, 4), ["a", "a", ""])
    assert loss.item() == 0
    loss.backward()
    assert (predicted.grad == 0).all()


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory):
    """Cache of torchvision with a random VGG-16 under the published name, whose unused classifier is zero."""
    generator = torch.Generator().manual_seed(0)
    weights, channels, index = {}, 3, 0
    for width in [64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512]:
        if width == "pool":
            index += 1
            continue
        std = (2 / (9 * channels)) ** 0.5  # keeps activations near 1
        weights[f"features.{index}.weight"] = std * torch.randn(width, channels, 3, 3, generator=generator)
        weights[f"features.{index}.bias"] = 0.1 * torch.randn(width, generator=generator)
        channels, index = width, index + 2
    for index, shape in {0: (4096, 25088), 3: (4096, 4096), 6: (1000, 4096)}.items():
        weights[f"classifier.{index}.weight"] = torch.zeros(1, 1).expand(shape)
        weights[f"classifier.{index}.bias"] = torch.zeros(1).expand(shape[0])
    home = tmp_path_factory.mktemp("torch")
    file = home / "hub" / "checkpoints" / "vgg16-397923af.pth"
    file.parent.mkdir(parents=True)
    torch.save(weights, file)
    return home


@pytest.fixture(scope="module")
def lpips(torch_home):
    return LPIPSLoss(scale=0.5, backbone=torch_home / "hub" / "checkpoints" / "vgg16-397923af.pth")


def at_scale(lpips, scale):
    other = copy.copy(lpips)  # the same network
    other.scale = scale
    return other


def test_lpips_equals_torchmetrics(lpips, torch_home, monkeypatch):
    """torchmetrics reads the same random backbone from torchvision's cache; Pillow halves the images."""
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    predicted, pixels = (images.detach() for images in pair(3, 96, 70))
    small = [resized(images, 48, 35, Image.Resampling.BILINEAR).clamp(-1, 1) for images in (predicted, pixels)]
    expected = learned_perceptual_image_patch_similarity(*small, net_type="vgg", reduction="none")
    distance = lpips(predicted, pixels)
    assert distance.shape == (3,)
    assert distance.dtype == torch.float32
    assert expected.min() > 0.01
    torch.testing.assert_close(distance, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(at_scale(lpips, 1.0)(*small), expected, rtol=1e-5, atol=0)


def test_lpips_has_the_published_heads(lpips):
    folder = torchmetrics.__path__[0]
    heads = torch.load(f"{folder}/functional/image/lpips_models/vgg.pth", map_location="cpu", weights_only=True)
    assert len(heads) == 5
    state = lpips.net.state_dict()
    for name, head in heads.items():
        assert torch.equal(state[name], head)


def test_lpips_of_equal_images_is_zero(lpips):
    predicted, pixels = pair()
    assert lpips(predicted, predicted).tolist() == [0, 0]
    assert lpips(predicted, pixels).min() > 0.01
    gray = torch.zeros(1, 3, 64, 64, requires_grad=True)
    lpips(gray, torch.zeros(1, 3, 64, 64)).sum().backward()
    assert gray.grad.isfinite().all()


def test_lpips_at_half_resolution_ignores_single_pixels(lpips):
    gray = torch.zeros(1, 3, 64, 64)
    board = ((torch.arange(64)[:, None] + torch.arange(64)) % 2 * 2.0 - 1).expand(1, 3, 64, 64)
    assert at_scale(lpips, 1.0)(board, gray) > 100 * lpips(board, gray)


def test_lpips_gradients_flow_to_the_prediction_only(lpips):
    lpips.train()  # as a parent module does; the dropout stays off
    predicted, pixels = pair()
    loss = lpips(predicted, pixels)
    assert torch.equal(loss, lpips(predicted, pixels))
    loss[0].backward()
    assert predicted.grad[0].abs().sum() > 0
    assert (predicted.grad[1] == 0).all()  # samples do not mix
    assert pixels.grad is None
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in lpips.parameters())
    outside = torch.full((1, 3, 64, 64), 1.5) + 0.1 * torch.randn(1, 3, 64, 64)
    outside.requires_grad_()
    lpips(outside, pixels[:1]).sum().backward()
    assert outside.grad.abs().sum() > 0


def test_lpips_is_float32_under_autocast(lpips):
    predicted, pixels = (images.detach() for images in pair())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = lpips(predicted, pixels)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, lpips(predicted, pixels))


def test_lpips_from_torchvisions_cache_leaves_the_generator_unchanged(lpips, torch_home, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    before = torch.get_rng_state()
    cached = LPIPSLoss()
    assert torch.equal(torch.get_rng_state(), before)
    assert cached.scale == 0.5
    ours, theirs = cached.state_dict(), lpips.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_lpips_without_a_network_names_the_download(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = re.escape(str(tmp_path / "hub" / "checkpoints"))
    with pytest.raises(ValueError, match=rf"vgg16-397923af.pth .*{folder}.*`--lpips_backbone`"):
        LPIPSLoss()
    assert set(no_network) == {"download.pytorch.org"}
    no_network.clear()  # otherwise the network guard fails this test


def test_lpips_rejects_invalid_arguments(lpips, tmp_path):
    for scale in (0, 2):
        with pytest.raises(ValueError, match=rf"`scale` .* {scale}"):
            LPIPSLoss(scale=scale)
    with pytest.raises(ValueError, match="`backbone`"):
        LPIPSLoss(backbone=tmp_path / "vgg.pth")
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"`backbone` .*other.pth.*features.0.bias"):
        LPIPSLoss(backbone=tmp_path / "other.pth")
    lpips(torch.zeros(1, 3, 32, 40), torch.zeros(1, 3, 32, 40))
    with pytest.raises(ValueError, match=r"`pixels_pm1` of 30x40 .* 15x20"):
        lpips(torch.zeros(1, 3, 30, 40), torch.zeros(1, 3, 30, 40))


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """Tiny random DINOv2 with registers, and its teacher."""
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=6 * PATCH,
        patch_size=PATCH,
        num_register_tokens=3,
    )
    model = Dinov2WithRegistersModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # otherwise all patches have almost the same features
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("dino")
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": MEAN, "image_std": STD, "image_processor_type": "BitImageProcessor"})
    )
    return model, load_teacher(str(folder))


def slow_dino(model, predicted, pixels, rows, columns):
    """Compute the loss one image and one patch at a time, with Pillow's resizing and direct calls of the model."""
    losses = []
    for images in zip(predicted.detach(), pixels.detach()):
        features = []
        for image in images:
            image = resized(image[None].clamp(-1, 1), rows * PATCH, columns * PATCH, Image.Resampling.BICUBIC)
            image = ((image + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
            with torch.no_grad():
                features.append(model(pixel_values=image).last_hidden_state[0, 4:].double().numpy())
        assert len(features[0]) == rows * columns
        cosines = [a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in zip(*features)]
        losses.append(sum(1 - cosine for cosine in cosines) / len(cosines))
    return torch.tensor(losses)


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [
        (48, 48, 6, 6),
        (18, 18, 6, 6),
        (64, 32, 8, 4),
        (30, 47, 5, 8),
    ],  # about 36 patches
)
def test_dino_loss_equals_a_loop(dino, height, width, rows, columns):
    model, teacher = dino
    predicted, pixels = pair(3, height, width)
    loss = dino_perceptual_loss(teacher, predicted, pixels, size=6 * PATCH)
    expected = slow_dino(model, predicted, pixels, rows, columns)
    assert expected.min() > 0.001
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_dino_loss_of_a_crop_equals_a_loop(dino):
    model, teacher = dino
    predicted, pixels = pair(3, 40, 33)
    draws = torch.tensor([[0.0, 0.999999], [0.5, 0.25], [0.9, 0.0]])
    corners = [(0, 13), (10, 3), (18, 0)]  # of 21 rows and 14 columns where a square of 20 fits
    loss = dino_perceptual_loss(teacher, predicted, pixels, size=20, crop=draws)
    crops = [
        torch.stack([image[:, y : y + 20, x : x + 20] for image, (y, x) in zip(images, corners)])
        for images in (predicted, pixels)
    ]
    torch.testing.assert_close(loss.double(), slow_dino(model, *crops, 5, 5), rtol=1e-5, atol=0)


def test_dino_crop_has_the_same_position_in_both_images(dino):
    predicted, pixels = (images.detach() for images in pair(1, 40, 40))
    pixels = -pixels
    pixels[:, :, 10:30, 5:25] = predicted[:, :, 10:30, 5:25]
    loss = [
        dino_perceptual_loss(dino[1], predicted, pixels, 20, torch.tensor([[down / 21 + 0.01, 5 / 21 + 0.01]]))
        for down in (10, 11)
    ]
    assert abs(loss[0]) < 1e-6
    assert loss[1] > 1e-4


def test_loss_of_a_convolutional_network_equals_a_loop():
    """Each place of the feature map is compared by itself; the network sees images of 48 pixels at 96."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    model = ResNetModel(config).eval()  # one feature for 8 x 8 pixels
    predicted, pixels = pair(2, 48, 48)
    loss = dino_perceptual_loss(build_teacher(model, MEAN, STD, "x"), predicted, pixels, size=96)
    expected = []
    for images in zip(predicted.detach(), pixels.detach()):
        features = []
        for image in images:
            image = resized(image[None].clamp(-1, 1), 96, 96, Image.Resampling.BICUBIC)
            image = ((image + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
            with torch.no_grad():
                features.append(model(image).last_hidden_state[0].double().numpy())
        places = [(a[:, y, x], b[:, y, x]) for a, b in [features] for y in range(12) for x in range(12)]
        expected.append(sum(1 - a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in places) / 144)
    assert min(expected) > 1e-4
    torch.testing.assert_close(loss.double(), torch.tensor(expected), rtol=1e-4, atol=0)
    loss.sum().backward()
    assert predicted.grad.abs().max() > 0


def test_random_crop_positions_are_uniform():
    rng = StepRandom(0, 0, range(4000))
    draws = torch.stack([rng.uniform("top"), rng.uniform("left")], dim=1)
    images = torch.arange(12.0).view(1, 1, 3, 4).expand(4000, 1, 3, 4)
    corners = random_crop(images, 2, draws)[:, 0, 0, 0].long()
    counts = torch.bincount(corners, minlength=12)
    assert counts.nonzero().flatten().tolist() == [0, 1, 2, 4, 5, 6]
    assert (counts[counts > 0] - 4000 / 6).abs().max() < 100  # 667 each, standard deviation 24
    assert torch.equal(random_crop(images, 2, draws)[:, 0, 0, 0].long(), corners)


@pytest.mark.parametrize("crop", [None, torch.tensor([[0.1, 0.2], [0.3, 0.4]])], ids=["resized", "cropped"])
def test_dino_gradients_flow_to_the_prediction_only(dino, crop):
    teacher = dino[1]
    predicted, pixels = pair(2, 40, 40)
    with torch.no_grad():
        predicted[0, :, 12, 12] = 1.5  # clamped
    loss = dino_perceptual_loss(teacher, predicted, pixels, 24, crop)
    loss[0].backward()
    assert predicted.grad[0, :, 8:20, 8:20].abs().sum() > 0
    assert (predicted.grad[0, :, 12, 12] == 0).all()
    assert (predicted.grad[1] == 0).all()
    assert pixels.grad is None
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())


def test_dino_loss_rejects_invalid_sizes(dino):
    images = torch.zeros(1, 3, 40, 20)
    for size in (0, 22):
        with pytest.raises(ValueError, match=rf"`size` .*patch of 4 .* {size}"):
            dino_perceptual_loss(dino[1], images, images, size)
    with pytest.raises(ValueError, match=r"`size` .*24.* 40x20"):
        dino_perceptual_loss(dino[1], images, images, 24, torch.zeros(1, 2))
