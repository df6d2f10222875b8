"""Arguments of the forward that steer a drawing: skipped and perturbed blocks, weights and masks of text tokens.

The reference is an attention processor that computes each head and each image token by itself, in float64.
"""

import copy

import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig
from torch import nn

import tiny
from diffusers_prx.models.token_routing import TokenRoute
from diffusers_prx.models.transformer_prx import PRXAttnProcessor

BATCH, TEXT_LENGTH, HEIGHT, WIDTH = 3, 5, 6, 8
TOKENS = HEIGHT * WIDTH // 4
TOLERANCE = 5e-6  # seen: up to 8e-7 (order of summation)


class ByHand(PRXAttnProcessor):
    """Attention of one image token after the other.

    Args:
        alone: True if an image token sees no other image token.
        weights: (B, L) factors of the text values, or None.
        counts: (B, N, L), true where a text token counts for an image token, or None.
    """

    def __init__(self, alone=False, weights=None, counts=None):
        self.alone, self.weights, self.counts = alone, weights, counts

    def attend(self, query, key, value, text_key, text_value, attention_mask):
        batch, tokens, heads, dim = query.shape
        output = torch.zeros_like(query)
        for row in range(batch):
            for token in range(tokens):
                others = [token] if self.alone else list(range(tokens))
                words = [w for w in range(text_key.shape[1]) if self.counts is None or self.counts[row, token, w]]
                keys = torch.cat((text_key[row, words], key[row, others])).double()  # (K, h, d)
                factors = torch.ones(len(words)) if self.weights is None else self.weights[row, words]
                values = torch.cat((text_value[row, words] * factors[:, None, None], value[row, others])).double()
                for head in range(heads):
                    scores = keys[:, head] @ query[row, token, head].double() / dim**0.5  # (K,)
                    output[row, token, head] = (scores.softmax(0) @ values[:, head]).float()
        return output


def make_inputs(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(BATCH, 4, HEIGHT, WIDTH, generator=generator),
        "timestep": torch.rand(BATCH, generator=generator),
        "encoder_hidden_states": torch.randn(BATCH, TEXT_LENGTH, tiny.TEXT_WIDTH, generator=generator),
    }


def with_context(model, inputs, **text_settings):
    """Return the inputs with the text's keys and values in place of the text."""
    text = inputs["encoder_hidden_states"]
    others = {name: value for name, value in inputs.items() if name != "encoder_hidden_states"}
    return others | {"text_context": model.encode_text_context(text, **text_settings)}


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def test_skipped_blocks_equal_a_model_without_them():
    model, inputs = tiny.transformer(depth=4), make_inputs()
    shorter = copy.deepcopy(model)
    shorter.blocks = nn.ModuleList([model.blocks[0], model.blocks[3]])
    shorter.register_to_config(depth=2)
    output = model(**inputs, skip_blocks=[1, 2]).sample
    assert torch.equal(output, shorter(**inputs).sample)
    assert relative_error(model(**with_context(model, inputs), skip_blocks={1, 2}).sample, output) < TOLERANCE
    assert relative_error(model(**inputs).sample, output) > 1e-2
    assert torch.equal(model(**inputs, skip_blocks=(), identity_attention_blocks=()).sample, model(**inputs).sample)


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_identity_attention_matches_attention_by_hand(masked):
    model, inputs = tiny.transformer(depth=3), make_inputs()
    mask = torch.arange(TEXT_LENGTH) < torch.tensor([5, 3, 1])[:, None]
    text_settings = {"attention_mask": mask} if masked else {}
    counts = mask[:, None].expand(-1, TOKENS, -1) if masked else None
    by_hand = copy.deepcopy(model)
    by_hand.blocks[1].attention.processor = ByHand(alone=True, counts=counts)
    expected = by_hand(**inputs, **text_settings).sample
    output = model(**inputs, **text_settings, identity_attention_blocks=[1]).sample
    assert relative_error(output, expected) < TOLERANCE
    context = with_context(model, inputs, **text_settings)
    assert relative_error(model(**context, identity_attention_blocks=[1]).sample, expected) < TOLERANCE
    assert relative_error(model(**inputs, **text_settings).sample, expected) > 1e-3


@torch.no_grad()
def test_text_value_weights_match_attention_by_hand():
    """A weight of 0 keeps a token's share of the attention, but adds nothing."""
    model, inputs = tiny.transformer(resolution_tokens=True), make_inputs()
    weights = torch.tensor([1.0, 0.0, 1.7]).repeat(BATCH, 2)[:, :TEXT_LENGTH]
    by_hand = copy.deepcopy(model)
    for block in by_hand.blocks:  # two tokens of the size come first
        block.attention.processor = ByHand(weights=torch.nn.functional.pad(weights, (2, 0), value=1.0))
    expected = by_hand(**inputs).sample
    assert relative_error(model(**inputs, text_value_weights=weights).sample, expected) < TOLERANCE
    size = {"height": HEIGHT, "width": WIDTH}
    context = with_context(model, inputs, text_value_weights=weights, **size)
    assert relative_error(model(**context).sample, expected) < TOLERANCE
    plain, ones = model(**inputs).sample, torch.ones(BATCH, TEXT_LENGTH)
    assert torch.equal(model(**inputs, text_value_weights=ones).sample, plain)
    assert relative_error(plain, expected) > 1e-3


@torch.no_grad()
def test_mask_per_image_token_matches_attention_by_hand():
    model, inputs = tiny.transformer(), make_inputs()
    counts = torch.rand(BATCH, TOKENS, TEXT_LENGTH, generator=torch.Generator().manual_seed(3)) < 0.6
    by_hand = copy.deepcopy(model)
    for block in by_hand.blocks:
        block.attention.processor = ByHand(counts=counts)
    expected = by_hand(**inputs).sample
    assert relative_error(model(**inputs, attention_mask=counts).sample, expected) < TOLERANCE
    assert relative_error(model(**with_context(model, inputs, attention_mask=counts)).sample, expected) < TOLERANCE
    # a route takes the rows of the tokens that it keeps: here all of them
    route = TokenRoute(0, 2, torch.arange(TOKENS).repeat(BATCH, 1))
    assert relative_error(model(**inputs, attention_mask=counts, route=route).sample, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"skip_blocks": [2]}, "`skip_blocks`"),
        ({"identity_attention_blocks": [-1]}, "`identity_attention_blocks`"),
        ({"attention_mask": torch.ones(BATCH, TOKENS + 1, TEXT_LENGTH)}, "`attention_mask`.*image tokens"),
        ({"attention_mask": torch.ones(BATCH, TOKENS, TEXT_LENGTH + 1)}, "`attention_mask`"),
        ({"text_value_weights": torch.ones(BATCH, TEXT_LENGTH + 1)}, "`text_value_weights`"),
    ],
)
def test_unsuitable_argument_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny.transformer()(**make_inputs(), **arguments)


def test_changed_blocks_are_refused_with_a_cache():
    """A cache would give a changed block what the whole network computed, or the other way round."""
    model = tiny.transformer()
    model.enable_cache(PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: 1))
    with pytest.raises(ValueError, match=r"`skip_blocks`.*disable_cache"):
        model(**make_inputs(), skip_blocks=[0])
