"""The configuration of a run: precedence of flags, recipes and defaults, and rejection of invalid settings."""

import ast
import dataclasses
import json
import math
import re
import shutil
import typing
from pathlib import Path

import PIL.Image
import pytest

from diffusers_prx.cli import error_message
from diffusers_prx.config.data_sources import DataSource, data_sources_of
from diffusers_prx.config.fields import (
    AT_LEAST_ONE,
    FRACTION,
    FRACTION_ABOVE_ZERO,
    FRACTION_BELOW_ONE,
    NON_NEGATIVE,
    POSITIVE,
    Range,
    Tag,
    config_fields,
    field_names,
)
from diffusers_prx.config.training_config import TrainingConfig, complete_settings
from diffusers_prx.training.recipes import (
    CONVERTED_SETTINGS,
    FLAG_HINTS,
    load_recipe,
    parse_command_line,
    parse_config,
    parse_run_config,
)
from diffusers_prx.training.stages import build_stages, quiet_data

ROOT = Path(__file__).resolve().parents[2]
NEEDED = {"dataset_name": "scenes", "transformer_config": {"depth": 2}, "text_encoder_name_or_path": "t5"}
FLAGS = ["--dataset_name", "scenes", "--transformer_config", "{depth: 2}", "--text_encoder_name_or_path", "t5"]
FIELDS = [option.name for option in dataclasses.fields(TrainingConfig)]


