"""Decoding, choice and statistics of captions."""

import json
import statistics
from collections import Counter

import numpy as np
import pytest

import tiny
from diffusers_prx.data.captions import (
    caption_statistics,
    choose_caption,
    find_caption,
    read_caption,
    read_captions,
)
from diffusers_prx.data.images import UnreadableSample
from diffusers_prx.prompt_cleaning import clean_prompt
from diffusers_prx.text import find_truncated, tokenize_prompts


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (" a cat\n", "a cat"),
        (b"a cat\n", "a cat"),
        (b"\xef\xbb\xbfa cat", "a cat"),  # with a byte order mark
        ("ein Käuzchen".encode(), "ein Käuzchen"),
        (["a cat", "a dog"], "a cat"),
        ("word " * 10_000, ("word " * 10_000).strip()),
    ],
)
def test_read_caption_decodes_texts_and_bytes(value, text):
    assert read_caption(value) == text


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "missing"),
        (5, "5"),
        ([], r"\[\]"),
        ([3], "3"),
        ("", "empty"),
        (b" \n", "empty"),
        ("K\xe4uzchen".encode("latin-1"), "UTF-8 .* at byte 1"),
        (json.loads('"half \\ud83d"'), "half of a surrogate pair"),
    ],
)
def test_read_caption_rejects_everything_else(value, reason):
    with pytest.raises(UnreadableSample, match=reason):
        read_caption(value)


def test_read_captions_omits_columns_without_a_caption():
    assert read_captions({"long": None, "short": "a cat", "tags": ""}) == {"short": "a cat"}
    with pytest.raises(UnreadableSample, match=r"`long` .*missing.*`tags` .*empty"):
        read_captions({"long": None, "tags": ""})


def test_find_caption_reads_files_and_json_keys():
    files = {"txt": b"plain", "long.txt": b"long one", "json": b'{"short": "s", "text": "of json"}'}

    def find(column, endings=tuple(files), broken=None):
        return find_caption(column, endings, {**files, **(broken or {})}.get)

    assert find("txt") == find("text") == b"plain"
    assert find("long.txt") == b"long one"
    assert find("short") == "s"
    assert find("text", ["json"]) == "of json"
    assert find("other") is find("short", ["txt"]) is find("short", broken={"json": b"[1]"}) is None
    for broken in (b"{", b'{"short": "\xe4"}'):
        with pytest.raises(UnreadableSample, match="Error"):
            read_caption(find("short", broken={"json": broken}))


def test_choose_caption_follows_the_weights():
    captions = {"tags": "t", "short": "s", "long": "l"}
    weights = {"long": 7.0, "short": 2.0, "tags": 1.0}
    uniforms = (np.arange(1000) + 0.5) / 1000
    counts = Counter(choose_caption(captions, weights, uniform) for uniform in uniforms)
    assert counts == {"l": 700, "s": 200, "t": 100}
    assert choose_caption(captions, weights, 0.0) == "l"
    assert choose_caption(captions, weights, 1 - 2**-53) == "t"
    assert choose_caption(captions, weights, 0.5 - 2**-54) == "l"
    assert choose_caption(captions, {"long": 1.0, "short": 1.0}, 0.5) == "s"  # shares are half open
    reordered = dict(reversed(captions.items()))
    assert all(choose_caption(captions, weights, u) == choose_caption(reordered, weights, u) for u in uniforms)


def test_choose_caption_renormalizes_the_weights_of_available_columns():
    weights = {"long": 7.0, "short": 2.0, "tags": 1.0}
    uniforms = (np.arange(300) + 0.5) / 300
    for captions in ({"short": "s", "tags": "t"}, {"long": "", "short": "s", "tags": "t"}):
        assert Counter(choose_caption(captions, weights, u) for u in uniforms) == {"s": 200, "t": 100}
    never = {"long": 0.0, "short": 1.0}
    assert {choose_caption({"long": "l", "short": "s"}, never, p) for p in (0.0, 0.5, 0.999)} == {"s"}


@pytest.mark.parametrize("captions", [{}, {"other": "x"}, {"long": "  "}, {"never": "x"}])
def test_choose_caption_without_a_caption_is_unreadable(captions):
    with pytest.raises(UnreadableSample, match=r"\['long', 'never'\]"):
        choose_caption(captions, {"long": 1.0, "never": 0.0}, 0.3)


def test_caption_statistics_equal_a_slow_count():
    tokenizer = tiny.tokenizer()
    generator = np.random.default_rng(0)
    captions = ["a red cat " * int(n) for n in generator.integers(0, 6, 700)] + ["", "漢字", "A RED CAT"]
    found = caption_statistics(iter(captions), tokenizer, 8, clean_prompt)
    lengths = [len(tokenizer(clean_prompt(caption))["input_ids"]) for caption in captions]
    assert found.count == 703
    assert found.tokens_mean == pytest.approx(sum(lengths) / 703)
    assert found.tokens_median == statistics.median(lengths)
    assert found.tokens_p95 == np.percentile(lengths, 95, method="inverted_cdf")
    _, mask = tokenize_prompts(tokenizer, captions, 8, clean_prompt)
    assert found.truncated == pytest.approx(sum(find_truncated(tokenizer, captions, mask, clean_prompt)) / 703)
    cleaned = [clean_prompt(caption) for caption in captions]
    assert found.empty == pytest.approx(cleaned.count("") / 703)
    assert found.duplicated == pytest.approx(sum(text in cleaned[:i] for i, text in enumerate(cleaned)) / 703)
    assert 0 < found.empty < found.truncated < found.duplicated < 1  # none of them is trivial here
    assert "703 captions" in found.summary()


@pytest.mark.parametrize("count", [1, 19, 20, 21, 100])
def test_caption_statistics_95th_percentile(count):
    captions = ["cat " * n for n in range(1, count + 1)]
    found = caption_statistics(captions, tiny.tokenizer(bos=False), 8, str.strip)
    assert found.tokens_p95 == np.percentile(range(1, count + 1), 95, method="inverted_cdf")


def test_caption_statistics_warn_about_harmful_captions():
    def warnings(captions, max_length=100):
        return caption_statistics(captions, tiny.tokenizer(bos=False), max_length, str.strip).warnings()

    long = [f"{'cat ' * 40}{'dog ' * i}" for i in range(30)]
    assert warnings(long) == []
    (short,) = warnings([f"{'cat ' * 5}{'dog ' * i}" for i in range(20)])
    assert "a median of 14 tokens" in short
    assert "18.20 to 36.84" in short
    (truncated,) = warnings(long, max_length=60)
    assert truncated.startswith("30.0%")
    assert "`max_sequence_length` 60" in truncated
    (empty,) = warnings([*long, ""])
    assert empty.startswith("3.2%")
    assert "--caption_cleaning light" in empty
    (duplicated,) = warnings(long + long[:10])
    assert duplicated.startswith("25.0%")
    with pytest.raises(ValueError, match="`captions`"):
        caption_statistics([], tiny.tokenizer(), 8, str.strip)
