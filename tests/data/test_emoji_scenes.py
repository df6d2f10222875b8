import dataclasses
import hashlib
import itertools
import json
import pickle
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import emoji
from diffusers_prx.data.emoji import STYLE_WORDS, EmojiDrawings, place_drawing, with_article
from diffusers_prx.data.emoji_scenes import (
    CENTER,
    EMOJI_SCENE_SPLITS,
    GROUNDS,
    LAYOUTS,
    PLACES,
    EmojiScenesDataset,
    drawing_box,
    long_caption,
    short_caption,
)

SIZES = (32, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(emoji.save_emoji(tmp_path_factory.mktemp("emoji"), SIZES))


def scenes(folder, count, **arguments):
    data = EmojiScenesDataset(folder, 32, **arguments)
    return [data.scene(index) for index in range(count)]


# of descriptions and captions of the tiny data set; no pixels, which follow Pillow's resampling
GOLDEN = "251ce673433b3595"


def test_descriptions_and_captions_are_the_same_in_every_version(folder):
    total = hashlib.sha256()
    for split in EMOJI_SCENE_SPLITS:
        for index, scene in enumerate(scenes(folder, 20, seed=3, split=split)):
            total.update(json.dumps(dataclasses.asdict(scene), sort_keys=True).encode())
            total.update(long_caption(scene, seed=3, index=index).encode())
            total.update(short_caption(scene, seed=3, index=index).encode())
    assert total.hexdigest()[:16] == GOLDEN


def test_samples_do_not_depend_on_order_or_size(folder):
    small, large = EmojiScenesDataset(folder, 64, seed=1, size=5), EmojiScenesDataset(folder, 64, seed=1)
    backwards = [large[i] for i in reversed(range(5))][::-1]
    for one, other in zip([small[i] for i in range(5)], backwards):
        assert (one["caption"], one["scene"]) == (other["caption"], other["scene"])
        assert one["image"].tobytes() == other["image"].tobytes()
    assert pickle.loads(pickle.dumps(large))[3]["image"].tobytes() == large[3]["image"].tobytes()


def test_a_scene_is_the_same_at_every_resolution(folder):
    small, large = EmojiScenesDataset(folder, 32), EmojiScenesDataset(folder, 64)
    for index in range(30):
        assert small.scene(index) == large.scene(index)
        assert small[index]["caption"] == large[index]["caption"]


def test_seed_index_and_split_each_change_the_scene(folder):
    reference = scenes(folder, 20)
    for change in ({"seed": 1}, {"split": "heldout"}, {"split": "heldout_pairs"}):
        other = scenes(folder, 20, **change)
        assert sum(one == two for one, two in zip(reference, other)) <= 1
    assert len(set(reference)) == 20


def test_scenes_use_all_of_training_and_nothing_else(folder):
    found = scenes(folder, 1500)
    pairs = {(thing.name, scene.style) for scene in found for thing in scene.objects}
    of_training = {pair for pair in itertools.product(emoji.NAMES, emoji.STYLES) if emoji.split_of(*pair) == "train"}
    assert pairs == of_training
    assert {scene.ground for scene in found} == set(GROUNDS)
    assert {len(scene.objects) for scene in found} == set(LAYOUTS)
    layouts = {frozenset(thing.place for thing in scene.objects) for scene in found}
    assert layouts == {frozenset(layout) for layout in itertools.chain(*LAYOUTS.values())}
    for scene in found:
        assert len({thing.name for thing in scene.objects}) == len(scene.objects)


@pytest.mark.parametrize("split", ["heldout_pairs", "unseen_names"])
def test_only_the_first_drawing_is_held_out(folder, split):
    for scene in scenes(folder, 300, split=split):
        first, *others = [emoji.split_of(thing.name, scene.style) for thing in scene.objects]
        assert first == split
        assert set(others) <= {"train"}
        assert all(thing.name != emoji.TONED for thing in scene.objects)


def test_held_out_combinations_are_never_trained(folder):
    """In no style, at no places, with any seed: the tiny data set is small enough to meet every coincidence."""

    def combinations(count, **arguments):
        return {
            (scene.ground, frozenset(thing.name for thing in scene.objects))
            for scene in scenes(folder, count, **arguments)
        }

    trained = combinations(4000) | combinations(4000, seed=1)
    held_out = combinations(200, split="heldout")
    assert not trained & held_out
    assert {len(names) for _, names in held_out} == set(LAYOUTS)
    singles = {combination for combination in trained if len(combination[1]) == 1}
    assert len(singles) > 0.85 * len(emoji.NAMES) * len(GROUNDS) * 10 / 12


def test_drawings_do_not_overlap_and_are_inside():
    for resolution in (32, 50, 64, 100, 128):
        for layout in itertools.chain(*LAYOUTS.values()):
            covered = np.zeros((resolution, resolution), dtype=int)
            for place in layout:
                top, left, side = drawing_box(place, resolution)
                assert min(top, left) >= 0
                assert max(top, left) + side <= resolution
                covered[top : top + side, left : left + side] += 1
            assert covered.max() == 1


def test_pictures_show_what_the_description_says(folder):
    data = EmojiScenesDataset(folder, 64)
    for index in range(40):
        item = data[index]
        scene, ground = item["scene"], np.array(GROUNDS[item["scene"].ground])
        rest = np.ones((64, 64), dtype=bool)
        for thing in scene.objects:
            top, left, side = drawing_box(thing.place, 64)
            cell = emoji.found_at(item["image"], (top, left, side)).astype(float)
            expected = np.full((side, side, 3), ground, dtype=np.uint8)
            drawing = emoji.draw(thing.name, scene.style, 64).resize((side, side), Image.Resampling.BOX)
            alpha = np.asarray(drawing)[..., 3:] / 255.0
            expected = alpha * np.asarray(drawing)[..., :3] + (1 - alpha) * expected
            assert np.abs(cell - expected).mean() < 8
            rest[top : top + side, left : left + side] = False
        assert (np.asarray(item["image"])[rest] == ground).all()


def parse(caption):
    """Read a long caption back: (labels by their places, style, ground)."""
    caption = caption.lower()
    words = "|".join(sorted((word.lower() for word in STYLE_WORDS.values()), key=len, reverse=True))
    style = re.search(rf"({words}) (style|drawing)", caption)[1]
    ground = re.search(rf"({'|'.join(GROUNDS)}) background|background is ({'|'.join(GROUNDS)})", caption)
    phrases = {phrase: place for place, phrases in PLACES.items() for phrase in phrases}
    at = "|".join(sorted(phrases, key=len, reverse=True))
    noun = rf"an? ({'|'.join(name.replace('-', ' ') for name in emoji.NAMES)})"
    found = {place: label for label, place in re.findall(rf"{noun} ({at})", caption)}
    found |= dict(re.findall(rf"({at}) there is {noun}", caption))
    return {phrases[place]: label for place, label in found.items()}, style, ground[1] or ground[2]


def test_long_captions_state_everything(folder):
    texts = []
    for index, scene in enumerate(scenes(folder, 300)):
        text = long_caption(scene, index=index)
        things = {thing.place: thing.name.replace("-", " ") for thing in scene.objects}
        # "there is" belongs to the place before it, so a parser that reads both ways needs the sentences apart
        found = {}
        for sentence in text.split(". "):
            found |= parse(f"{sentence}. noto style white background")[0]
        assert found == things, text
        assert parse(text)[1:] == (STYLE_WORDS[scene.style].lower(), scene.ground), text
        assert text[0].isupper()
        assert text.endswith(".")
        assert " a orange" not in text
        texts.append(re.sub("|".join((*things.values(), scene.ground)), "", text))
    assert len(set(texts)) > 100


def test_short_captions_name_drawings_and_style_only(folder):
    for index, scene in enumerate(scenes(folder, 100)):
        text = short_caption(scene, index=index)
        for thing in scene.objects:
            assert thing.label in text.lower()
        assert STYLE_WORDS[scene.style] in text
        assert not any(word in text for word in (" at ", " left", " right", "background", " center"))


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("red apple", "a red apple"),
        ("orange heart", "an orange heart"),
        ("glasses", "glasses"),
        ("bus", "a bus"),
        ("flag of Peru", "the flag of Peru"),
        ("man with red hair", "a man with red hair"),
    ],
)
def test_articles(label, expected):
    assert with_article(label) == expected