def recipe(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return ["--config", str(path)]


def test_flags_override_the_recipe_and_the_recipe_the_defaults(tmp_path):
    argv = recipe(tmp_path, "seed: 7\nshift: 3\nuse_ema: true\n") + FLAGS + ["--seed", "9", "--use_ema", "false"]
    cfg = parse_config(argv)
    assert (cfg.seed, cfg.shift, cfg.use_ema, cfg.train_batch_size) == (9, 3.0, False, 32)
    assert cfg.transformer_config == {"depth": 2}


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_learning_rate_notations_are_equal(tmp_path, text):
    from_recipe = parse_config(recipe(tmp_path, f"learning_rate: {text}\n") + FLAGS).learning_rate
    assert from_recipe == parse_config([*FLAGS, "--learning_rate", text]).learning_rate == 1e-4


def test_words_that_yaml_converts_are_read_as_typed(tmp_path):
    assert parse_config(recipe(tmp_path, "mixed_precision: no\noutput_dir: 2024\n") + FLAGS).mixed_precision == "no"
    assert parse_config([*FLAGS, "--mixed_precision", "no", "--report_to", "none"]).mixed_precision == "no"
    cfg = parse_config([*FLAGS, "--output_dir", "1e5", "--caption_column", "yes", "--lr_decay_steps", "null"])
    assert (cfg.output_dir, cfg.caption_column, cfg.lr_decay_steps) == ("1e5", "yes", None)
    assert parse_config([*FLAGS, "--random_flip", "--dataset_name", "x"]).random_flip is True
    assert parse_config([*FLAGS, "--validation_prompts", "[a cat, a dog]"]).validation_prompts == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("seed", "1.5", "int, in [0, 2**32)"),
        ("train_batch_size", "true", "int, at least 1"),
        ("learning_rate", "fast", "float, greater than 0"),
        ("use_ema", "1", "bool"),
        ("checkpoints_total_limit", "all", "int | null, at least 1"),
        ("text_encoder_config", "[1]", "dict"),
        ("optimizer", "sgd", "adamw | muon"),
        ("mixed_precision", "fp16", "auto | no | bf16"),
        ("output_dir", "null", "str"),
    ],
)
def test_wrong_types_are_rejected_in_flags_and_recipes(tmp_path, name, value, accepted):
    for argv in ([*FLAGS, f"--{name}", value], recipe(tmp_path, f"{name}: {value}\n") + FLAGS):
        with pytest.raises(ValueError, match=f"`{name}`.*{re.escape(accepted)}"):
            parse_config(argv)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("seed", [-1, 2**32]),
        ("learning_rate", [0, float("nan"), float("inf"), -1.0]),
        ("caption_dropout", [-0.1, 1.1, float("nan")]),
        ("validation_guidance_scale", [0.5, float("nan")]),
        ("validation_prompts", [["a cat", None]]),
        ("route_range", [[2], [2, 2], [5, 2], [-1, 3], [0.5, 2], [1, 2, 3], []]),
    ],
)
def test_values_out_of_range_are_rejected(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}`") as error:
            TrainingConfig(**NEEDED, **{name: value})
        assert str(value) in str(error.value)


def test_every_number_has_a_range():
    """Zero is a value of counts, probabilities and weights only."""
    numbers = {name: field for name, field in config_fields(TrainingConfig).items() if number_type(field.type_hint)}
    assert [name for name, field in numbers.items() if field.range is None] == []
    allow_zero = {name for name, field in numbers.items() if 0 in field.range}
    for name in numbers.keys() - allow_zero:
        with pytest.raises(ValueError, match=f"`{name}`.*0"):
            TrainingConfig(**NEEDED, **{name: 0})
    assert not {"resolution", "train_batch_size", "max_train_steps", "learning_rate", "shift"} & allow_zero


def number_type(hint) -> bool:
    return any(kind in (int, float) for kind in (typing.get_args(hint) or (hint,)))


PHOTOS = {"name": "photos"}
TWO = {"dataset_name": None, "data_sources": [PHOTOS, {"name": "tars/{0..3}.tar"}]}
WEIGHTED = {"dataset_name": None, "data_sources": [PHOTOS | {"weight": 3}, {"name": "scenes", "weight": 0.5}]}
EMOJI = {"dataset_name": "emoji_scenes", "emoji_dir": "emoji"}
STREAM = {"dataset_name": "photos", "streaming": True}
REPA = {"repa_weight": 0.5, "repa_teacher": "dino"}
DINO = {"dino_weight": 0.01, "dino_teacher": "dino"}


def sources(*entries) -> dict:
    return {"data_sources": list(entries)}


@pytest.mark.parametrize(
    ("valid", "changes", "message"),
    [
        # the model
        ({}, {"transformer_config": {}}, "`pretrained_model_name_or_path`.*`transformer_config`"),
        ({}, {"text_encoder_name_or_path": None}, "`text_encoder_name_or_path`.*`text_encoder_config`"),
        ({}, {"revision": "main"}, "`revision` is 'main'.*`pretrained_model_name_or_path`"),
        ({"pretrained_model_name_or_path": "."}, {"revision": "main"}, "`revision` is 'main'"),
        ({}, {"text_encoder_config": {"hidden_size": 8}}, "`text_encoder_config`.*`text_encoder_name_or_path`"),
        (
            {},
            {"text_encoder_name_or_path": None, "text_encoder_config": {"hidden_size": 8}},
            "`text_encoder_config`.*`train_text_encoder`",
        ),
        # the data
        ({}, {"dataset_name": None}, "`dataset_name` is None, `train_data_dir` is None"),
        ({}, {"train_data_dir": "photos"}, "`train_data_dir` is 'photos'"),
        ({}, {"dataset_config_name": "fr"}, "`dataset_config_name` is 'fr'"),
        ({"dataset_name": None, "train_data_dir": "x"}, {"dataset_config_name": "fr"}, "`dataset_config_name`"),
        ({}, {"random_flip": True}, "`random_flip`"),
        ({}, {"streaming": True}, "`streaming`"),
        (TWO, {"dataset_name": "scenes"}, "`dataset_name` is 'scenes'.*`data_sources`"),
        (TWO, sources("photos"), "`data_sources`.*'photos'"),
        (TWO, sources({"weight": 1}), "`data_sources`.*`name`.*{'weight': 1}"),
        (TWO, sources({"name": "a", "wieght": 1}), r"`data_sources`.*\['wieght'\].*\['name'"),
        (TWO, sources({"name": "a", "split": 3}), "`data_sources`: `split`.*3"),
        (TWO, sources(PHOTOS | {"weight": 1}, {"name": "b"}), r"`data_sources`.*\[1, None\]"),
        (TWO, sources(PHOTOS | {"weight": 0}), "`data_sources`: `weight`.*0"),
        (TWO, sources(PHOTOS | {"weight": True}), "`data_sources`: `weight`.*True"),
        (TWO, {"streaming": True}, "`data_sources`.*`weight`"),
        (TWO, {"caption_weights": {"a": 1}} | sources(PHOTOS | {"caption_column": "b"}), "`caption_column` 'b'"),
        (WEIGHTED, sources(PHOTOS, {"name": "scenes"}), "`data_sources`.*`weight`"),
        (WEIGHTED, sources({"name": "scenes", "split": "test"}), r"`data_sources`.*\['split'\].*scenes"),
        (WEIGHTED, {"aspect_ratio_buckets": "computed"}, "`aspect_ratio_buckets`.*`weight`"),
        (WEIGHTED, {"precomputed_dir": "x"}, "`precomputed_dir`.*`weight`"),
        (EMOJI, {"emoji_dir": None}, "`emoji_dir`"),
        (EMOJI, {"random_flip": True}, "`random_flip`.*emoji_scenes"),
        (EMOJI, {"precomputed_dir": "x", "center_crop": True}, "`precomputed_dir`.*`--scenes_size`"),
        (EMOJI, {"instance_prompt": "a cat"}, "`instance_prompt`.*emoji_scenes"),
        (STREAM, {"aspect_ratio_buckets": "study"}, "`aspect_ratio_buckets`.*`streaming`"),
        (STREAM, {"precomputed_dir": "x", "center_crop": True}, "`precomputed_dir`.*`streaming`"),
        ({}, {"caption_weights": {"long": 0}}, "`caption_weights`.*0 for long"),
        ({}, {"caption_weights": {"long": "much"}}, "`caption_weights`.*'much' for long"),
        # optimization
        ({}, {"lr_decay_steps": 10}, "`lr_decay_steps`.*`lr_scheduler`"),
        ({}, {"max_train_steps": 999, "lr_warmup_steps": 1000}, r"`lr_warmup_steps` \(1000\).* \(999\)"),
        (
            {"max_train_steps": 1500, "lr_scheduler": "linear"},
            {"lr_warmup_steps": 1000, "lr_decay_steps": 501},
            r"`lr_warmup_steps` \(1000\) and `lr_decay_steps` \(501\)",
        ),
        ({"use_ema": True}, {"max_train_steps": 9}, r"`ema_update_every` \(10\).*`max_train_steps` \(9\)"),
        ({"timestep_sampling": "uniform"}, {"uniform_fraction": 0.3}, r"`uniform_fraction` is 0\.3"),
        ({}, {"mixed_precision": "no", "weights_dtype": "bf16"}, "`weights_dtype` bf16"),
        ({}, {"activation_budget": 0.5}, "`activation_budget` is 0.5.*`gradient_checkpointing`"),
        ({}, {"hub_model_id": "me/prx"}, "`hub_model_id` is 'me/prx'.*`push_to_hub`"),
        # techniques
        ({"train_batch_size": 1}, {"contrastive_weight": 0.05}, "`contrastive_weight`.*`train_batch_size`"),
        ({}, {"repa_weight": 0.5}, "`repa_weight` is 0.5 and `repa_teacher` is None"),
        ({}, {"repa_teacher": "dino"}, "`repa_weight` is 0.0 and `repa_teacher` is dino"),
        ({}, {"dino_weight": 0.01}, "`dino_weight` is 0.01 and `dino_teacher` is None"),
        ({}, {"repa_spatial_gamma": 0.8}, "`repa_spatial_gamma` is 0.8.*`repa_weight`"),
        ({}, {"repa_until_step": 5}, "`repa_until_step` is 5.*`repa_weight`"),
        ({}, {"repa_check_steps": 5}, "`repa_check_steps` is 5.*`repa_weight`"),
        (REPA | {"repa_projector": "conv"}, {"route_ratio": 0.5}, "`repa_projector` is conv.*`route_ratio`"),
        ({}, {"lpips_backbone": "x"}, "`lpips_backbone` is x.*`lpips_weight`"),
        ({"lpips_weight": 0.1}, {"resolution": 30}, "`lpips_scale`.*30"),
        ({"dino_crop": True} | DINO, {"dino_size": 280}, "`dino_crop`.*280.*256"),
        ({}, {"perceptual_decode_latents": True}, "`perceptual_decode_latents`"),
    ],
)
def test_conflicting_settings_are_rejected(valid, changes, message):
    TrainingConfig(**NEEDED | valid)
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**NEEDED | valid | changes)


def test_sources_inherit_settings_of_the_run():
    run = {"dataset_split": "test", "image_column": "photo", "caption_column": "long", "scenes_caption": "short"}
    named = data_sources_of(TrainingConfig(**NEEDED | run | {"dataset_name": "a", "dataset_config_name": "fr"}))
    assert named == [DataSource("a", None, "fr", "test", "photo", "long")]
    folder = data_sources_of(TrainingConfig(**NEEDED | run | {"dataset_name": None, "train_data_dir": "a"}))
    assert folder == [DataSource("a", None, None, "test", "photo", "long")]
    own = {"name": "b", "weight": 2, "config_name": "de", "split": "x", "image_column": "y", "caption_column": "z"}
    listed = [PHOTOS | {"weight": 1}, own, {"name": "scenes", "weight": 1}]
    several = data_sources_of(TrainingConfig(**NEEDED | run | {"dataset_name": None, "data_sources": listed}))
    assert several == [
        DataSource("photos", 1, None, "test", "photo", "long"),
        DataSource("b", 2, "de", "x", "y", "z"),
        DataSource("scenes", 1, None, "test", "photo", "short"),
    ]


def test_stage_replaces_the_data():
    stage = {"dataset_name": None, "data_sources": [PHOTOS], "caption_weights": {"a": 1}, "streaming": True}
    (cfg,) = TrainingConfig(**NEEDED, stages=[stage]).stage_configs()
    assert [source.name for source in data_sources_of(cfg)] == ["photos"]
    with pytest.raises(ValueError, match="Stage 0: `dataset_name` is 'scenes'"):
        TrainingConfig(**NEEDED, stages=[{"data_sources": [PHOTOS]}])


def test_unknown_settings_are_rejected_with_a_suggestion(tmp_path):
    with pytest.raises(ValueError, match=r"unknown settings \['batchsize'\] \(did you mean train_batch_size\?\)"):
        parse_config(recipe(tmp_path, "batchsize: 3\n") + FLAGS)
    for flag in ("--batchsize", "--train_batch", "--train-batch-size=3"):  # no abbreviations either
        with pytest.raises(ValueError, match=rf"{flag}.*\(did you mean --train_batch_size\?\)"):
            parse_config([*FLAGS, flag, "3"])
    with pytest.raises(ValueError, match=r"unknown arguments: --qqqq 3; --help"):
        parse_config([*FLAGS, "--qqqq", "3"])


def test_invalid_recipe_files_are_rejected(tmp_path):
    with pytest.raises(ValueError, match="must be a mapping of settings, got list"):
        parse_config(recipe(tmp_path, "- seed\n"))
    with pytest.raises(ValueError, match=r"recipe\.yaml` is not valid YAML"):
        parse_config(recipe(tmp_path, "seed: [1\n"))
    with pytest.raises(ValueError, match=r"`config` is 'nowhere\.yaml', which is not a file"):
        parse_config(["--config", "nowhere.yaml"])
    with pytest.raises(ValueError, match="`transformer_config` is not valid YAML"):
        parse_config(["--transformer_config", "{depth: 2"])


