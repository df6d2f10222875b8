"""New captions: what the model is asked and answers, shards that outlive a kill, and what is counted."""

import io
import itertools
import json
import multiprocessing
import os
import resource
import signal
import tarfile
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from accelerate import PartialState, debug_launcher
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from diffusers_prx.data.recaptioning import Captioner, RecaptionSettings, recaption, repeats_itself, summary
from diffusers_prx.data.sources import load_source
from training import recaption_prx

WORDS = "a red green blue picture of describe the image what is it USER ASSISTANT : < > caption"
TEMPLATE = (
    "{% for m in messages %}USER : {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}{% endif %}{% endfor %}{% endfor %} ASSISTANT :"
)
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
NEVER_ANSWERED = [0, 1, 2, 4]  # <pad>, <unk>, <s>, <image>: random weights would, a trained model does not
IMAGES = 7
CORRUPT = 3


def pillow_processor(name: str) -> type:
    """The image processor that needs Pillow alone, which newer transformers call by a name of its own."""
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make_tokenizer() -> PreTrainedTokenizerFast:
    signs = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*signs, *WORDS.split()])}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens=["<image>"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> str:
    """A LLaVA with a chat template."""
    torch.manual_seed(1)
    folder, tokenizer = str(tmp_path_factory.mktemp("llava")), make_tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SMALL, image_size=16, patch_size=8),
        text_config=LlamaConfig(
            **SMALL, num_key_value_heads=2, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=2, eos_token_id=3,
            initializer_range=0.5,
        ),
        image_token_id=4,
        vision_feature_layer=-1,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config.suppress_tokens = NEVER_ANSWERED
    model.save_pretrained(folder)
    images = pillow_processor("CLIPImageProcessor")(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory) -> str:
    """A BLIP, which has none."""
    torch.manual_seed(2)
    folder, tokenizer = str(tmp_path_factory.mktemp("blip")), make_tokenizer()
    text = {
        **SMALL, "vocab_size": len(tokenizer), "encoder_hidden_size": 16, "projection_dim": 8,
        "max_position_embeddings": 40, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0,
        "initializer_range": 0.5,
    }  # fmt: skip
    config = BlipConfig(text_config=text, vision_config={**SMALL, "image_size": 16, "patch_size": 8})
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(pillow_processor("BlipImageProcessor")(size={"height": 16, "width": 16}), tokenizer).save_pretrained(
        folder
    )
    return folder


