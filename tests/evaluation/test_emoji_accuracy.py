"""Reading emoji back: against a slow reference, on pictures of a known answer, and in a whole evaluation."""

import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import emoji
import runs
from diffusers_prx.data.emoji import EmojiDrawings
from diffusers_prx.data.emoji_scenes import EmojiScenesDataset, drawing_box
from diffusers_prx.evaluation.emoji_accuracy import (
    GROUPS,
    choose_groups,
    find_ground,
    grade_group,
    nearest_ground,
    read_group,
    shares,
)
from diffusers_prx.evaluation.emoji_reader import TEMPERATURE, WHITE, EmojiReader
from diffusers_prx.evaluation.evaluate import EvaluationSettings, evaluate
from diffusers_prx.evaluation.reports import markdown_table, write_reports
from diffusers_prx.hub.cards import evaluation_results, without_folders
from diffusers_prx.techniques.teachers import load_teacher

SIDE = 32


@pytest.fixture(autouse=True)
def fresh_processes():
    """accelerate keeps its state in the process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(emoji.save_emoji(tmp_path_factory.mktemp("emoji")))


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network") / "eyes"
    folder.mkdir()
    return runs.save_teacher(folder, patch_size=16)


@pytest.fixture(scope="module")
def drawings(folder):
    return EmojiDrawings(folder, SIDE)


@pytest.fixture
def reader(drawings, network, tmp_path):
    return EmojiReader(drawings, load_teacher(network), tmp_path, batch_size=5)


def every(drawings):
    return [drawing for part in drawings.splits.values() for drawing in part]


def test_readings_are_those_of_a_slow_comparison(drawings, network, reader):
    """Pair by pair in float64, from what the network returns for single pictures."""
    teacher, everything = load_teacher(network), every(drawings)

    def look(picture):
        pixels = torch.tensor(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            features = teacher(pixels, (8, 8))[0].double().numpy()
        return features.reshape(4, 2, 4, 2, -1).mean((1, 3)).reshape(16, -1)  # 2 x 2 places are one

    known = [look(drawings.on_ground(drawing, WHITE, SIDE)) for drawing in everything]
    flat = np.concatenate(known)
    mean, std = flat.mean(0), flat.std(0)

    def cosine(one, other):
        one, other = ((features - mean) / std for features in (one, other))
        return (one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other)

    def share(best, key):
        powers = {name: np.exp(fit / TEMPERATURE) for name, fit in best.items()}
        return powers[key] / sum(powers.values())

    rng = np.random.default_rng(0)
    asked = [everything[place] for place in (0, 7, 20)]
    pictures = [rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for _ in asked]
    for drawing, picture, reading in zip(asked, pictures, reader.read(pictures, asked), strict=True):
        fits = [(cosine(look(picture), features), other) for features, other in zip(known, everything)]
        names = {}
        for fit, other in fits:
            if other.style != drawing.style:
                names[other.name] = max(fit, names.get(other.name, -2))
        best = sorted(names, key=names.get, reverse=True)
        assert reading.rank == best.index(drawing.name)
        assert reading.labels == tuple(name.replace("-", " ") for name in best[:5])
        by_fit = sorted(fits, key=lambda pair: pair[0], reverse=True)
        assert reading.style == next(other.style for _, other in by_fit if other.name != drawing.name)
        assert reading.version == next(other.style for _, other in by_fit if other.name == drawing.name)
        assert reading.name_probability == pytest.approx(share(names, drawing.name), rel=1e-3)
        styles = {}
        for fit, other in fits:
            if other.name != drawing.name:
                styles[other.style] = max(fit, styles.get(other.style, -2))
        assert reading.style_probability == pytest.approx(share(styles, drawing.style), rel=1e-3)


def test_a_drawing_is_not_compared_with_itself(drawings, reader):
    """Names are read among other styles and styles among other names, so that the best fit, itself, is in neither."""
    asked, *others = every(drawings)
    fit = torch.zeros(1 + len(others))
    fit[0] = 1.0
    place = next(
        place for place, other in enumerate(others) if (other.name != asked.name) & (other.style != asked.style)
    )
    fit[1 + place] = 0.5
    reading = reader._read(fit, asked)
    assert reading.labels[0] == others[place].label
    assert reading.rank == 1
    assert reading.style == others[place].style
    assert reading.version == asked.style


def test_a_name_of_one_style_is_refused(drawings, reader):
    lonely = every(drawings)[0]
    reader._style_of[:] = reader.styles.index(lonely.style)
    with pytest.raises(ValueError, match="`asked` has"):
        reader.read([drawings.on_ground(lonely, WHITE, SIDE)], [lonely])


def test_the_features_of_the_drawings_are_kept_by_network_and_content(drawings, network, folder, tmp_path):
    first = EmojiReader(drawings, load_teacher(network), tmp_path)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    again = EmojiReader(EmojiDrawings(folder, SIDE), load_teacher(network), tmp_path)
    assert file.stat().st_mtime_ns == written
    assert torch.allclose(first._known_features, again._known_features, atol=2e-3)  # kept in float16
    file.write_bytes(file.read_bytes()[:-9])
    mended = EmojiReader(drawings, load_teacher(network), tmp_path)
    assert torch.equal(mended._known_features, first._known_features)
    fewer = EmojiDrawings(emoji.save_emoji(tmp_path / "fewer", names=emoji.NAMES[:-3] + emoji.NAMES[-1:]), SIDE)
    EmojiReader(fewer, load_teacher(network), tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_grounds_are_named_by_their_color(drawings):
    scenes = EmojiScenesDataset(drawings, SIDE, split="heldout")
    for index in range(20):
        item = scenes[index]
        boxes = [drawing_box(thing.place, SIDE) for thing in item["scene"].objects]
        noisy = np.asarray(item["image"]) + np.random.default_rng(index).normal(0, 10, (SIDE, SIDE, 3))
        assert nearest_ground(find_ground(noisy, boxes)) == item["scene"].ground


@pytest.mark.parametrize("kind", ["drawings", "scenes"])
def test_groups_ask_for_what_they_say(folder, kind):
    groups = choose_groups(folder, [kind], "text", SIDE, 12, seed=1)[1]
    assert [group.name for group in groups] == list(GROUPS[kind])
    for group in groups:
        split = GROUPS[kind][group.name]
        wanted = "train" if split == "heldout" else split
        assert {emoji.split_of(question.asked.name, question.asked.style) for question in group.questions} == {wanted}
        for question in group.questions:
            text = group.prompts[question.prompt][1]
            assert question.asked.label in text.lower()
    again = choose_groups(folder, [kind], "text", SIDE, 12, seed=1)[1]
    assert [group.prompts for group in again] == [group.prompts for group in groups]
    assert [group.prompts for group in choose_groups(folder, [kind], "text", SIDE, 12, seed=2)[1]] != [
        group.prompts for group in groups
    ]


@pytest.mark.parametrize("kind", ["drawings", "scenes"])
def test_real_pictures_are_at_the_ceiling_and_others_are_not(folder, drawings, reader, kind):
    for group in choose_groups(folder, [kind], "text", SIDE, 12, seed=1)[1]:
        real = [group.real(place) for place in range(len(group.prompts))]
        report, graded = grade_group(group, real, {"eyes": reader})
        found = report["networks"]["eyes"]
        assert {name: found[name] for name in found["real"]} == found["real"]
        assert report["num_prompts"] == len(graded) == len(group.prompts)
        assert report["num_drawings"] == len(group.questions)
        moved = [*real[1:], real[0]]
        assert found["shuffled"] == shares(read_group(group, moved, reader), group.questions)
        assert [g.right for g in graded] == [not g.read_instead for g in graded]
        if kind == "scenes":
            assert report["ground"] == 1.0


def test_scenes_are_read_at_the_places_of_their_drawings(folder, reader):
    """Whatever stands at other places does not change a reading."""
    group = choose_groups(folder, ["scenes"], "text", SIDE, 12, seed=1)[1][0]
    real = [group.real(place) for place in range(12)]
    place = next(place for place in range(12) if len(group.boxes[place]) > 1)
    own = [question for question in group.questions if question.prompt == place]
    (top, left, side), changed = own[1].box, [picture.copy() for picture in real]
    ground = find_ground(real[place], group.boxes[place]).astype(np.uint8)
    changed[place][top : top + side, left : left + side] = ground
    readings = [read_group(group, pictures, reader) for pictures in (real, changed)]
    first = group.questions.index(own[0])
    assert readings[0][first] == readings[1][first]
    assert readings[0][first + 1] != readings[1][first + 1]


def settings(model, folder, network, **changes):
    values = {"model": str(model), "emoji": folder, "emoji_network": (str(network),), "num_prompts": 4}
    values |= {"num_inference_steps": 1, "guidance_scale": 1.0, "batch_size": 4, "seed": 3}
    return EvaluationSettings(**values | changes)


def test_a_whole_evaluation(model, folder, network, tmp_path):
    kinds = {"emoji_prompts": ("drawings", "scenes")}
    evaluation = evaluate(settings(model, folder, network, **kinds), tmp_path / "out", tmp_path / "cache")
    report = json.loads(json.dumps(evaluation.report))["emoji_accuracy"]
    assert list(report) == [*GROUPS["drawings"], *GROUPS["scenes"]]
    drawings, groups = choose_groups(folder, kinds["emoji_prompts"], "text", SIDE, 4, seed=3)
    pictures = sorted((tmp_path / "out" / "pictures").glob("*/*.png"))
    assert len(pictures) == sum(len(group.prompts) for group in groups)
    reader = EmojiReader(drawings, load_teacher(network), tmp_path / "cache")
    for group in groups:
        drawn = [graded.image for graded in evaluation.emoji[group.name]]
        assert [graded.prompt for graded in evaluation.emoji[group.name]] == [text for _, text in group.prompts]
        assert report[group.name] == json.loads(json.dumps(grade_group(group, drawn, {"eyes": reader})[0]))
    write_reports(evaluation, tmp_path / "out")
    table = markdown_table(evaluation.report)
    assert "emoji trained, name_top5 by eyes (real pictures " in table
    assert "| emoji scenes, ground |" in table
    with Image.open(tmp_path / "out" / "emoji.png") as sheet:
        assert sheet.width > sheet.height / 4
    shown = without_folders(evaluation.report)
    assert shown["evaluation"]["emoji_network"] == ["eyes"]
    assert folder not in json.dumps(shown)
    assert {result.dataset_split for result in evaluation_results(shown)} == set(report)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"emoji": None}, "`emoji_network`"),
        ({"emoji_network": ()}, "`emoji_network`"),
        ({"emoji_prompts": ("photos",)}, "`emoji_prompts` is 'photos'"),
        ({"emoji_caption": "label"}, "`emoji_caption` is 'label'"),
    ],
)
def test_wrong_settings(model, folder, network, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(model, folder, network, **changes)


def test_what_cannot_be_opened_is_refused_before_anything_is_drawn(model, folder, network, tmp_path):
    for changes, message in (
        ({"emoji": str(tmp_path)}, "`emoji_dir`"),
        ({"emoji_network": (str(tmp_path / "none"),)}, "none"),
        ({"emoji_network": (str(network), str(network))}, "`emoji_network` has two networks"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(settings(model, folder, network, **changes), tmp_path / "out", tmp_path / "cache")
    assert not list(tmp_path.glob("out/pictures/*/*.png"))