# Recipes over recipes


def test_recipe_overrides_its_base_in_the_same_folder(tmp_path, monkeypatch):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "first.yaml").write_text(
        "output_dir: a\nseed: 1\nshift: 2\ntransformer_config: {depth: 2, theta: 9}\n"
    )
    (tmp_path / "cpu" / "second.yaml").write_text("base: ../first.yaml\noutput_dir: b\nseed: 3\n")
    (tmp_path / "third.yaml").write_text("base: cpu/second.yaml\noutput_dir: c\ntransformer_config: {depth: 4}\n")
    monkeypatch.chdir(tmp_path / "cpu")
    rest = ["--dataset_name", "scenes", "--text_encoder_name_or_path", "t5"]
    cfg = parse_config(["--config", str(tmp_path / "third.yaml"), *rest, "--shift", "5"])
    assert (cfg.output_dir, cfg.seed, cfg.shift) == ("c", 3, 5.0)
    assert cfg.transformer_config == {"depth": 4}  # whole: not a mixture of two networks


def test_recipe_with_a_base_needs_its_own_output_dir(tmp_path):
    (tmp_path / "first.yaml").write_text("output_dir: a\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml.*first\.yaml.*`output_dir`"):
        parse_config(recipe(tmp_path, "base: first.yaml\nseed: 3\n") + FLAGS)