def png(place: int) -> bytes:
    pixels = np.random.default_rng(place).integers(0, 256, (20, 24 + place, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def tars(tmp_path) -> str:
    """Seven images; one is corrupt, one has no caption."""
    folder = tmp_path / "tars"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as archive:
        for place in range(IMAGES):
            caption = b"" if place == 5 else b"a red picture" if place % 2 else b"blue"
            for ending, content in (("png", b"corrupt" if place == CORRUPT else png(place)), ("txt", caption)):
                member = tarfile.TarInfo(f"{place}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return str(folder)


def settings(model: str, data: str, **changes) -> RecaptionSettings:
    return RecaptionSettings(
        **{"model_name_or_path": model, "dataset_name": data, "dtype": "float32", "max_new_tokens": 6}
        | {"shard_samples": 3}
        | changes
    )


def rows(folder: Path) -> list[dict]:
    found = load_source(str(folder), caption_columns=("text_long", "text"))
    return [
        {**found.stored_captions(i), "image": found.stored_image(i), "cut": found.texts[i].get("text_long_cut")}
        for i in range(len(found))
    ]


# What the model is asked, and what it answers


def slow_answer(folder: str, prompt: str, image: PIL.Image.Image, new_tokens: int) -> tuple[str, bool]:
    """The most likely tokens one after the other, each with the whole text run anew, and no padding."""
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    inputs = processor(text=f"USER : <image> {prompt} ASSISTANT :", images=image, return_tensors="pt")
    ids, found = inputs["input_ids"], []
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
        logits[NEVER_ANSWERED] = -torch.inf
        found.append(int(logits.argmax()))
        if found[-1] == 3:
            break
        ids = torch.cat([ids, torch.tensor([found[-1:]])], dim=1)
    return processor.decode(found, skip_special_tokens=True).strip(), found[-1] != 3


def test_answers_are_the_most_likely_ones_whatever_else_is_in_the_batch(chat_model):
    images = [PIL.Image.open(io.BytesIO(png(place))) for place in range(12)]
    captions = [{"text": text} for text in ("blue", "a red picture of a green image", "", "it is red")] * 3
    answers = Captioner(settings(chat_model, "-", prompt="describe {text}"), "cpu")(images, captions)
    expected = [slow_answer(chat_model, f"describe {c['text']}", image, 6) for c, image in zip(captions, images)]
    assert answers == expected
    assert len({text for text, _ in expected}) > 3  # images and prompts matter
    assert {cut for _, cut in expected} == {True, False}  # some end by themselves


def test_a_model_without_a_chat_template_gets_the_image_alone_or_the_words_of_the_prompt(plain_model):
    images = [PIL.Image.open(io.BytesIO(png(place))) for place in range(2)]
    alone = Captioner(settings(plain_model, "-"), "cpu")(images, [{}, {}])
    model, processor = (
        BlipForConditionalGeneration.from_pretrained(plain_model),
        BlipProcessor.from_pretrained(plain_model),
    )
    for image, (text, _) in zip(images, alone):
        tokens = model.generate(**processor(images=image, return_tensors="pt"), max_new_tokens=6, do_sample=False)
        assert text == processor.decode(tokens[0], skip_special_tokens=True).strip() != ""
    prompted = Captioner(settings(plain_model, "-", prompt="the red image of"), "cpu")(images, [{}, {}])
    assert all(text.startswith("red image") for text, _ in prompted)


def test_signs_of_the_model_in_a_caption_are_no_signs(chat_model):
    image = PIL.Image.open(io.BytesIO(png(0)))
    captioner = Captioner(settings(chat_model, "-", prompt="{text}"), "cpu")
    assert captioner([image], [{"text": "a <image> red</s>"}]) == captioner([image], [{"text": "a   red "}])


def test_draws_at_a_temperature_are_a_function_of_the_seed(chat_model, tars, tmp_path):
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        recaption(settings(chat_model, tars, temperature=5.0, seed=seed), tmp_path / name, device="cpu")
        texts.append([row["text_long"] for row in rows(tmp_path / name)])
    assert texts[0] == texts[1] != texts[2]


# The data set


def test_the_result_is_a_data_set_with_images_old_and_new_captions(chat_model, tars, tmp_path):
    told = recaption(settings(chat_model, tars), tmp_path / "new", batch_size=2, device="cpu")
    assert told.startswith("6 captions; 1 images could not be read; ")
    assert [path.name for path in sorted((tmp_path / "new" / "data").iterdir())] == [
        f"train-{number:05d}-of-00003.parquet" for number in range(3)
    ]
    found = rows(tmp_path / "new")
    places = [place for place in range(IMAGES) if place != CORRUPT]
    assert [row["image"] for row in found] == [png(place) for place in places]  # not encoded anew
    assert [row["text"] for row in found] == ["blue", "a red picture", "blue", "blue", None, "blue"]
    assert all(row["text_long"] for row in found)
    opened = datasets.load_dataset(str(tmp_path / "new"), split="train")
    assert opened.column_names == ["image", "text", "text_long", "text_long_cut"]
    assert opened[1]["image"].size == (25, 20)
    assert sum(opened["text_long_cut"]) == int(told.split(", ")[-1].split()[0])


def test_what_is_done_is_kept_and_the_rest_is_the_same_as_in_one_go(chat_model, tars, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    told = recaption(settings(chat_model, tars), whole, device="cpu")
    (parts / ".unfinished").mkdir(parents=True)
    first = "train-00000-of-00003.parquet"
    (parts / "recaption.json").write_text((whole / "recaption.json").read_text())
    table = datasets.Dataset.from_parquet(str(whole / "data" / first))
    table.map(lambda row: {"text_long": "kept"}).to_parquet(parts / ".unfinished" / first)
    (parts / ".unfinished" / "train-00001-of-00003.parquet.0123.unfinished").write_bytes(b"half a shard")
    recaption(settings(chat_model, tars), parts, device="cpu")
    assert [row["text_long"] for row in rows(parts)[:3]] == ["kept"] * 3
    assert rows(parts)[3:] == rows(whole)[3:]
    assert not (parts / ".unfinished").exists()
    assert len(list((parts / "data").iterdir())) == 3
    # all is done: no model is needed
    monkeypatch.delattr(Captioner, "__call__")
    assert recaption(settings(chat_model, tars), whole, device="cpu") == told


def in_a_process(function, *args, **kwargs) -> multiprocessing.Process:
    """Start a function in a process of its own, without importing everything once more."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args, kwargs=kwargs)
    process.start()
    return process


def recaption_until_killed(renames_before: int, *args) -> None:
    """In a process of its own: it dies where a file that it has written would get its name."""
    count, replace = itertools.count(), os.replace

    def replace_or_die(*paths) -> None:
        if next(count) == renames_before:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = replace_or_die
    recaption(*args, device="cpu")


@pytest.mark.parametrize("shards_before", [-1, 0, 5, IMAGES])  # -1: when the settings are noted; all: at the very end
def test_a_killed_run_goes_on(chat_model, tars, tmp_path, shards_before):
    out, one_by_one = tmp_path / "out", settings(chat_model, tars, shard_samples=1)
    process = in_a_process(recaption_until_killed, shards_before + 1, one_by_one, out)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = {path.name: path.stat().st_mtime_ns for path in out.glob(".unfinished/*.parquet")}
    assert len(before) == max(shards_before, 0)
    assert not (out / "data").exists()
    recaption(one_by_one, out, device="cpu")
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("data/*")}
    assert len(after) == IMAGES  # the corrupt image's shard is empty, and done
    assert before.items() <= after.items()
    assert len(rows(out)) == IMAGES - 1


def recaption_as_one_of_two(*args) -> None:
    recaption(*args, device="cpu")
    state = PartialState()
    (args[1] / f"{state.process_index} of {state.num_processes}").touch()


def test_two_processes_write_what_one_does(chat_model, tars, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    recaption(settings(chat_model, tars), whole, device="cpu")
    AcceleratorState._reset_state(reset_partial_state=True)  # the launcher wants to be the first
    debug_launcher(recaption_as_one_of_two, (settings(chat_model, tars), out), num_processes=2)
    for name in ("0 of 2", "1 of 2"):
        (out / name).unlink()
    assert rows(out) == rows(whole)


# What is counted


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red car on a road", False),
        ("a red car a red car a red car a red car", True),
        ("the the the the the the", True),
        ("no no no", False),
        ("", False),
        ("a small red house with a small red door beside a small red tree", False),
    ],
)
def test_texts_that_go_round_in_circles(text, expected):
    assert repeats_itself(text) is expected


def test_the_summary_counts_over_all_shards(tmp_path):
    for number, texts in enumerate((["a cat", "", "a dog"], ["a cat", "", "no no no no no no"])):
        table = datasets.Dataset.from_dict({"text_long": texts, "text_long_cut": [text == "a cat" for text in texts]})
        table.to_parquet(tmp_path / f"{number}.parquet")
    assert summary(sorted(tmp_path.glob("*.parquet")), settings("-", "-"), 8) == (
        "6 captions; 2 images could not be read; 2 captions are empty, 1 repeat an earlier one, 1 repeat themselves, "
        "2 were cut by `max_new_tokens` 6"
    )


# What goes wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
        ({"shard_samples": 0}, "`shard_samples` must be at least 1, got 0"),
        ({"temperature": -1.0}, r"`temperature` must not be negative, got -1\.0"),
        ({"dtype": "int8"}, "`dtype` is 'int8'; accepted: float32, bfloat16, float16"),
        ({"caption_columns": ()}, "`caption_columns` is empty"),
        ({"output_column": "text"}, "`output_column` is 'text', but there is a column 'text'"),
        ({"output_column": "image"}, "there is a column 'image'"),
        ({"prompt": "describe {tags}"}, r"`prompt` names \['tags'\]; accepted are the `caption_columns` \['text'\]"),
        ({"prompt": "describe {text.__class__}"}, "`prompt` names"),
        ({"prompt": "describe {}"}, "`prompt` names"),
        ({"prompt": "describe {text"}, "`prompt` has a brace too many"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        settings("-", "-", **changes)


def test_a_folder_begun_with_other_settings_is_refused(chat_model, tars, tmp_path):
    recaption(settings(chat_model, tars), tmp_path / "out", device="cpu")
    noted = json.loads((tmp_path / "out" / "recaption.json").read_text())
    assert noted["images"] == IMAGES
    for name, value in {"prompt": "what is it", "seed": 1, "max_new_tokens": 7, "shard_samples": 2}.items():
        with pytest.raises(ValueError, match=rf"`{name}` is {value!r}, but .* was begun with {noted[name]!r}"):
            recaption(settings(chat_model, tars, **{name: value}), tmp_path / "out", device="cpu")


def test_no_such_model_data_or_column_ends_the_script_with_one_line(chat_model, plain_model, tars, tmp_path):
    def run(model: str, data: str, *flags: str) -> None:
        out = ["--output_dir", str(tmp_path / "out"), "--device", "cpu"]
        recaption_prx.main(["--model_name_or_path", model, "--dataset_name", data, *out, *flags])

    with pytest.raises(SystemExit, match=r"^error: `caption_column` is 'tags'"):
        run(chat_model, tars, "--caption_columns", "tags")
    with pytest.raises(SystemExit, match=r"^error: `dataset_name` is 'scenes', whose captions say all"):
        run(chat_model, "scenes", "--caption_columns", "long")
    with pytest.raises(SystemExit, match=r"^error: `batch_size` must be at least 1, got 0"):
        run(chat_model, tars, "--batch_size", "0")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match=r"^error: "):
        run(str(tmp_path / "nothing"), tars)


def recaption_on_a_small_disk(told: Path, *args) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    try:
        recaption(*args, device="cpu")
    except OSError as error:
        told.write_text(str(error))


def test_a_full_disk_keeps_what_was_written(chat_model, tars, tmp_path):
    """Files may not grow beyond 40 kB: shards of small images fit, the last one with a larger image does not."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    content = io.BytesIO()
    PIL.Image.fromarray(noise).save(content, "PNG")
    with tarfile.open(Path(tars) / "1.tar", "w") as archive:
        for ending, part in (("png", content.getvalue()), ("txt", b"a")):
            member = tarfile.TarInfo(f"7.{ending}")
            member.size = len(part)
            archive.addfile(member, io.BytesIO(part))
    out = tmp_path / "out"
    process = in_a_process(recaption_on_a_small_disk, tmp_path / "told", settings(chat_model, tars), out)
    process.join()
    assert "train-00002-of-00003.parquet cannot be written" in (told := (tmp_path / "told").read_text())
    assert "start the same command again" in told
    assert len(list(out.glob(".unfinished/*.parquet"))) == 2
    recaption(settings(chat_model, tars), out, device="cpu")
    assert len(rows(out)) == IMAGES
