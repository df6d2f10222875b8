import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderRAE
from PIL import Image
from torch.distributions import Normal
from torch.distributions import kl_divergence as exact_kl_divergence
from training.tools import draw_sheet, make_lora_pictures, train_autoencoder, train_scenes_teacher
from transformers import AutoModel, Dinov2WithRegistersModel

import tiny
from diffusers_prx.data.scenes import BACKGROUNDS, COLORS, ScenesDataset, get_level, render_scene, sample_scene
from diffusers_prx.latents import EncodedImages, decode, encode
from diffusers_prx.techniques.teachers import load_teacher

TEACHER_SIZE = [
    "--hidden_size",
    "16",
    "--num_layers",
    "1",
    "--num_heads",
    "2",
    "--batch_size",
    "8",
    "--num_eval",
    "12",
]
VAE_SIZE = ["--base_channels", "8", "--batch_size", "8", "--num_eval", "64"]
CLASSES = {"kl": AutoencoderKL, "dc": AutoencoderDC, "flux2": AutoencoderKLFlux2}
CHANNELS = {"kl": 4, "dc": 4, "flux2": 16}


def fresh_pixels(count: int, seed: int = 77) -> torch.Tensor:
    """Scenes that no run here has seen, (count, 3, 32, 32) in [-1, 1]."""
    scenes = ScenesDataset(seed=seed, size=count)
    pixels = torch.from_numpy(np.stack([np.asarray(scenes[i]["image"]) for i in range(count)]))
    return pixels.permute(0, 3, 1, 2) / 127.5 - 1


def train_teacher(folder: Path, *flags: str) -> Path:
    train_scenes_teacher.main(["--output_dir", str(folder), "--steps", "2", *TEACHER_SIZE, *flags])
    return folder


def train_vae(folder: Path, kind: str, *flags: str) -> Path:
    train_autoencoder.main(["--output_dir", str(folder), "--kind", kind, "--steps", "3", *VAE_SIZE, *flags])
    return folder


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory) -> Path:
    return train_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module", params=list(CLASSES))