@pytest.mark.parametrize("base", ["nowhere.yaml", "3", "[a]"])
def test_missing_base_is_rejected(tmp_path, base):
    with pytest.raises(ValueError, match=r"`config` is .*, which is not a file"):
        parse_config(recipe(tmp_path, f"base: {base}\noutput_dir: b\n") + FLAGS)
    (tmp_path / "first.yaml").write_text("sead: 1\n")
    with pytest.raises(ValueError, match=r"first\.yaml has unknown settings \['sead'\]"):
        parse_config(recipe(tmp_path, "base: first.yaml\noutput_dir: b\n") + FLAGS)


# Techniques and stages


@pytest.mark.parametrize("decoded", [{"lpips_weight": 0.1}, DINO])
def test_perceptual_losses_in_latents_when_they_are_decoded(decoded):
    cfg = TrainingConfig(**NEEDED, **decoded, vae_name_or_path="vae", perceptual_decode_latents=True)
    assert cfg.perceptual_decode_latents


@pytest.mark.parametrize(("base", "resolution", "shift"), [(None, 1024, 3.0), (512, 1024, 6.0), (512, 256, 1.5)])
def test_shift_grows_with_the_square_root_of_the_token_count(base, resolution, shift):
    cfg = TrainingConfig(**NEEDED, shift=3.0, resolution=resolution, shift_base_resolution=base)
    assert cfg.timestep_shift == pytest.approx(shift)
    if base is not None:
        assert cfg.timestep_shift == pytest.approx(3.0 * (resolution**2 / base**2) ** 0.5)


def test_run_without_stages_is_its_own_stage():
    cfg = TrainingConfig(**NEEDED)
    assert cfg.stage_configs() == [cfg]


