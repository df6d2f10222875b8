"""Recaptioning: prompts and answers of the model, shards that survive interruptions, and the summary."""

import io
import itertools
import json
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import datasets
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

from diffusers_prx.data.recaptioning import Captioner, RecaptionSettings, is_repetitive, recaption, summarize
from diffusers_prx.data.sources import load_source
from image_files import encode, noise, write_tar
from training import recaption_prx

WORDS = "a red green blue picture of describe the image what is it USER ASSISTANT : < > caption"
TEMPLATE = (
    "{% for m in messages %}USER : {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}{% endif %}{% endfor %}{% endfor %} ASSISTANT :"
)
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
NEVER_ANSWERED = [0, 1, 2, 4]  # <pad>, <unk>, <s>, <image>: a trained model never answers these
IMAGES = 7
CORRUPT = 3


def pillow_processor(name: str) -> type:
    """Return the image processor that needs Pillow alone; newer versions of transformers give it another name."""
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


def make_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS.split()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, extra_special_tokens=["<image>"])


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> str:
    """LLaVA with a chat template."""
    torch.manual_seed(1)
    folder, tokenizer = str(tmp_path_factory.mktemp("llava")), make_tokenizer()
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    text = {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "initializer_range": 0.5}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SMALL, image_size=16, patch_size=8),
        text_config=LlamaConfig(**SMALL, **text, **special),
        image_token_id=4,
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.suppress_tokens = NEVER_ANSWERED
    model.generation_config.min_new_tokens = 1  # an untrained model may answer nothing
    model.save_pretrained(folder)
    images = pillow_processor("CLIPImageProcessor")(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    patches = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(images, tokenizer, **patches, chat_template=TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory) -> str:
    """BLIP without a chat template."""
    torch.manual_seed(2)
    folder, tokenizer = str(tmp_path_factory.mktemp("blip")), make_tokenizer()
    text = {"vocab_size": len(tokenizer), "encoder_hidden_size": 16, "projection_dim": 8, "initializer_range": 0.5}
    special = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(
        text_config={**SMALL, **text, **special, "max_position_embeddings": 40},
        vision_config={**SMALL, "image_size": 16, "patch_size": 8},
    )
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(pillow_processor("BlipImageProcessor")(size={"height": 16, "width": 16}), tokenizer).save_pretrained(
        folder
    )
    return folder


def png(number: int) -> bytes:
    return encode(noise(24 + number, 20, seed=number))


@pytest.fixture
def tars(tmp_path) -> str:
    """Seven images; one is corrupt, one has no caption."""
    folder = tmp_path / "tars"
    folder.mkdir()
    files = []
    for number in range(IMAGES):
        files.append((f"{number}.png", b"corrupt" if number == CORRUPT else png(number)))
        files.append((f"{number}.txt", b"" if number == 5 else b"a red picture" if number % 2 else b"blue"))
    write_tar(folder / "0.tar", files)
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


def slow_answer(folder: str, prompt: str, image: PIL.Image.Image, new_tokens: int) -> tuple[str, bool]:
    """Generate the most likely tokens one by one, without a cache and without padding."""
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    inputs = processor(text=f"USER : <image> {prompt} ASSISTANT :", images=image, return_tensors="pt")
    ids, found = inputs["input_ids"], []
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
        logits[NEVER_ANSWERED if found else [*NEVER_ANSWERED, 3]] = -torch.inf  # the answer is not empty
        found.append(int(logits.argmax()))
        if found[-1] == 3:
            break
        ids = torch.cat([ids, torch.tensor([found[-1:]])], dim=1)
    return processor.decode(found, skip_special_tokens=True).strip(), found[-1] != 3


def test_answers_are_the_most_likely_ones_for_any_batch(chat_model):
    images = [PIL.Image.open(io.BytesIO(png(number))) for number in range(12)]
    captions = [{"text": text} for text in ("blue", "a red picture of a green image", "", "it is red")] * 3
    answers = Captioner(settings(chat_model, "-", prompt="describe {text}"), "cpu")(images, captions)
    expected = [slow_answer(chat_model, f"describe {c['text']}", image, 6) for c, image in zip(captions, images)]
    assert answers == expected
    assert len({text for text, _ in expected}) > 3  # images and prompts matter
    assert {truncated for _, truncated in expected} == {True, False}


def test_a_model_without_a_chat_template_gets_the_image_and_an_optional_prompt(plain_model):
    images = [PIL.Image.open(io.BytesIO(png(number))) for number in range(2)]
    unprompted = Captioner(settings(plain_model, "-"), "cpu")(images, [{}, {}])
    model = BlipForConditionalGeneration.from_pretrained(plain_model)
    processor = BlipProcessor.from_pretrained(plain_model)
    for image, (text, _) in zip(images, unprompted):
        tokens = model.generate(**processor(images=image, return_tensors="pt"), max_new_tokens=6, do_sample=False)
        assert text == processor.decode(tokens[0], skip_special_tokens=True).strip() != ""
    prompted = Captioner(settings(plain_model, "-", prompt="the red image of"), "cpu")(images, [{}, {}])
    assert all(text.startswith("red image") for text, _ in prompted)


def test_special_tokens_in_a_caption_are_removed(chat_model):
    image = PIL.Image.open(io.BytesIO(png(0)))
    captioner = Captioner(settings(chat_model, "-", prompt="{text}"), "cpu")
    assert captioner([image], [{"text": "a <image> red</s>"}]) == captioner([image], [{"text": "a   red "}])


def test_sampling_depends_on_the_seed(chat_model, tars, tmp_path):
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        recaption(settings(chat_model, tars, temperature=5.0, seed=seed), tmp_path / name, device="cpu")
        texts.append([row["text_long"] for row in rows(tmp_path / name)])
    assert texts[0] == texts[1] != texts[2]


def test_the_result_has_the_images_and_the_old_and_new_captions(chat_model, tars, tmp_path):
    summary = recaption(settings(chat_model, tars), tmp_path / "new", batch_size=2, device="cpu")
    assert summary.startswith("6 captions; 1 images could not be read; ")
    assert [path.name for path in sorted((tmp_path / "new" / "data").iterdir())] == [
        f"train-{number:05d}-of-00003.parquet" for number in range(3)
    ]
    found = rows(tmp_path / "new")
    assert [row["image"] for row in found] == [png(number) for number in range(IMAGES) if number != CORRUPT]
    assert [row["text"] for row in found] == ["blue", "a red picture", "blue", "blue", None, "blue"]
    assert all(row["text_long"] for row in found)
    opened = datasets.load_dataset(str(tmp_path / "new"), split="train")
    assert opened.column_names == ["image", "text", "text_long", "text_long_cut"]
    assert opened[1]["image"].size == (25, 20)
    assert sum(opened["text_long_cut"]) == int(summary.split(", ")[-1].split()[0])


def test_existing_shards_are_kept_and_the_others_are_the_same_as_without_interruption(
    chat_model, tars, tmp_path, monkeypatch
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    summary = recaption(settings(chat_model, tars), whole, device="cpu")
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
    monkeypatch.delattr(Captioner, "__call__")  # a finished data set needs no model
    assert recaption(settings(chat_model, tars), whole, device="cpu") == summary


def in_a_process(function, *args, **kwargs) -> multiprocessing.Process:
    """Start a function in a forked process, which need not import everything again."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args, kwargs=kwargs)
    process.start()
    return process


def recaption_until_killed(renames_before: int, *args) -> None:
    """Recaption until the process is killed before the rename of a file number `renames_before`."""
    count, replace = itertools.count(), os.replace

    def replace_or_die(*paths) -> None:
        if next(count) == renames_before:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = replace_or_die
    recaption(*args, device="cpu")


# -1: while the settings are written; IMAGES: before the final rename of the folder
@pytest.mark.parametrize("shards_before", [-1, 0, 5, IMAGES])
def test_a_killed_run_resumes(chat_model, tars, tmp_path, shards_before):
    out, one_by_one = tmp_path / "out", settings(chat_model, tars, shard_samples=1)
    process = in_a_process(recaption_until_killed, shards_before + 1, one_by_one, out)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = {path.name: path.stat().st_mtime_ns for path in out.glob(".unfinished/*.parquet")}
    assert len(before) == max(shards_before, 0)
    assert not (out / "data").exists()
    recaption(one_by_one, out, device="cpu")
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("data/*")}
    assert len(after) == IMAGES  # the shard of the corrupt image is empty
    assert before.items() <= after.items()
    assert len(rows(out)) == IMAGES - 1


def recaption_as_one_of_two(*args) -> None:
    recaption(*args, device="cpu")
    state = PartialState()
    (args[1] / f"{state.process_index} of {state.num_processes}").touch()


def test_two_processes_write_the_same_data_set(chat_model, tars, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    recaption(settings(chat_model, tars), whole, device="cpu")
    AcceleratorState._reset_state(reset_partial_state=True)  # the launcher must initialize it
    debug_launcher(recaption_as_one_of_two, (settings(chat_model, tars), out), num_processes=2)
    for name in ("0 of 2", "1 of 2"):
        (out / name).unlink()
    assert rows(out) == rows(whole)


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
def test_is_repetitive_finds_repeated_runs_of_words(text, expected):
    assert is_repetitive(text) is expected


def test_the_summary_counts_over_all_shards(tmp_path):
    for number, texts in enumerate((["a cat", "", "a dog"], ["a cat", "", "no no no no no no"])):
        table = datasets.Dataset.from_dict({"text_long": texts, "text_long_cut": [text == "a cat" for text in texts]})
        table.to_parquet(tmp_path / f"{number}.parquet")
    assert summarize(sorted(tmp_path.glob("*.parquet")), settings("-", "-"), 8) == (
        "6 captions; 2 images could not be read; 2 captions are empty, 1 repeat an earlier one, 1 repeat themselves, "
        "2 were truncated by `max_new_tokens` 6"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"max_new_tokens": 0},
        {"shard_samples": 0},
        {"temperature": -1.0},
        {"dtype": "int8"},
        {"caption_columns": ()},
        {"output_column": "text"},
        {"output_column": "image"},
        {"prompt": "describe {tags}"},
        {"prompt": "describe {text.__class__}"},
        {"prompt": "describe {}"},
        {"prompt": "describe {text"},
    ],
    ids=str,
)
def test_invalid_settings_are_refused(changes):
    with pytest.raises(ValueError, match=f"`{next(iter(changes))}`"):
        settings("-", "-", **changes)


def test_a_folder_begun_with_other_settings_is_refused(chat_model, tars, tmp_path):
    recaption(settings(chat_model, tars), tmp_path / "out", device="cpu")
    saved = json.loads((tmp_path / "out" / "recaption.json").read_text())
    assert saved["images"] == IMAGES
    for name, value in {"prompt": "what is it", "seed": 1, "max_new_tokens": 7, "shard_samples": 2}.items():
        with pytest.raises(ValueError, match=rf"`{name}` is {value!r}, but .* {saved[name]!r}"):
            recaption(settings(chat_model, tars, **{name: value}), tmp_path / "out", device="cpu")


def test_invalid_arguments_end_the_script_with_one_line(chat_model, tars, tmp_path):
    def run(model: str, data: str, *flags: str) -> None:
        out = ["--output_dir", str(tmp_path / "out"), "--device", "cpu"]
        recaption_prx.main(["--model_name_or_path", model, "--dataset_name", data, *out, *flags])

    with pytest.raises(SystemExit, match=r"^error: `caption_column` is 'tags'"):
        run(chat_model, tars, "--caption_columns", "tags")
    with pytest.raises(SystemExit, match=r"^error: `dataset_name` is 'scenes'"):
        run(chat_model, "scenes", "--caption_columns", "long")
    with pytest.raises(SystemExit, match=r"^error: `batch_size`"):
        run(chat_model, tars, "--batch_size", "0")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match=r"^error: "):
        run(str(tmp_path / "nothing"), tars)


def recaption_on_a_small_disk(message: Path, *args) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    try:
        recaption(*args, device="cpu")
    except OSError as error:
        message.write_text(str(error))


def test_a_full_disk_keeps_written_shards(chat_model, tars, tmp_path):
    """Files may not grow beyond 40 kB: shards of small images fit, the last one with a larger image does not."""
    write_tar(Path(tars) / "1.tar", [("7.png", encode(noise(200, 200))), ("7.txt", b"a")])
    out = tmp_path / "out"
    process = in_a_process(recaption_on_a_small_disk, tmp_path / "message", settings(chat_model, tars), out)
    process.join()
    message = (tmp_path / "message").read_text()
    assert "train-00002-of-00003.parquet cannot be written" in message
    assert "same command" in message
    assert len(list(out.glob(".unfinished/*.parquet"))) == 2
    recaption(settings(chat_model, tars), out, device="cpu")
    assert len(rows(out)) == IMAGES