def vae_folder(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, train_vae(tmp_path_factory.mktemp(request.param), request.param)


# --- the scenes teacher: its labels


@pytest.mark.parametrize(
    ("level", "resolution", "patch_size"), [("easy", 32, 4), ("medium", 66, 6), ("hard", 128, 16)]
)
def test_patch_labels_agree_with_the_picture(level, resolution, patch_size):
    """How much an object covers is read from the picture, drawn with plain objects: of a color c on a background b
    a pixel p shows the share |p - b| / |c - b|."""
    definition, values = get_level(level), train_scenes_teacher.attribute_values(level)
    seen = 0
    for index in range(40):
        scene = sample_scene(index, seed=3, level=level)
        patches, _ = train_scenes_teacher.scene_labels(scene, resolution, patch_size)
        silhouettes = replace(scene, objects=tuple(replace(thing, texture="plain") for thing in scene.objects))
        pixels = np.asarray(render_scene(silhouettes, resolution), dtype=np.float64)
        background = np.array(BACKGROUNDS[scene.background], dtype=np.float64)
        side = resolution // patch_size
        for row in range(side):
            for column in range(side):
                y, x = row * patch_size, column * patch_size
                shown = np.linalg.norm(pixels[y : y + patch_size, x : x + patch_size] - background, axis=-1)
                center = (y + patch_size / 2) / resolution, (x + patch_size / 2) / resolution
                nearest = min(
                    scene.objects,
                    key=lambda thing: math.dist(center, [(thing.place[i] + 0.5) / definition.grid[i] for i in (0, 1)]),
                )
                contrast = np.linalg.norm(np.array(COLORS[nearest.color]) - background)
                share = (shown / contrast).mean()
                found = [options[i] for options, i in zip(values, patches[row * side + column].tolist())]
                if share < 0.2:
                    assert found == ["nothing"] * 4 + [scene.background]
                elif share > 0.3 and len(scene.objects) == 1:
                    assert found == [nearest.shape, nearest.color, nearest.size, nearest.texture, scene.background]
                    seen += 1
                elif share > 0.3:  # the patch may lie between two objects
                    assert found[0] in [thing.shape for thing in scene.objects]
    assert seen > 15


def test_place_labels_name_each_object_in_its_place():
    values = train_scenes_teacher.attribute_values("hard")
    for index in range(20):
        scene = sample_scene(index, seed=1, level="hard")
        _, places = train_scenes_teacher.scene_labels(scene, 128, 16)
        assert places.shape == (9, 5)
        found = {}
        for number, label in enumerate(places.tolist()):
            *thing, background = [options[i] for options, i in zip(values, label)]
            assert background == scene.background
            if thing != ["nothing"] * 4:
                found[number // 3, number % 3] = tuple(thing)
        assert found == {thing.place: (thing.shape, thing.color, thing.size, thing.texture) for thing in scene.objects}


def test_loss_weighs_objects_and_the_rest_alike():
    labels = torch.tensor([[[1, 2], [0, 0], [0, 0]], [[0, 0], [2, 1], [0, 0]]])  # (2, 3, 2)
    logits = [torch.randn(2, 3, 3), torch.randn(2, 3, 4)]
    expected = 0.0
    for i, of in enumerate(logits):
        costs = {True: [], False: []}
        for sample in range(2):
            for patch in range(3):
                scores = of[sample, patch].double().numpy()
                answer = labels[sample, patch, i].item()
                cost = np.log(np.exp(scores).sum()) - scores[answer]
                costs[labels[sample, patch, 0].item() > 0].append(cost)
        expected += (np.mean(costs[True]) + np.mean(costs[False])) / 2
    assert train_scenes_teacher.label_loss(logits, labels).item() == pytest.approx(expected, rel=1e-6)
    nothing = torch.zeros(2, 3, 2, dtype=torch.long)
    assert torch.isfinite(train_scenes_teacher.label_loss(logits, nothing))


def test_grades_count_what_is_right():
    """Of the first scene every shape is wrong, also where there is no object; of the second the size of one place."""
    args = train_scenes_teacher.parse_args(["--output_dir", "unused", "--num_eval", "10", "--batch_size", "4"])
    sizes = [len(values) for values in train_scenes_teacher.attribute_values("easy")]
    answers, on_object = [], []
    for _, patches, places in train_scenes_teacher.scene_batches(args, "heldout", 10):
        on_object += [(patch > 0).float().sum().item() for patch in patches[..., 0]]
        if not answers:
            patches, places = patches.clone(), places.clone()
            patches[0, :, 0], places[0, :, 0] = (patches[0, :, 0] + 1) % sizes[0], (places[0, :, 0] + 1) % sizes[0]
            places[1, 2, 2] = (places[1, 2, 2] + 1) % sizes[2]
        answers.append(
            tuple(
                [torch.nn.functional.one_hot(labels[..., i], size).float() for i, size in enumerate(sizes)]
                for labels in (patches, places)
            )
        )
    grades = train_scenes_teacher.grade(args, "heldout", lambda pixels_pm1: answers.pop(0))
    assert grades["patches"] == pytest.approx(0.9)
    assert grades["cls_places"] == pytest.approx(1 - 5 / 40)
    assert grades["cls_scenes"] == pytest.approx(0.8)
    share = 1 - on_object[0] / sum(on_object)
    assert grades["patches_on_objects"] == grades["shape_on_objects"] == pytest.approx(share)
    assert all(grades[f"{name}_on_objects"] == 1 for name in ("color", "size", "texture", "background"))


# --- the scenes teacher: the script


def test_teacher_is_a_dinov2_folder(teacher_folder):
    model = Dinov2WithRegistersModel.from_pretrained(teacher_folder).eval()
    assert isinstance(AutoModel.from_pretrained(teacher_folder), Dinov2WithRegistersModel)
    assert (model.config.num_register_tokens, model.config.patch_size, model.config.image_size) == (4, 4, 32)
    settings = json.loads((teacher_folder / "preprocessor_config.json").read_text())
    assert settings["size"] == {"height": 32, "width": 32}
    mean, std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    teacher, pixels_pm1 = load_teacher(teacher_folder), fresh_pixels(3)
    features = teacher(pixels_pm1, (8, 8))
    assert features.shape == (3, 64, 16)
    assert torch.isfinite(features).all()
    assert features.std(dim=1).min() > 0
    with torch.no_grad():
        tokens = model(((pixels_pm1 + 1) / 2 - mean) / std).last_hidden_state
    torch.testing.assert_close(features, tokens[:, 5:], rtol=0, atol=1e-5)
    # what it was trained on is [-1, 1]: the normalization that the file states leads back to it
    torch.testing.assert_close(((pixels_pm1 + 1) / 2 - mean) / std, pixels_pm1, rtol=0, atol=1e-6)


def test_teacher_says_how_good_it_is(tmp_path, capsys):
    train_teacher(tmp_path, "--level", "medium", "--resolution", "64", "--patch_size", "8", "--num_registers", "2")
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    report = json.loads((tmp_path / "training.json").read_text())
    assert report["accuracy"] == printed["accuracy"]
    for split in ("heldout", "novel"):
        for name in ("patches", "patches_on_objects", "shape_on_objects", "cls_places", "cls_scenes"):
            assert 0 <= report["accuracy"][split][name] <= 1
    assert (report["settings"]["level"], report["settings"]["steps"]) == ("medium", 2)
    assert load_teacher(tmp_path)(fresh_pixels(1), (4, 6)).shape == (1, 24, 16)


def test_teacher_learns(tmp_path):
    """Chance is one color in eight; measured after these 60 steps: 0.46 of the patches, and every background."""
    train_teacher(tmp_path, "--steps", "60", "--hidden_size", "32", "--num_eval", "64")
    accuracy = json.loads((tmp_path / "training.json").read_text())["accuracy"]["heldout"]
    assert accuracy["color_on_objects"] > 0.3
    assert accuracy["background_on_objects"] > 0.95


def test_teacher_of_a_seed(teacher_folder, tmp_path):
    weights = Dinov2WithRegistersModel.from_pretrained(teacher_folder).state_dict()
    again, other = (
        Dinov2WithRegistersModel.from_pretrained(train_teacher(tmp_path / seed, "--seed", seed)).state_dict()
        for seed in ("0", "1")
    )
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    assert not torch.equal(
        weights["encoder.layer.0.attention.q_proj.weight"], other["encoder.layer.0.attention.q_proj.weight"]
    )


# --- autoencoders


def test_autoencoder_loads_and_its_latents_are_standard(vae_folder):
    kind, folder = vae_folder
    vae = CLASSES[kind].from_pretrained(folder).eval()
    pixels_pm1 = fresh_pixels(200)
    with torch.no_grad():
        codes = encode(vae, pixels_pm1)
        latents = codes.draw(torch.randn_like(codes.mean))
        images = decode(vae, latents)
    assert latents.shape == (200, CHANNELS[kind], 8, 8)
    assert images.shape == pixels_pm1.shape
    assert torch.isfinite(images).all()
    assert latents.std().item() == pytest.approx(1, rel=0.1)
    if kind != "dc":
        assert latents.mean().item() == pytest.approx(0, abs=0.1)
    if kind == "flux2":
        torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(16), rtol=0.1, atol=0)
        torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(16), rtol=0, atol=0.1)
    report = json.loads((folder / "training.json").read_text())
    if kind == "kl":
        assert vae.config.shift_factor == pytest.approx(report["codes_mean"])
    if kind != "flux2":
        assert vae.config.scaling_factor == pytest.approx(1 / report["codes_std"])
    assert report["settings"]["kl_weight"] == (0 if kind == "dc" else 1e-4)