def test_stages_change_the_run_not_each_other(tmp_path):
    text = "seed: 7\nlearning_rate: 2e-4\nstages:\n  - resolution: 512\n    max_train_steps: 2000\n"
    text += "  - learning_rate: 5e-5\n    lr_warmup_steps: 0\n    max_train_steps: 10\n"
    cfg = parse_config(recipe(tmp_path, text) + FLAGS)
    first, second = cfg.stage_configs()
    assert first == dataclasses.replace(cfg, stages=[], resolution=512, max_train_steps=2000)
    assert second == dataclasses.replace(
        cfg, stages=[], learning_rate=5e-5, lr_warmup_steps=0, max_train_steps=10
    )  # and not the 512 pixels of the stage before
    assert cfg.to_dict()["stages"][0] == {"resolution": 512, "max_train_steps": 2000}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"seed": 3}], r"Stage 0 changes \['seed'\]; a stage may change \[.*'resolution'"),
        ([{}, {"optimizer": "muon", "use_ema": True}], r"Stage 1 changes \['optimizer', 'use_ema'\]; a stage may"),
        ([{"stages": []}], r"Stage 0 changes \['stages'\]"),
        ([{}, {"resolution": "large"}], "Stage 1: `resolution` is 'large'; accepted: int"),
        ([{"max_train_steps": 10, "lr_warmup_steps": 11}], r"Stage 0: `lr_warmup_steps` \(11\)"),
        ([{}, REPA | {"repa_projector": "conv", "route_ratio": 0.5}], "Stage 1: `repa_projector` is conv"),
        ([3], "`stages` must be a list of mappings of settings, got 3"),
        ([{"max_train_steps": 2000}, REPA | {"repa_until_step": 2000}],
         "Stage 1: `repa_until_step` is 2000.*step 2000"),
    ],
)  # fmt: skip
def test_invalid_stages_are_rejected(stages, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**NEEDED, stages=stages)


def test_tags_do_not_contradict_each_other():
    per_stage, fixed, shared_cache, runtime, path = (set(field_names(TrainingConfig, tag)) for tag in Tag)
    assert not fixed & (per_stage | runtime)
    assert shared_cache <= per_stage
    assert not {"stages", "seed", "output_dir"} & per_stage
    assert {"seed", "optimizer", "weights_dtype", "prediction_type"} <= fixed
    assert {"resolution", "caption_weights", "instance_prompt", "train_data_dir", "max_crop"} <= shared_cache
    assert {"output_dir", "resume_from_checkpoint", "report_to"} <= runtime
    assert path == {name for name in FIELDS if name.endswith(("_path", "_dir", "_teacher", "_backbone"))} | {
        "dataset_name", "resume_from_checkpoint",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("range_", "inside", "outside"),
    [
        (AT_LEAST_ONE, (1, 10**9), (0, -1, math.inf, math.nan)),
        (POSITIVE, (1e-30, 5.0), (0, -1e-9, math.inf, math.nan)),
        (NON_NEGATIVE, (0, 5), (-1e-9, math.inf, math.nan)),
        (FRACTION, (0, 0.5, 1), (-1e-9, 1.1, math.nan)),
        (FRACTION_BELOW_ONE, (0, 0.999), (1, -0.1, math.nan)),
        (FRACTION_ABOVE_ZERO, (1e-9, 1), (0, 1.1, math.nan)),
    ],
    ids=lambda value: value.description if isinstance(value, Range) else "",
)
def test_ranges_accept_and_reject(range_, inside, outside):
    assert all(value in range_ for value in inside)
    assert not any(value in range_ for value in outside)


