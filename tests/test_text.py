"""Tokenizing, encoding and trimming of prompts."""

import pytest
import torch

import tiny
import zoo
from diffusers_prx.prompt_cleaning import clean_prompt, repair_prompt
from diffusers_prx.text import encode_text, find_truncated, tokenize_prompts, trim_text, trim_tokens

# encoders with relative and absolute positions, causal and bidirectional
ENCODERS = {
    "t5gemma": (lambda: zoo.randomized(tiny.text_encoder()), tiny.tokenizer),
    "qwen3_vl": (lambda: zoo.randomized(tiny.qwen_text_tower()), tiny.tokenizer),
    "t5": (zoo.t5_encoder, tiny.tokenizer),
    "clip": (zoo.clip_text, zoo.clip_tokenizer),
    "bert": (zoo.bert, tiny.tokenizer),
}
PROMPTS = ["a red cat in the sunset", "", "dog"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_on_the_right(side):
    tokenizer = tiny.tokenizer(side)
    ids, mask = tokenize_prompts(tokenizer, ["A Red cat", "dog"], 6, clean_prompt)
    assert tokenizer.padding_side == side
    expected = tiny.tokenizer("right")(
        ["a red cat", "dog"], padding="max_length", max_length=6, truncation=True, return_tensors="pt"
    )
    assert torch.equal(ids, expected["input_ids"])
    assert torch.equal(mask, expected["attention_mask"].bool())
    assert mask.sum(1).tolist() == [4, 2]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_empty_prompt_keeps_one_position(side):
    """This tokenizer gives it no token, and an encoder could not attend to anything."""
    tokenizer = tiny.tokenizer(side, bos=False)
    assert tokenizer([""])["input_ids"] == [[]]
    ids, mask = tokenize_prompts(tokenizer, ["", "a cat"], 5, clean_prompt)
    assert mask.sum(1).tolist() == [1, 2]
    assert mask[0, 0]
    assert ids[0].tolist() == [tokenizer.pad_token_id] * 5
    assert torch.isfinite(encode_text(tiny.text_encoder(), ids, mask)).all()


@pytest.mark.parametrize("max_length", [0, -1, True, 2.0, int(1e30), None])
def test_wrong_max_length_is_refused(max_length):
    with pytest.raises(ValueError, match="tokenizer_max_length"):
        tokenize_prompts(tiny.tokenizer(), ["a"], max_length, repair_prompt)


def test_find_truncated():
    """With its end, `red cat` has three tokens and `a red cat` four."""
    tokenizer, prompts = tiny.tokenizer(), ["dog", "a red cat", "red cat", "a red red cat"]
    _, mask = tokenize_prompts(tokenizer, prompts, 3, clean_prompt)
    assert mask.all(dim=1).tolist() == [False, True, True, True]
    assert find_truncated(tokenizer, prompts, mask, clean_prompt) == [False, True, False, True]
    assert find_truncated(tokenizer, prompts[:1], mask[:1], clean_prompt) == [False]


def test_trim_text_on_both_sides():
    mask = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    embeds = torch.randn(2, 6, 3)
    trimmed, kept = trim_text(embeds, mask)
    assert torch.equal(trimmed, embeds[:, 1:4])
    assert torch.equal(kept, mask[:, 1:4])
    trimmed, kept = trim_text(embeds, mask[:1].expand(2, 6))
    assert trimmed.shape[1] == 2
    assert kept is None
    assert trim_text(embeds, torch.zeros_like(mask))[0].shape[1] == 1


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_trimming_does_not_change_the_prediction(side):
    ids, mask = tokenize_prompts(tiny.tokenizer(side), ["a red cat in the sunset", "dog"], 12, clean_prompt)
    embeds = encode_text(tiny.text_encoder(), ids, mask)
    model = tiny.transformer()
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.9])
    padded = model(x, t, embeds, mask).sample
    trimmed, kept = trim_text(embeds, mask)
    assert trimmed.shape[1] == 7
    torch.testing.assert_close(model(x, t, trimmed, kept).sample, padded, rtol=0, atol=1e-5)
    assert (model(x, t, embeds, None).sample - padded).abs().max() > 1e-3  # without the mask the result differs


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_padding_does_not_change_embeddings(name, side):
    """Each prompt alone and unpadded, trimmed to the longest of its batch, and padded to the limit."""
    encoder, tokenizer = (make() for make in (ENCODERS[name][0], lambda: ENCODERS[name][1](side)))
    ids, mask = tokenize_prompts(tokenizer, PROMPTS, 12, clean_prompt)
    short, short_mask = trim_tokens(ids, mask)
    assert short.shape[1] == mask.sum(1).max() < 12
    padded, trimmed = encode_text(encoder, ids, mask), encode_text(encoder, short, short_mask)
    assert torch.isfinite(padded).all()
    assert trimmed.std() > 0.1
    torch.testing.assert_close(trimmed[short_mask], padded[mask], rtol=0, atol=1e-5)
    for row, prompt in enumerate(PROMPTS):
        alone = encoder(torch.tensor([tokenizer(prompt)["input_ids"]])).last_hidden_state[0]
        torch.testing.assert_close(trimmed[row][short_mask[row]], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ENCODERS)
def test_padding_does_not_change_predictions_or_gradients(name, side):
    """Through the transformer, and back into the text encoder."""
    encoder, tokenizer = ENCODERS[name][0](), ENCODERS[name][1](side)
    model = tiny.transformer()
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([0.3, 0.9, 0.6])
    ids, mask = tokenize_prompts(tokenizer, PROMPTS, 12, clean_prompt)
    results = []
    for tokens, kept in ((ids, mask), trim_tokens(ids, mask)):
        encoder.zero_grad()
        output = model(x, t, encode_text(encoder, tokens, kept), kept).sample
        output.square().mean().backward()
        gradients = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
        results.append((output.detach(), gradients))
    (padded, padded_gradients), (trimmed, trimmed_gradients) = results
    torch.testing.assert_close(trimmed, padded, rtol=0, atol=1e-5)
    assert max(gradient.abs().max() for gradient in padded_gradients.values()) > 1e-3
    torch.testing.assert_close(trimmed_gradients, padded_gradients, rtol=1e-4, atol=1e-6)


def test_trim_tokens_keeps_padding_on_the_left():
    """Without it the tokens would get other positions."""
    mask = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    ids = torch.arange(12).view(2, 6)
    trimmed, kept = trim_tokens(ids, mask)
    assert torch.equal(trimmed, ids[:, :4])
    assert torch.equal(kept, mask[:, :4])
    assert trim_tokens(ids, torch.zeros_like(mask))[0].shape == (2, 1)


def test_gradients_reach_the_encoder():
    encoder = tiny.text_encoder()
    ids, mask = tokenize_prompts(tiny.tokenizer(), ["a cat"], 6, clean_prompt)
    encode_text(encoder, ids, mask).square().mean().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
