"""The configuration: what is over what, and that everything wrong is refused before anything is loaded."""

import ast
import dataclasses
import re
import typing
from pathlib import Path

import pytest
import yaml

from diffusers_prx.training.config import TrainingConfig, parse_config

ROOT = Path(__file__).resolve().parents[2]
NEEDED = {"dataset_name": "scenes", "transformer_config": {"depth": 2}, "text_encoder_name_or_path": "t5"}
FLAGS = ["--dataset_name", "scenes", "--transformer_config", "{depth: 2}", "--text_encoder_name_or_path", "t5"]
ZERO_IS_OUT = [
    "tokenizer_vocab_size", "max_sequence_length", "resolution", "train_batch_size",
    "gradient_accumulation_steps", "max_train_steps", "ema_update_every", "validation_steps",
    "validation_inference_steps", "checkpointing_steps", "logging_steps", "checkpoints_total_limit",
    "lr_decay_steps", "learning_rate", "noise_scale", "shift", "max_grad_norm", "adam_epsilon",
    "validation_guidance_scale",
]  # fmt: skip
FIELDS = [option.name for option in dataclasses.fields(TrainingConfig)]


def recipe(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return ["--config", str(path)]


def test_flags_are_over_the_recipe_and_the_recipe_over_the_defaults(tmp_path):
    argv = recipe(tmp_path, "seed: 7\nshift: 3\nuse_ema: true\n") + FLAGS + ["--seed", "9", "--use_ema", "false"]
    cfg = parse_config(argv)
    assert (cfg.seed, cfg.shift, cfg.use_ema, cfg.train_batch_size) == (9, 3.0, False, 32)
    assert cfg.transformer_config == {"depth": 2}


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_every_way_of_writing_a_learning_rate(tmp_path, text):
    from_recipe = parse_config(recipe(tmp_path, f"learning_rate: {text}\n") + FLAGS).learning_rate
    assert from_recipe == parse_config([*FLAGS, "--learning_rate", text]).learning_rate == 1e-4


def test_words_that_yaml_reads_otherwise(tmp_path):
    assert parse_config(recipe(tmp_path, "mixed_precision: no\noutput_dir: 2024\n") + FLAGS).mixed_precision == "no"
    assert parse_config([*FLAGS, "--mixed_precision", "no", "--report_to", "none"]).mixed_precision == "no"
    cfg = parse_config([*FLAGS, "--output_dir", "1e5", "--caption_column", "yes", "--lr_decay_steps", "null"])
    assert (cfg.output_dir, cfg.caption_column, cfg.lr_decay_steps) == ("1e5", "yes", None)
    assert parse_config([*FLAGS, "--random_flip", "--dataset_name", "x"]).random_flip is True
    assert parse_config([*FLAGS, "--validation_prompts", "[a cat, a dog]"]).validation_prompts == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("seed", "many", "int"),
        ("seed", "1.5", "int"),
        ("train_batch_size", "true", "int"),
        ("learning_rate", "fast", "float"),
        ("learning_rate", "true", "float"),
        ("use_ema", "maybe", "bool"),
        ("use_ema", "1", "bool"),
        ("checkpoints_total_limit", "all", "int | null"),
        ("text_encoder_config", "[1]", "dict"),
        ("validation_prompts", "a cat", "list"),
        ("optimizer", "sgd", "adamw | muon"),
        ("report_to", "all", "tensorboard | wandb | trackio | none"),
        ("mixed_precision", "fp16", "no | bf16"),
        ("output_dir", "null", "str"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(tmp_path, name, value, accepted):
    for argv in ([*FLAGS, f"--{name}", value], recipe(tmp_path, f"{name}: {value}\n") + FLAGS):
        came = value if name in ("optimizer", "report_to") else yaml.safe_load(value)
        with pytest.raises(ValueError, match=re.escape(f"`{name}` got {came!r}; accepted: {accepted}.")):
            parse_config(argv)


@pytest.mark.parametrize("name", ZERO_IS_OUT)
def test_zero_is_out_of_range(name):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got 0"):
        TrainingConfig(**NEEDED, **{name: 0})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("seed", [-1, 2**32]),
        ("lr_warmup_steps", [-1]),
        ("adam_weight_decay", [-0.1, float("nan"), float("inf")]),
        ("learning_rate", [float("nan"), float("inf"), -1.0]),
        ("caption_dropout", [-0.1, 1.1, float("nan")]),
        ("uniform_fraction", [2.0]),
        ("max_corrupt_share", [1.5]),
        ("ema_decay", [1.0, float("nan")]),
        ("adam_beta1", [1.0]),
        ("adam_beta2", [-0.5]),
        ("muon_momentum", [1.0]),
        ("validation_guidance_scale", [0.5, float("nan")]),
        ("validation_prompts", [["a cat", None]]),
    ],
)
def test_a_value_out_of_range_is_refused_with_field_and_value(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}` .*") as error:
            TrainingConfig(**NEEDED, **{name: value})
        assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": None}, "`dataset_name` is None and `train_data_dir` is None"),
        ({"train_data_dir": "photos"}, "`train_data_dir` is 'photos': give exactly one"),
        ({"dataset_config_name": "fr"}, "`dataset_config_name` is 'fr'"),
        ({"dataset_name": None, "train_data_dir": "x", "dataset_config_name": "fr"}, "`dataset_config_name` is 'fr'"),
        ({"random_flip": True}, "`random_flip` would make the captions"),
        ({"transformer_config": {}}, "`pretrained_model_name_or_path`, or a `transformer_config`"),
        ({"text_encoder_name_or_path": None}, "`text_encoder_name_or_path`, or a `text_encoder_config`"),
        ({"revision": "main"}, "`revision` is 'main', but no `pretrained_model_name_or_path`"),
        ({"pretrained_model_name_or_path": ".", "revision": "main"}, "`revision` belongs to a repository on the Hub"),
        ({"text_encoder_config": {"hidden_size": 8}}, "`text_encoder_config` .* or `text_encoder_name_or_path`"),
        (
            {"text_encoder_name_or_path": None, "text_encoder_config": {"hidden_size": 8}},
            "must be trained: set `train_text_encoder`",
        ),
        ({"lr_decay_steps": 10}, "`lr_decay_steps` needs `lr_scheduler` linear or cosine"),
        ({"max_train_steps": 999}, r"Warm-up \(1000\) and decay \(0\) must fit in `max_train_steps` \(999\)"),
        (
            {"max_train_steps": 1500, "lr_scheduler": "linear", "lr_decay_steps": 501},
            r"Warm-up \(1000\) and decay \(501\) must fit",
        ),
        (
            {"use_ema": True, "max_train_steps": 9, "lr_warmup_steps": 0},
            r"`ema_update_every` \(10\) must be at most `max_train_steps` \(9\)",
        ),
        ({"hub_model_id": "me/prx"}, "`hub_model_id` is 'me/prx', but `push_to_hub` is not set"),
    ],
)
def test_settings_that_exclude_each_other(changes, message):
    TrainingConfig(**NEEDED)
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**NEEDED | changes)


def test_an_unknown_setting_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"unknown settings \['batchsize'\]; known: \['adam_beta1', .*'train_batch_s"):
        parse_config(recipe(tmp_path, "batchsize: 3\n") + FLAGS)
    for flag in ("--batchsize", "--train_batch"):  # no abbreviations either
        with pytest.raises(SystemExit):
            parse_config([*FLAGS, flag, "3"])
        assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


def test_a_recipe_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="must be a mapping of settings, got list"):
        parse_config(recipe(tmp_path, "- seed\n"))
    with pytest.raises(ValueError, match=r"recipe\.yaml` is no valid YAML"):
        parse_config(recipe(tmp_path, "seed: [1\n"))
    with pytest.raises(ValueError, match=r"`config` is 'nowhere\.yaml', which is no file"):
        parse_config(["--config", "nowhere.yaml"])
    with pytest.raises(ValueError, match="`transformer_config` is no valid YAML"):
        parse_config(["--transformer_config", "{depth: 2"])


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid(path):
    assert parse_config(["--config", str(path)]).to_dict()


def test_help_says_what_every_flag_means_accepts_and_defaults_to(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, hint in typing.get_type_hints(TrainingConfig, include_extras=True).items():
        accepted, meaning = typing.get_args(hint)
        assert accepted is not None
        assert len(meaning) > 10
        assert f"--{name} " in text
        assert meaning[:-1] in text
    assert "(adamw | muon; default: adamw)" in text


def test_nothing_is_shared_between_configurations():
    one, other = TrainingConfig(**NEEDED), TrainingConfig(**NEEDED)
    assert one.validation_prompts is not other.validation_prompts
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.seed = 3


def attributes_read() -> set[str]:
    """Names that the package and the scripts read from a configuration: cfg.name, self.cfg.name."""
    found = set()
    for file in [*(ROOT / "src").rglob("*.py"), *(ROOT / "training").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                if (isinstance(owner, ast.Name) and owner.id == "cfg") or (
                    isinstance(owner, ast.Attribute) and owner.attr == "cfg"
                ):
                    found.add(node.attr)
    return found


def test_no_option_that_nothing_reads():
    assert sorted(set(FIELDS) - attributes_read()) == []