@pytest.mark.parametrize("kind", list(CLASSES))
def test_latents_of_any_codes_become_standard(kind):
    """Codes whose channels differ in mean and spread, far from the standard normal."""
    args = train_autoencoder.parse_args(["--output_dir", "unused", "--kind", kind, *VAE_SIZE])
    vae = train_autoencoder.build_vae(args).eval()
    last = vae.encoder.conv_out if kind == "dc" else vae.quant_conv
    with torch.no_grad():
        last.weight.mul_(5)
        last.bias[:4] = torch.tensor([3.0, -1.0, 0.0, 8.0])
    train_autoencoder.normalize_latents(vae, args)
    with torch.no_grad():
        codes = encode(vae, fresh_pixels(200))
    latents = codes.draw(torch.randn_like(codes.mean))
    if kind == "flux2":
        torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(16), rtol=0, atol=0.1)
        torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(16), rtol=0.1, atol=0)
    else:
        assert latents.std().item() == pytest.approx(1, rel=0.1)
    if kind == "kl":
        assert latents.mean().item() == pytest.approx(0, abs=0.1)


def test_psnr_is_that_of_the_saved_autoencoder(vae_folder):
    """One picture after the other, through diffusers' own encode and decode."""
    kind, folder = vae_folder
    vae = CLASSES[kind].from_pretrained(folder).eval()
    report = json.loads((folder / "training.json").read_text())
    for split in ("heldout", "novel"):
        values = []
        for index in range(64):
            image = np.asarray(render_scene(sample_scene(index, seed=0, level="easy", split=split), 32)) / 255
            pixels = torch.from_numpy(image).float().permute(2, 0, 1)[None] * 2 - 1
            with torch.no_grad():
                encoded = vae.encode(pixels)
                decoded = vae.decode(encoded.latent if kind == "dc" else encoded.latent_dist.mode()).sample
            decoded = (decoded[0].permute(1, 2, 0).double().numpy() + 1) / 2
            values.append(-10 * np.log10(np.mean((np.clip(decoded, 0, 1) - image) ** 2)))
        assert report["psnr"][split] == pytest.approx(np.mean(values), abs=1e-3)