def test_the_smallest_size_that_is_large_enough_is_read(folder):
    assert EmojiScenesDataset(folder, 32).drawings.size == 32
    assert EmojiScenesDataset(folder, 64).drawings.size == 64
    with pytest.raises(ValueError, match=r"`emoji_dir`.*32, 64 pixels, but 80 .*--sizes 32 64 80"):
        EmojiScenesDataset(folder, 100)


def test_skin_tones_are_left_out(folder):
    drawings = EmojiDrawings(folder, 32)
    assert set(drawings.splits) == {"train", "heldout_pairs", "unseen_names"}
    assert all(drawing.name != emoji.TONED for part in drawings.splits.values() for drawing in part)


def test_a_resized_drawing_has_no_dark_rim(folder):
    """Transparent pixels are black in the file; a rim of them would be darker than both colors."""
    white = Image.new("RGB", (20, 20), "white")
    picture = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    picture.paste((255, 200, 0, 255), (8, 8, 24, 24))
    place_drawing(white, picture, (0, 0), 20)
    assert np.asarray(white)[..., 0].min() > 250


def test_grounds_are_clearly_apart():
    for one, other in itertools.combinations(GROUNDS.values(), 2):
        assert np.linalg.norm(np.subtract(one, other)) >= 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "`split` is 'test'; accepted: 'train', 'heldout', 'heldout_pairs', 'unseen_names'"),
        ({"caption": "tags"}, "`caption` is 'tags'"),
        ({"resolution": 16}, "`resolution` is 16"),
        ({"size": 0}, "`size` is 0"),
        ({"emoji_dir": "nowhere"}, "`emoji_dir` is 'nowhere', which is not .*fetch_emoji.py"),
    ],
)
def test_wrong_use_is_refused(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        EmojiScenesDataset(**{"emoji_dir": folder, "resolution": 32} | arguments)


def test_a_folder_of_other_tables_is_refused(folder, tmp_path):
    broken = emoji.save_emoji(tmp_path / "emoji")
    (broken / "32" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 is no table")
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet cannot be read as emoji data"):
        EmojiDrawings(broken, 32)
    table = pq.read_table(f"{folder}/32/train-00000-of-00001.parquet").drop_columns(["style"])
    pq.write_table(table, broken / "32" / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="cannot be read as emoji data"):
        EmojiDrawings(broken, 32)
    (broken / "32" / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match="`emoji_dir` has no drawing of the split train"):
        EmojiDrawings(broken, 32)


def test_an_index_outside_is_refused(folder):
    with pytest.raises(IndexError):
        EmojiScenesDataset(folder, 32, size=3)[3]


def test_the_center_is_larger():
    assert drawing_box(CENTER, 64)[2] > 1.5 * drawing_box((0, 0), 64)[2]