def test_help_shows_meaning_type_and_default_of_every_flag(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, setting in config_fields(TrainingConfig).items():
        assert len(setting.help) > 10
        assert f"--{name} " in text
        assert setting.help[:-1] in text
    assert "(adamw | muon; default: adamw)" in text
    assert "(int, at least 1; default: 32)" in text


def test_configurations_are_frozen_and_share_no_defaults():
    one, other = TrainingConfig(**NEEDED), TrainingConfig(**NEEDED)
    assert one.validation_prompts is not other.validation_prompts
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.seed = 3


def attributes_read() -> set[str]:
    """Names that the package and the scripts read from a configuration: cfg.name, self.cfg.name."""
    found = set()
    for file in [*(ROOT / "src").rglob("*.py"), *(ROOT / "training").glob("*.py")]:
        if file.name == "checks.py":  # checking a setting is not using it
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                if (isinstance(owner, ast.Name) and owner.id == "cfg") or (
                    isinstance(owner, ast.Attribute) and owner.attr == "cfg"
                ):
                    found.add(node.attr)
    return found


def test_every_setting_is_read():
    read = attributes_read()
    assert {"stage_configs", "timestep_shift", "repo_id", "warmup_steps"} <= read  # through which these are read
    through = {"stages", "shift", "shift_base_resolution", "hub_model_id", "lr_warmup_steps"}
    assert sorted(set(FIELDS) - read - through) == []


def test_flag_that_stages_would_override_is_rejected(tmp_path):
    recipe = tmp_path / "staged.yaml"
    recipe.write_text("dataset_name: scenes\nstages:\n  - {max_train_steps: 5}\n")
    with pytest.raises(ValueError, match=r"\['max_train_steps'\].*`--stages`"):
        parse_config(["--config", str(recipe), "--max_train_steps", "3"])


def test_recipe_that_is_its_own_base_is_rejected(tmp_path):
    (tmp_path / "one.yaml").write_text("base: two.yaml\noutput_dir: a\n")
    (tmp_path / "two.yaml").write_text("base: one.yaml\noutput_dir: b\n")
    with pytest.raises(ValueError, match="is its own `base`"):
        parse_config(["--config", str(tmp_path / "one.yaml")])


@pytest.mark.parametrize(("in_pixels", "cleaning"), [(True, "light"), (False, "full_v1")])
def test_older_records_are_completed_with_their_behavior(in_pixels, cleaning):
    """Older runs chose the cleaning by pixel or latent space, and always warmed up the average."""
    now = TrainingConfig(**NEEDED, caption_cleaning="full", ema_warmup=False).to_dict()
    then = {name: value for name, value in now.items() if name not in ("caption_cleaning", "ema_warmup")}
    read = TrainingConfig(**complete_settings(then, in_pixels))
    assert (read.caption_cleaning, read.ema_warmup) == (cleaning, True)
    assert TrainingConfig(**complete_settings(now, in_pixels)).to_dict() == now


# Pretrained pipelines, epochs and schedules


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of nine pictures with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(9):
        PIL.Image.new("RGB", (40 + number, 48), (20 * number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture number {number}")
    return folder


SMALL = str(ROOT / "model_cards" / "prx-scenes-small")
QUICKSTART = ["--config", str(ROOT / "training" / "recipes" / "quickstart.yaml")]


def test_stages_share_opened_data_and_its_warnings(pictures, caplog):
    (pictures / "0.txt").unlink()
    argv = ["--pretrained_model_name_or_path", SMALL, "--train_data_dir", str(pictures), "--train_batch_size", "4"]
    parse_run_config([*argv, "--num_train_epochs", "2"])  # looks at the data to count the steps
    assert not caplog.records
    cfg, _ = parse_run_config([*argv, "--stages", "[{max_train_steps: 2}, {max_train_steps: 2}]"])
    first, second = build_stages(cfg)
    assert len(first.source) == len(second.source) == 8
    assert [record.name for record in caplog.records] == ["diffusers_prx.data.folders"]
    with quiet_data():  # as on all processes but the main one
        build_stages(cfg)
    assert len(caplog.records) == 1


def test_pretrained_pipeline_provides_the_other_settings(pictures):
    cfg, notes = parse_run_config(["--pretrained_model_name_or_path", SMALL, "--train_data_dir", str(pictures)])
    taken = {"resolution": 32, "shift": 3.0, "prediction_type": "velocity", "noise_scale": 1.0}
    for name, value in (taken | {"max_sequence_length": 64, "caption_cleaning": "light"}).items():
        assert getattr(cfg, name) == value
        assert f"`{name}` {value}" in notes[0]
    lora, _ = parse_run_config(
        ["--pretrained_model_name_or_path", SMALL, "--dataset_name", "x"], {"lora_rank": 4, "shift": 5.0}
    )
    assert [getattr(lora, name) for name in taken] == list(taken.values())


def test_settings_that_override_the_pipeline_are_noted(tmp_path, pictures):
    argv = [*recipe(tmp_path, f"pretrained_model_name_or_path: {SMALL}\nshift: 2\nnoise_scale: 1\n")]
    cfg, notes = parse_run_config([*argv, "--train_data_dir", str(pictures), "--resolution", "64"])
    assert (cfg.resolution, cfg.shift, cfg.max_sequence_length) == (64, 2.0, 64)
    assert "`resolution` is 64 (flag); the pretrained pipeline has 32" in notes
    assert "`shift` is 2.0 (recipe); the pretrained pipeline has 3.0" in notes
    assert not any("`noise_scale` is" in note for note in notes)  # it is the same
    new = [*argv, "--dataset_name", "x", "--transformer_config", "{depth: 2}"]
    assert parse_run_config(new)[0].resolution == 256  # nothing of the pipeline's transformer is trained


def test_pipelines_that_cannot_be_trained_further_are_rejected(tmp_path):
    def saved(**changes):
        index = json.loads((Path(SMALL) / "model_index.json").read_text()) | changes
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        return ["--pretrained_model_name_or_path", str(tmp_path), "--dataset_name", "x"]

    shutil.copytree(Path(SMALL) / "scheduler", tmp_path / "scheduler")
    assert parse_run_config(saved())[0].resolution == 32
    with pytest.raises(ValueError, match=r"`resolution` is \[32\]"):
        parse_run_config(saved(default_sample_size=[32]))
    for name in ("FluxPipeline", None, []):
        with pytest.raises(ValueError, match=r"`pretrained_model_name_or_path`.*accepted"):
            parse_run_config(saved(_class_name=name))
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path` is 'me/nothing'") as error:
        parse_run_config(["--pretrained_model_name_or_path", "me/nothing", "--dataset_name", "x"])
    assert "not a local folder" in error_message(error.value)
    assert "The Hub could not be reached" in error_message(error.value)


def test_data_flag_replaces_the_recipes_data(tmp_path, pictures):
    line = parse_command_line([*QUICKSTART, "--instance_data_dir", str(pictures)])
    assert (line.settings["train_data_dir"], "dataset_name" in line.settings) == (str(pictures), False)
    assert line.notes == ["--train_data_dir replaces the recipe's `dataset_name` scenes"]
    listed = recipe(tmp_path, "data_sources: [{name: a}]\ndataset_split: all\ncaption_column: long\n")
    for flags in (["--dataset_name", "b"], ["--train_data_dir", "b"]):
        settings = parse_command_line([*listed, *flags]).settings
        assert settings.keys() == {"caption_column", flags[0][2:]}
    assert parse_command_line([*QUICKSTART, "--dataset_name", "b"]).settings["dataset_name"] == "b"
    staged = recipe(tmp_path, "stages: [{dataset_name: a}]\n")
    with pytest.raises(ValueError, match=r"\['dataset_name'\].*`--stages`"):
        parse_command_line([*staged, "--train_data_dir", "b"])


@pytest.mark.parametrize(
    ("steps", "decay", "warmup"),
    [(100_000, None, 1000), (10_000, None, 1000), (9_999, None, 999), (60, None, 6), (5, None, 0), (100, 95, 5)],
)
def test_default_warm_up_depends_on_the_run_length(steps, decay, warmup):
    schedule = {"max_train_steps": steps, "lr_decay_steps": decay, "lr_scheduler": "linear"}
    cfg = TrainingConfig(**NEEDED, **schedule)
    assert cfg.warmup_steps == warmup
    assert TrainingConfig(**NEEDED, **schedule, lr_warmup_steps=0).warmup_steps == 0
    staged = TrainingConfig(**NEEDED, stages=[{"max_train_steps": 50}, {"max_train_steps": 20_000}])
    assert [stage.warmup_steps for stage in staged.stage_configs()] == [5, 1000]


def test_recipe_schedule_is_shortened_with_the_run():
    cfg, notes = parse_run_config([*QUICKSTART, "--max_train_steps", "100"])
    assert (cfg.max_train_steps, cfg.lr_warmup_steps, cfg.lr_decay_steps) == (100, 14, 40)
    assert "`lr_warmup_steps` 100 becomes 14, `lr_decay_steps` 280 becomes 40" in notes[0]
    cfg, notes = parse_run_config([*QUICKSTART, "--max_train_steps", "380"])  # it fits as it is
    assert (cfg.lr_warmup_steps, cfg.lr_decay_steps, notes) == (100, 280, [])
    cfg, _ = parse_run_config([*QUICKSTART, "--max_train_steps", "1"])
    assert (cfg.lr_warmup_steps, cfg.lr_decay_steps) == (0, 1)
    with pytest.raises(ValueError, match=r"`lr_warmup_steps` \(200\) and `lr_decay_steps` \(40\)"):
        parse_run_config([*QUICKSTART, "--max_train_steps", "100", "--lr_warmup_steps", "200"])


def test_epochs_are_converted_to_steps(pictures, tmp_path, monkeypatch):
    start = ["--pretrained_model_name_or_path", SMALL, "--train_data_dir", str(pictures), "--num_train_epochs", "5"]
    cfg, notes = parse_run_config([*start, "--train_batch_size", "4"])
    assert cfg.max_train_steps == 12  # 45 samples
    assert "`num_train_epochs` 5: 12 steps of 4 of the 9 samples" in notes
    monkeypatch.setenv("WORLD_SIZE", "2")
    batch = ["--train_batch_size", "2", "--gradient_accumulation_steps", "3", "--num_validation_samples", "3"]
    assert parse_run_config([*start, *batch])[0].max_train_steps == 3  # 30 samples by 12
    cfg, notes = parse_run_config([*QUICKSTART, *start[2:]])  # replaces the recipe's steps
    assert (cfg.max_train_steps, cfg.lr_warmup_steps, cfg.lr_decay_steps) == (1, 0, 1)
    assert "--train_data_dir replaces the recipe's `dataset_name` scenes" in notes
    assert "--num_train_epochs replaces the recipe's `max_train_steps` 700" in notes
    of_recipe = recipe(tmp_path, "num_train_epochs: 5\n")
    assert parse_run_config([*of_recipe, *start[:-1], "6"])[0].max_train_steps == 1
    assert parse_run_config([*of_recipe, *start[:-2], "--max_train_steps", "7"])[0].max_train_steps == 7
    for argv, message in (
        ([*start, "--max_train_steps", "3"], "`num_train_epochs` and `max_train_steps`"),
        ([*FLAGS, "--num_train_epochs", "3"], "`num_train_epochs` is 3"),
        ([*start, "--stages", "[{resolution: 64}]"], "`num_train_epochs` is 5.*stages"),
        ([*start[:-1], "0"], "`num_train_epochs` must be at least 1, got 0"),
        (recipe(tmp_path, "num_train_epochs: 5\nmax_train_steps: 5\n"), "`num_train_epochs` and `max_train_steps`"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_run_config(argv)


def test_single_string_is_one_prompt(tmp_path):
    for flags, prompts in (
        (["--validation_prompts", "a cat: big, and a dog"], ["a cat: big, and a dog"]),
        (["--validation_prompt", "yes"], ["yes"]),
        (["--validation_prompts", "a cat", "a dog"], ["a cat", "a dog"]),
        (["--validation_prompts", "[a cat, a dog]"], ["a cat", "a dog"]),
        (["--validation_prompts", "[]"], []),
        (["--validation_prompt", "a cat", "--num_validation_images", "3"], ["a cat"] * 3),
    ):
        assert parse_config([*FLAGS, *flags]).validation_prompts == prompts
    assert parse_config([*recipe(tmp_path, "validation_prompts: a cat\n"), *FLAGS]).validation_prompts == ["a cat"]
    with pytest.raises(ValueError, match="`validation_prompts` is 3; accepted: list"):
        parse_config([*recipe(tmp_path, "validation_prompts: 3\n"), *FLAGS])


def test_names_of_diffusers_scripts_are_accepted_or_explained(tmp_path):
    flags = [
        "--optimizer",
        "AdamW",
        "--lr_scheduler",
        "constant_with_warmup",
        "--rank",
        "4",
        "--lora_layers",
        "up_proj, a",
    ]
    settings = parse_command_line(flags).settings
    assert settings == {
        "optimizer": "adamw", "lr_scheduler": "constant", "lora_rank": 4, "lora_layers": ["up_proj", "a"],
    }  # fmt: skip
    for flag in FLAG_HINTS:
        assert flag not in config_fields(TrainingConfig)
        for argv in ([f"--{flag}", "3"], [f"--{flag}=3"], [f"--{flag}"]):
            with pytest.raises(ValueError, match=re.escape(f"--{flag}`")):
                parse_command_line(argv)
        with pytest.raises(ValueError, match=re.escape(f"`{flag}`")):
            parse_command_line(recipe(tmp_path, f"{flag}: 3\n"))
    for named in re.findall(r"--(\w+)", " ".join(FLAG_HINTS.values())):  # what an answer names is there
        assert named in config_fields(TrainingConfig) | CONVERTED_SETTINGS


def test_home_and_variables_are_expanded_in_all_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PICTURES", "pics")
    names = [name for name in field_names(TrainingConfig, Tag.PATH) if name not in ("train_data_dir", "dataset_name")]
    needed = NEEDED | {
        "train_text_encoder": False, "repa_weight": 0.5, "dino_weight": 0.1, "lpips_weight": 0.1,
        "perceptual_decode_latents": True, "resolution": 256,
    }  # fmt: skip
    off = {"precomputed_dir"}  # excludes others
    cfg = TrainingConfig(**needed | dict.fromkeys(set(names) - off, "~/$PICTURES"))
    for name in set(names) - off:
        assert getattr(cfg, name) == f"{tmp_path}/pics"
    stages = [{"train_data_dir": "$HOME/a", "dataset_name": None}]
    staged = TrainingConfig(**NEEDED, stages=stages)
    assert staged.stage_configs()[0].train_data_dir == f"{tmp_path}/a"
    listed = TrainingConfig(**NEEDED | {"dataset_name": None, "data_sources": [{"name": "~/{0..3}.tar"}]})
    assert data_sources_of(listed)[0].name == f"{tmp_path}/{{0..3}}.tar"
    for untouched in ("a~b", "me/data", "$NOWHERE/x"):
        assert TrainingConfig(**NEEDED | {"output_dir": untouched}).output_dir == untouched
    (tmp_path / "mine.yaml").write_text("seed: 3\nbase: $HOME/base.yaml\noutput_dir: ~/x\n")
    (tmp_path / "base.yaml").write_text("shift: 2\n")
    cfg = parse_config(["--config", "~/mine.yaml", *FLAGS])
    assert (cfg.seed, cfg.shift, cfg.output_dir) == (3, 2.0, f"{tmp_path}/x")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefg", "bcdefgh")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nshift: 2\nseed: 2\n", r"has the key 'seed' twice \(line 3\)"),
        ('seed: 1\n"seed": 1\n', "has the key 'seed' twice"),
        ("transformer_config: {depth: 1, depth: 2}\n", "has the key 'depth' twice"),
        ("stages:\n- {seed: 1, seed: 2}\n", "has the key 'seed' twice"),
        (BOMB, "has more than 100,000 values once its aliases are written out"),
        ("stages: &a [*a]\n", "has an alias"),
        ("[" * 3000 + "]" * 3000, "nested too deeply"),
        ("? [a]\n: 1\n", "is not valid YAML"),
    ],
)
def test_ambiguous_yaml_is_rejected(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(Path(recipe(tmp_path, text)[1]))


def test_yaml_aliases_and_merge_keys_are_read(tmp_path):
    text = "stages:\n- &a {shift: 2, resolution: 64}\n- *a\n- {<<: *a, shift: 3}\n"
    stages = load_recipe(Path(recipe(tmp_path, text)[1]))["stages"]
    assert stages[1] == {"shift": 2, "resolution": 64}
    assert stages[2] == {"shift": 3, "resolution": 64}