def test_representation_autoencoder(tmp_path):
    """Only its decoder is trained; every channel of its latents becomes standard."""
    args = train_autoencoder.parse_args(["--output_dir", "unused", "--kind", "rae", "--steps", "3", *VAE_SIZE])
    torch.manual_seed(0)
    untrained = train_autoencoder.build_vae(args).eval()
    before = untrained.state_dict()
    batches = train_autoencoder.first_batches(args, "train", args.steps * args.batch_size)
    with torch.no_grad():
        codes = torch.cat([encode(untrained, train_autoencoder.to_pm1(batch)).mean for batch in batches])
    vae = AutoencoderRAE.from_pretrained(train_vae(tmp_path, "rae")).eval()
    with torch.no_grad():
        latents = encode(vae, fresh_pixels(200)).mean
    assert latents.shape == (200, 64, 8, 8)
    wanted = {"latents_mean": codes.mean(dim=(0, 2, 3)), "latents_std": codes.std(dim=(0, 2, 3), correction=0)}
    for name, value in wanted.items():
        assert value.std() > 0.01
        torch.testing.assert_close(torch.tensor(vae.config[name]).flatten(), value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(vae.state_dict()[f"_{name}"].flatten(), value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(latents.std(), torch.tensor(1.0), rtol=0.1, atol=0)
    for name, weight in vae.state_dict().items():
        if name.startswith("encoder."):
            assert torch.equal(weight, before[name])
    assert not torch.equal(vae.decoder.decoder_pred.weight, before["decoder.decoder_pred.weight"])


def test_autoencoder_of_a_seed(tmp_path):
    first, again, other = (
        train_vae(tmp_path / name, "kl", "--seed", seed) for name, seed in (("a", "0"), ("b", "0"), ("c", "1"))
    )
    weights = [AutoencoderKL.from_pretrained(folder).state_dict() for folder in (first, again, other)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not torch.equal(weights[0]["encoder.conv_in.weight"], weights[2]["encoder.conv_in.weight"])
    assert (first / "config.json").read_text() == (again / "config.json").read_text()


def test_autoencoder_learns(tmp_path):
    """Measured: 6 dB after 1 step, 15 dB after 30."""
    quality = []
    for steps in ("1", "30"):
        train_vae(tmp_path / steps, "dc", "--steps", steps)
        quality.append(json.loads((tmp_path / steps / "training.json").read_text())["psnr"]["heldout"])
    assert quality[1] > quality[0] + 4, quality


@pytest.mark.parametrize(
    ("kind", "downsample", "channels", "latents"),
    [
        ("kl", "2", "3", (3, 16, 16)),
        ("kl", "16", "4", (4, 2, 2)),
        ("dc", "8", "8", (8, 4, 4)),
        ("flux2", "2", "5", (20, 16, 16)),
    ],
)
def test_other_sizes(kind, downsample, channels, latents, tmp_path):
    train_vae(
        tmp_path, kind, "--downsample", downsample, "--latent_channels", channels, "--steps", "1", "--num_eval", "8"
    )
    vae = CLASSES[kind].from_pretrained(tmp_path)
    with torch.no_grad():
        assert encode(vae, fresh_pixels(1)).mean.shape == (1, *latents)


def test_kl_divergence():
    mean, std = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4) + 0.1
    expected = exact_kl_divergence(Normal(mean, std), Normal(torch.zeros(()), torch.ones(()))).mean()
    torch.testing.assert_close(train_autoencoder.kl_divergence(EncodedImages(mean, std)), expected)
    assert train_autoencoder.kl_divergence(EncodedImages(mean, None)) == 0


def test_kl_weight_counts(tmp_path):
    """By diffusers' own divergence. Measured: 22.3 and 0.66."""
    divergence = []
    for weight in ("0", "10"):
        train_vae(tmp_path / weight, "kl", "--kl_weight", weight, "--steps", "10", "--num_eval", "8")
        vae = AutoencoderKL.from_pretrained(tmp_path / weight)
        with torch.no_grad():
            divergence.append(vae.encode(fresh_pixels(8)).latent_dist.kl().mean().item())
    assert divergence[1] < 0.5 * divergence[0], divergence


def test_alignment_reaches_the_autoencoder(teacher_folder, tmp_path):
    """With the weight 0 nothing learns the projection. Measured cosines: -0.17 and 0.49."""
    cosines, weights = [], []
    for weight in ("0", "1"):
        flags = ("--align_to", str(teacher_folder), "--align_weight", weight, "--steps", "30")
        folder = train_vae(tmp_path / weight, "dc", *flags)
        cosines.append(json.loads((folder / "training.json").read_text())["alignment_cosine"])
        weights.append(AutoencoderDC.from_pretrained(folder).state_dict())
    assert cosines[1] > max(cosines[0], 0) + 0.2, cosines
    assert not torch.equal(weights[0]["encoder.conv_in.weight"], weights[1]["encoder.conv_in.weight"])


def pictures(folder: Path) -> Path:
    """A folder of parquet files with two splits that `datasets` knows by their README.md, of 48 x 32 pixels."""
    folder.mkdir()
    scenes = ScenesDataset(seed=5, size=40)
    for split, indices in (("train", range(30)), ("kept", range(30, 40))):
        images = [{"bytes": to_png(scenes[index]["image"].resize((48, 32)))} for index in indices]
        pq.write_table(pa.table({"picture": images}), folder / f"{split}-0.parquet")
    lines = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split in ("train", "kept"):
        lines += [f"  - split: {split}", f"    path: {split}-*.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


def to_png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_autoencoder_learns_on_your_pictures(tmp_path):
    """The PSNR is that of the pictures of the split, cut to squares, one by one."""
    data = pictures(tmp_path / "data")
    flags = ("--dataset_name", str(data), "--image_column", "picture", "--eval_splits", "kept", "--steps", "6")
    folder = train_vae(tmp_path / "vae", "dc", *flags)
    report = json.loads((folder / "training.json").read_text())
    vae = AutoencoderDC.from_pretrained(folder).eval()
    values = []
    for row in pq.read_table(data / "kept-0.parquet").to_pylist():
        image = np.asarray(Image.open(io.BytesIO(row["picture"]["bytes"])))[:, 8:40] / 255
        pixels = torch.from_numpy(image).float().permute(2, 0, 1)[None] * 2 - 1
        with torch.no_grad():
            decoded = vae.decode(vae.encode(pixels).latent).sample
        decoded = (decoded[0].permute(1, 2, 0).double().numpy() + 1) / 2
        values.append(-10 * np.log10(np.mean((np.clip(decoded, 0, 1) - image) ** 2)))
    assert report["psnr"] == {"kept": pytest.approx(np.mean(values), abs=1e-3)}


def test_split_that_is_missing_is_named_before_the_training(tmp_path):
    data = pictures(tmp_path / "data")
    with pytest.raises(SystemExit, match="other"):
        train_vae(tmp_path / "vae", "dc", "--dataset_name", str(data), "--image_column", "picture",
                  "--eval_splits", "other", "--steps", "100000")  # fmt: skip
    assert not (tmp_path / "vae").exists()


def test_perceptual_loss_reaches_the_autoencoder(teacher_folder, tmp_path):
    weights = []
    for weight in ("0", "1"):
        flags = ("--perceptual_network", str(teacher_folder), "--perceptual_weight", weight, "--perceptual_size", "32")
        weights.append(AutoencoderDC.from_pretrained(train_vae(tmp_path / weight, "dc", *flags)).state_dict())
    plain = AutoencoderDC.from_pretrained(train_vae(tmp_path / "plain", "dc")).state_dict()
    assert all(torch.equal(plain[name], value) for name, value in weights[0].items())
    assert not torch.equal(weights[0]["decoder.conv_out.weight"], weights[1]["decoder.conv_out.weight"])


# --- wrong use


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--level", "impossible"], "invalid choice: 'impossible'"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--num_registers", "-1"], "--num_registers must be at least 0, got -1"),
        (["--learning_rate", "0"], "--learning_rate must be positive, got 0.0"),
        (["--patch_size", "5"], "--resolution 32 must be a multiple of --patch_size 5"),
        (["--num_heads", "3"], "--hidden_size 128 must be a multiple of --num_heads 3"),
        (["--resolution", "16"], "`resolution` is 16; accepted: 32 to 256 pixels"),
    ],
)
def test_wrong_flags_of_the_teacher(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_scenes_teacher.main(["--output_dir", str(tmp_path), *flags])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kind", "vq"], "invalid choice: 'vq'"),
        (["--kind", "kl", "--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["--kind", "kl", "--learning_rate", "nan"], "--learning_rate must be positive, got nan"),
        (["--kind", "kl", "--resolution", "512"], "`resolution` is 512; accepted: 32 to 256 pixels"),
        (
            ["--kind", "kl", "--downsample", "6"],
            "--downsample must be a power of 2 that divides --resolution 32, got 6",
        ),
        (["--kind", "kl", "--downsample", "1"], "--downsample must be a power of 2"),
        (["--kind", "kl", "--downsample", "64"], "--downsample must be a power of 2 that divides --resolution 32"),
        (["--kind", "kl", "--base_channels", "12"], "--base_channels must be a multiple of 8, got 12"),
        (
            ["--kind", "dc", "--latent_channels", "5"],
            "--latent_channels must divide the deepest width 64 of dc, got 5",
        ),
        (["--kind", "dc", "--kl_weight", "0.1"], "--kl_weight needs --kind kl or flux2"),
        (["--kind", "kl", "--kl_weight", "-1"], "--kl_weight must be at least 0, got -1.0"),
        (["--kind", "kl", "--align_weight", "1"], "--align_weight needs --align_to"),
        (["--kind", "kl", "--perceptual_size", "64"], "--perceptual_size needs --perceptual_network"),
        (["--kind", "kl", "--layers_per_block", "0"], "--layers_per_block must be at least 1"),
        (["--kind", "dc", "--layers_per_block", "0", "1"], "--layers_per_block must be at least 1"),
        (["--kind", "kl", "--eval_splits", "x"], "--eval_splits is for --dataset_name"),
    ],
)
def test_wrong_flags_of_the_autoencoder(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_autoencoder.main(["--output_dir", str(tmp_path), *flags])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_teacher_that_is_none(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: The teacher .* has no preprocessor_config\.json"):
        train_vae(tmp_path / "vae", "kl", "--align_to", str(tmp_path))


@pytest.fixture(scope="module")
def emoji_dir(tmp_path_factory) -> Path:
    """An emoji data set of twemoji, and the mushroom of noto: each drawing a bar of 30 x 10 pixels on nothing."""
    folder = tmp_path_factory.mktemp("emoji")
    (folder / "64").mkdir()
    bar = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    bar.paste((0, 0, 0, 255), (20, 30, 50, 40))
    bar.save(png := io.BytesIO(), "PNG")
    names = [(name, "twemoji") for name in (make_lora_pictures.MUSHROOM, *make_lora_pictures.PLAIN.values())]
    names.append((make_lora_pictures.MUSHROOM, "noto"))
    for split, own in (("train", names[:-2]), ("heldout_pairs", names[-2:-1]), ("unseen_names", names[-1:])):
        rows = [
            {"image": {"bytes": png.getvalue()}, "name": name, "style": style, "skin_tone": ""}
            | dict.fromkeys(("label", "text", "long"), name)
            for name, style in own
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "64" / f"{split}-00000-of-00001.parquet")
    (folder / make_lora_pictures.LICENSES).write_text("who drew what")
    return folder


@pytest.mark.parametrize(("kind", "count"), [("mushroom", 8), ("emoji", 26)])
def test_lora_pictures_show_what_their_captions_say(tmp_path, emoji_dir, kind, count):
    make_lora_pictures.main(["--kind", kind, "--emoji_dir", str(emoji_dir), "--output_dir", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == len(list(tmp_path.glob("*.png"))) == count
    for row in rows:
        dark = np.argwhere(np.asarray(Image.open(tmp_path / row["file_name"]).convert("L")) < 128)
        assert (dark.max(axis=0) - dark.min(axis=0) + 1).tolist() == [5, 15]  # scaled as a whole, to a place's width
        vertical, horizontal = (dark.mean(axis=0) < 15.5).tolist()
        assert any(word in row["text"] for word in (("top", "upper") if vertical else ("bottom", "lower")))
        assert ("left" if horizontal else "right") in row["text"]
        assert row["text"].endswith(make_lora_pictures.STYLE) == (kind == "emoji")
        assert ("red mushroom" in row["text"]) == (kind == "mushroom")
    assert (tmp_path / make_lora_pictures.LICENSES).read_text() == "who drew what"


def test_lora_pictures_say_what_is_missing(tmp_path, emoji_dir):
    flags = ["--kind", "emoji", "--output_dir", str(tmp_path / "pictures")]
    with pytest.raises(SystemExit, match=r"`emoji_dir` is .*fetch_emoji\.py"):
        make_lora_pictures.main([*flags, "--emoji_dir", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="--style noto has no drawing of 'red-circle'"):
        make_lora_pictures.main([*flags, "--emoji_dir", str(emoji_dir), "--style", "noto"])


def test_prompts_of_a_file_are_drawn_from_the_same_noise(tmp_path, monkeypatch):
    """Whatever the batches; what the sheet gets is what single calls of the pipeline draw."""
    model, prompts, sheet = tmp_path / "model", tmp_path / "prompts.txt", tmp_path / "sheet.png"
    pipeline = tiny.pixel_pipeline()
    pipeline.save_pretrained(model)
    prompts.write_text("a red cat\n\n  a blue dog  \nthe price is $5 to $6\n")
    drawn = []
    monkeypatch.setattr(draw_sheet, "prompt_sheet", lambda pairs, path: drawn.extend(pairs))
    flags = ["--model", str(model), "--prompts", str(prompts), "--output", str(sheet), "--num_inference_steps", "2"]
    draw_sheet.main([*flags, "--batch_size", "2", "--seed", "3"])
    assert [prompt for prompt, _ in drawn] == ["a red cat", "a blue dog", "the price is $5 to $6"]
    pipeline.set_progress_bar_config(disable=True)
    for prompt, image in drawn:
        generator = torch.Generator().manual_seed(3)
        (alone,) = pipeline(prompt, num_inference_steps=2, guidance_scale=3.0, generator=generator).images
        assert np.abs(np.asarray(image, np.int16) - np.asarray(alone, np.int16)).max() <= 1
    monkeypatch.undo()
    draw_sheet.main(flags)
    with Image.open(sheet) as opened:
        assert opened.width == 990  # six columns
    prompts.write_text("\n \n")
    with pytest.raises(ValueError, match="has no line with a prompt"):
        draw_sheet.main(flags)
