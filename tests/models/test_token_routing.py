"""Routed forwards, against a slow forward that removes tokens by hand, sample by sample, without masks."""

import json
import math
import shutil

import pytest
import torch
from diffusers.training_utils import EMAModel

import tiny
from diffusers_prx.compat import get_timestep_embedding
from diffusers_prx.models.token_routing import TokenRoute, sample_route
from diffusers_prx.models.transformer_prx import PRXTransformer2DModel, patchify, rotary_table, unpatchify

START, STOP, DEPTH = 1, 3, 4
AXES = [6, 10]  # uneven, so that rows and columns cannot be mistaken for each other
HEIGHT, WIDTH, BATCH, TEXT_LENGTH = 8, 12, 3, 7
TOKENS = HEIGHT * WIDTH // 4
KINDS = {"tread": {}, "sprint": {"fusion_range": [START, STOP]}}
PADDINGS = [None, "right", "left"]

# The largest relative difference seen between the model and the slow forward is 4e-7 (order of summation).
TOLERANCE = 5e-6


def make_model(kind: str, **changes) -> PRXTransformer2DModel:
    model = tiny.transformer(depth=DEPTH, axes_dim=AXES, **KINDS[kind] | changes)
    if model.fusion is not None:
        assert model.fusion.mask_token.abs().min() > 0
    return model


def make_inputs(padding: str | None = None, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, HEIGHT, WIDTH, generator=generator),
        "timestep": torch.rand(BATCH, generator=generator),
        "encoder_hidden_states": torch.randn(BATCH, TEXT_LENGTH, tiny.TEXT_WIDTH, generator=generator),
    }
    if padding is not None:
        mask = torch.arange(TEXT_LENGTH) < torch.tensor([7, 5, 2])[:, None]
        inputs["attention_mask"] = mask if padding == "right" else mask.flip(1)
    return inputs


def make_route(ratio: float = 0.5, seed: int = 2, start: int = START, stop: int = STOP) -> TokenRoute:
    return sample_route(torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(seed)), ratio, start, stop)


def time_vector(model, timestep: torch.Tensor) -> torch.Tensor:
    return model.time_in(
        get_timestep_embedding(timestep, 256, scale=1000.0, flip_sin_to_cos=True, downscale_freq_shift=0.0)
    )


def slow_forward(model, inputs, kept: list[list[int]] | None):
    """Return the prediction, and the tokens of each sample after each block as {position: features}.

    `kept` are the positions that stay in the blocks [START, STOP); None for no route. Padded text is cut away.
    """
    table = rotary_table(HEIGHT // 2, WIDTH // 2, tuple(AXES), 10000, torch.device("cpu"))
    samples, stages = [], [[] for _ in range(DEPTH)]
    for b in range(BATCH):
        text = inputs["encoder_hidden_states"][b]
        if "attention_mask" in inputs:
            text = text[inputs["attention_mask"][b]]
        text = model.txt_in(text)[None]
        temb = time_vector(model, inputs["timestep"][[b]])
        stream = dict(enumerate(model.img_in(patchify(inputs["hidden_states"][[b]], 2))[0]))
        for index, block in enumerate(model.blocks):
            if index == START:
                before = dict(stream)
                stream = stream if kept is None else {place: stream[place] for place in kept[b]}
            places = list(stream)
            rows = torch.stack([table[place] for place in places])
            out = block(torch.stack([stream[place] for place in places])[None], text, temb, rows, None)[0]
            stream = dict(zip(places, out))
            stages[index].append(stream)
            if index == STOP - 1 and model.fusion is None:
                stream = {place: stream.get(place, before[place]) for place in range(TOKENS)}
            elif index == STOP - 1:
                weight, bias = model.fusion.linear.weight, model.fusion.linear.bias
                deep = {place: stream.get(place, model.fusion.mask_token) for place in range(TOKENS)}
                width = len(bias)
                stream = {
                    place: weight[:, :width] @ before[place] + weight[:, width:] @ deep[place] + bias
                    for place in range(TOKENS)
                }
        samples.append(model.final_layer(torch.stack([stream[place] for place in range(TOKENS)])[None], temb))
    return unpatchify(torch.cat(samples), 2, HEIGHT, WIDTH), stages


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def gradients(model, inputs, **kwargs) -> dict[str, torch.Tensor | None]:
    """Return the gradients of a loss that weights every value of prediction and features differently."""
    model.zero_grad(set_to_none=True)
    output = model(**inputs, **kwargs)
    loss = torch.zeros(())
    for tensor in (output.sample, output.features):
        if tensor is not None:
            weights = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3))
            loss = loss + (tensor.float() * weights).sum()
    loss.backward()
    return {"loss": loss.detach()} | {
        name.removeprefix("_orig_mod."): parameter.grad for name, parameter in model.named_parameters()
    }


# --- drawing routes


@pytest.mark.parametrize(
    ("tokens", "ratio", "kept"),
    [(24, 0.5, 12), (24, 0.75, 6), (24, 0.0, 24), (25, 0.3, 17), (7, 0.5, 3), (4, 0.99, 1), (1, 0.5, 1), (10, 0.9, 1)],
)
def test_route_keeps_the_smallest_scores_in_order(tokens, ratio, kept):
    scores = torch.rand(5, tokens, generator=torch.Generator().manual_seed(0))
    route = sample_route(scores, ratio, 2, 5)
    assert (route.start, route.stop, route.kept.shape, route.kept.dtype) == (2, 5, (5, kept), torch.int64)
    for row, places in zip(scores.tolist(), route.kept.tolist()):
        assert places == sorted(places)
        assert sorted(row[place] for place in places) == sorted(row)[:kept]


def test_every_token_is_kept_equally_often():
    """Chi-square of 4000 draws of 6 of 24: dividing by 1 - 6/24 allows for drawing without replacement."""
    scores = torch.rand(4000, 24, generator=torch.Generator().manual_seed(0))
    counts = sample_route(scores, 0.75, 0, 1).kept.flatten().bincount(minlength=24).double()
    expected = 4000 * 6 / 24
    chi_square = ((counts - expected) ** 2 / expected).sum().item() / (1 - 6 / 24) * 23 / 24
    assert 11 < chi_square < 40  # 23 degrees of freedom: 1.5% below, 1.5% above


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match="`ratio`"):
        sample_route(torch.rand(2, 8), ratio, 0, 1)


def test_gather_and_scatter():
    route = make_route()
    tokens, others = torch.randn(2, BATCH, TOKENS, 5)
    few = route.gather(tokens)
    whole = route.scatter(few, others)
    for b, places in enumerate(route.kept.tolist()):
        assert torch.equal(few[b], torch.stack([tokens[b, place] for place in places]))
        for place in range(TOKENS):
            assert torch.equal(whole[b, place], (tokens if place in places else others)[b, place])


# --- the forward


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_routed_forward_matches_tokens_removed_by_hand(kind, padding):
    """Prediction and features of every block."""
    model, inputs, route = make_model(kind), make_inputs(padding), make_route()
    expected, stages = slow_forward(model, inputs, route.kept.tolist())
    with torch.no_grad():
        for block in range(DEPTH):
            output = model(**inputs, route=route, feature_block=block)
            assert relative_error(output.sample, expected) < TOLERANCE
            inside = START <= block < STOP
            assert output.feature_indices is (route.kept if inside else None)
            places = route.kept.tolist() if inside else [list(range(TOKENS))] * BATCH
            features = torch.stack([torch.stack([stages[block][b][n] for n in places[b]]) for b in range(BATCH)])
            assert relative_error(output.features, features) < TOLERANCE
        unrouted = model(**inputs).sample
    assert relative_error(unrouted, expected) > 1e-2  # the route matters


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_route_all_tokens_go_through_the_blocks(kind, padding):
    """And through the fusion, which runs with and without a route."""
    model, inputs = make_model(kind), make_inputs(padding)
    expected, stages = slow_forward(model, inputs, None)
    with torch.no_grad():
        output = model(**inputs, feature_block=START)
        assert relative_error(output.sample, expected) < TOLERANCE
        features = torch.stack([torch.stack(list(stage.values())) for stage in stages[START]])
        assert relative_error(output.features, features) < TOLERANCE
        assert output.feature_indices is None
        if kind == "sprint":
            model.fusion.linear.weight[:, : model.config.hidden_size] = 0
            assert relative_error(model(**inputs).sample, expected) > 1e-2


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_route_that_keeps_all_tokens_changes_no_bit(kind, padding):
    model, inputs = make_model(kind), make_inputs(padding)
    with torch.no_grad():
        plain = model(**inputs, feature_block=START)
        routed = model(**inputs, route=make_route(0.0), feature_block=START)
    assert torch.equal(routed.sample, plain.sample)
    assert torch.equal(routed.features, plain.features)
    assert torch.equal(routed.feature_indices, torch.arange(TOKENS).expand(BATCH, -1))


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, DEPTH), (DEPTH - 1, DEPTH)])
def test_route_around_the_first_the_last_or_all_blocks(start, stop):
    """Around all blocks, the skipping tokens reach the output unchanged."""
    model, inputs = make_model("tread"), make_inputs("right")
    route = make_route(start=start, stop=stop)
    with torch.no_grad():
        output = model(**inputs, route=route, feature_block=stop - 1)
        tokens = model.img_in(patchify(inputs["hidden_states"], 2))
        if stop - start == DEPTH:
            last = route.scatter(output.features, tokens)
            values = model.final_layer(last, time_vector(model, inputs["timestep"]))
            expected = unpatchify(values, 2, HEIGHT, WIDTH)
            assert torch.equal(output.sample, expected)
    assert output.features.shape == (BATCH, TOKENS // 2, 32)
    assert torch.equal(output.feature_indices, route.kept)
    other = sample_route(torch.rand(BATCH, TOKENS), 0.5, START, STOP)
    assert relative_error(model(**inputs, route=other).sample, output.sample) > 1e-2


def test_order_of_the_kept_tokens_does_not_matter():
    """Each token keeps its position."""
    model, inputs, route = make_model("tread"), make_inputs("right"), make_route()
    reversed_route = TokenRoute(START, STOP, route.kept.flip(1))
    with torch.no_grad():
        expected = model(**inputs, route=route, feature_block=STOP - 1)
        actual = model(**inputs, route=reversed_route, feature_block=STOP - 1)
    assert relative_error(actual.sample, expected.sample) < TOLERANCE
    assert relative_error(actual.features.flip(1), expected.features) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_independent(kind):
    model, inputs, route = make_model(kind, resolution_tokens=True), make_inputs("right"), make_route()
    with torch.no_grad():
        together = model(**inputs, route=route, feature_block=START)
        for row in range(BATCH):
            alone = model(
                **{name: value[[row]] for name, value in inputs.items()},
                route=TokenRoute(START, STOP, route.kept[[row]]),
                feature_block=START,
            )
            assert relative_error(alone.sample, together.sample[[row]]) < TOLERANCE
            assert relative_error(alone.features, together.features[[row]]) < TOLERANCE


def test_tuple_output():
    model, inputs, route = make_model("tread"), make_inputs(), make_route()
    with torch.no_grad():
        output = model(**inputs, route=route, feature_block=START)
        sample, features, indices = model(**inputs, route=route, feature_block=START, return_dict=False)
        assert len(model(**inputs, route=route, return_dict=False)) == 1
        assert model(**inputs, route=route).features is None
    assert torch.equal(sample, output.sample)
    assert torch.equal(features, output.features)
    assert indices is route.kept


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_is_as_close_to_float32_with_a_route_as_without(kind):
    errors = {}
    model, inputs = make_model(kind), make_inputs("right")
    with torch.no_grad():
        for name, route in (("plain", None), ("routed", make_route())):
            expected = model(**inputs, route=route, feature_block=START)
            with torch.autocast("cpu", torch.bfloat16):
                actual = model(**inputs, route=route, feature_block=START)
            assert actual.features.dtype == torch.bfloat16
            difference = (actual.sample.float() - expected.sample).square().mean()
            errors[name] = (difference / expected.sample.square().mean()).sqrt().item()
    assert 1e-4 < errors["routed"] < 0.02  # seen: 0.006 to 0.007, with and without
    assert errors["routed"] < 1.5 * errors["plain"]


# --- training


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_with_a_route(kind):
    model, inputs = make_model(kind, resolution_tokens=True, bottleneck_size=12), make_inputs("right")
    for name, gradient in gradients(model, inputs, route=make_route()).items():
        assert gradient is not None, name
        assert gradient.count_nonzero() > 0, name
    if kind == "sprint":  # without a route no token is replaced
        assert gradients(model, inputs)["fusion.mask_token"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_match_tokens_removed_by_hand(kind):
    """Including those through the skipping tokens."""
    model, inputs, route = make_model(kind), make_inputs("right"), make_route()
    actual = gradients(model, inputs, route=route)
    model.zero_grad(set_to_none=True)
    sample, _ = slow_forward(model, inputs, route.kept.tolist())
    (sample * torch.randn(sample.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    for name, parameter in model.named_parameters():
        assert relative_error(actual[name], parameter.grad) < 2e-5, name  # seen: 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_model_predicts_zero_with_a_route(kind):
    settings = dict(make_model(kind).config)
    torch.manual_seed(0)
    model = PRXTransformer2DModel.from_config(settings)
    output = model(**make_inputs(), route=make_route(), feature_block=DEPTH - 1)
    assert output.sample.abs().max() == 0
    assert output.features.std() > 0.1
    if kind == "sprint":
        big = PRXTransformer2DModel(hidden_size=1024, num_heads=16, depth=1, fusion_range=(0, 1)).fusion
        assert big.mask_token.std().item() == pytest.approx(0.02, rel=0.1)
        assert big.linear.bias.abs().max() == 0
        assert big.linear.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 3072), rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_bit(kind):
    model, inputs = make_model(kind), make_inputs("right")
    expected = gradients(model, inputs, route=make_route(), feature_block=START)
    model.enable_gradient_checkpointing()
    actual = gradients(model, inputs, route=make_route(), feature_block=START)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_ema_averages_and_stores_the_new_parameters(tmp_path):
    model = make_model("sprint", resolution_tokens=True)
    ema = EMAModel(model.parameters(), decay=0.5, model_cls=PRXTransformer2DModel, model_config=model.config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(2):  # the first step copies
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        ema.step(model.parameters())
    decay = ema.cur_decay_value
    assert 0 < decay < 1
    ema.save_pretrained(tmp_path)
    averaged = PRXTransformer2DModel.from_pretrained(tmp_path)
    assert averaged.config["fusion_range"] == [START, STOP]
    loaded = EMAModel.from_pretrained(tmp_path, PRXTransformer2DModel)
    for shadow, (name, parameter) in zip(loaded.shadow_params, averaged.named_parameters()):
        assert torch.equal(shadow, parameter)
        torch.testing.assert_close(parameter.detach(), before[name] + 2 - decay, rtol=0, atol=1e-6)
    names = {name.partition(".")[0] for name, _ in averaged.named_parameters()}
    assert {"fusion", "resolution_token_embedder"} <= names


# --- torch.compile


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_as_one_graph(fresh_dynamo, kind):
    """`fullgraph=True` raises at a graph break; AOT autograd traces the backward pass as well."""
    sprint = kind == "sprint"
    model = tiny.transformer(depth=1, fusion_range=[0, 1] if sprint else None, resolution_tokens=sprint)
    inputs, routes = make_inputs("right"), [make_route(seed=seed, start=0, stop=1) for seed in (2, 5)]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for route in routes:
        expected = gradients(model, inputs, route=route, feature_block=0)
        actual = gradients(compiled, inputs, route=route, feature_block=0)
        assert actual.keys() == expected.keys()
        for name in expected:
            assert relative_error(actual[name], expected[name]) < 2e-5, name
    assert torch.equal(compiled(**inputs, route=route, feature_block=0).feature_indices, route.kept)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same_numbers(fresh_dynamo):
    model = tiny.transformer(depth=1, fusion_range=[0, 1], resolution_tokens=True)
    inputs, route = make_inputs("right"), make_route(start=0, stop=1)
    with torch.no_grad():
        expected = model(**inputs, route=route, feature_block=0)
        actual = torch.compile(model, fullgraph=True)(**inputs, route=route, feature_block=0)
    assert relative_error(actual.sample, expected.sample) < TOLERANCE
    assert relative_error(actual.features, expected.features) < TOLERANCE


# --- saving and loading


def test_fusion_is_saved_and_loaded(tmp_path):
    model, inputs, route = make_model("sprint"), make_inputs("right"), make_route()
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["fusion_range"] == [START, STOP]
    assert "resolution_tokens" not in stored
    loaded, report = PRXTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] + report["unexpected_keys"]
    assert {"fusion.mask_token", "fusion.linear.weight", "fusion.linear.bias"} <= loaded.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert relative_error(loaded(**inputs, route=route).sample, model(**inputs, route=route).sample) < TOLERANCE


def test_fusion_offloaded_to_disk(tmp_path):
    """Weights on disk are fetched when their module is called: the mask token must be used through a call."""
    model, inputs, route = make_model("sprint"), make_inputs(), make_route()
    model.save_pretrained(tmp_path / "model")
    device_map = {name: "cpu" for name, _ in model.named_children()} | {"fusion": "disk"}
    loaded = PRXTransformer2DModel.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    assert loaded.fusion.mask_token.device.type == "meta"
    with torch.no_grad():
        assert relative_error(loaded(**inputs, route=route).sample, model(**inputs, route=route).sample) < TOLERANCE


# --- wrong use


@pytest.mark.parametrize("fusion_range", [(2, 2), (3, 1), (-1, 2), (0, DEPTH + 1), (1,), (1, 2, 3)])
def test_wrong_fusion_range_is_refused(fusion_range):
    with pytest.raises(ValueError, match="`fusion_range`"):
        make_model("tread", fusion_range=fusion_range)


@pytest.mark.parametrize(
    ("kind", "route", "message"),
    [
        ("tread", {"start": 2, "stop": 2}, r"`route`.*\[2, 2\)"),
        ("tread", {"start": 1, "stop": 5}, r"`route`.*\[1, 5\)"),
        ("tread", {"start": -1, "stop": 2}, r"`route`.*\[-1, 2\)"),
        ("sprint", {"start": 1, "stop": 2}, "`fusion_range`"),
        ("tread", {"kept": torch.zeros(2, 5, dtype=torch.int64)}, r"`route\.kept`"),
        ("tread", {"kept": torch.zeros(3, 0, dtype=torch.int64)}, r"`route\.kept`"),
        ("tread", {"kept": torch.zeros(3, 25, dtype=torch.int64)}, r"`route\.kept`"),
        ("tread", {"kept": torch.zeros(3, dtype=torch.int64)}, r"`route\.kept`"),
    ],
)
def test_wrong_route_is_refused(kind, route, message):
    settings = {"start": START, "stop": STOP, "kept": torch.zeros(3, 5, dtype=torch.int64)} | route
    with pytest.raises(ValueError, match=message):
        make_model(kind)(**make_inputs(), route=TokenRoute(**settings))


@pytest.mark.parametrize("block", [-1, DEPTH])
def test_feature_block_out_of_range_is_refused(block):
    with pytest.raises(ValueError, match="`feature_block`"):
        make_model("tread")(**make_inputs(), feature_block=block)


@pytest.mark.parametrize(
    ("tokens", "ratio", "photoroom", "authors"),
    [
        (5, 0.5, 3, 3),
        (7, 0.5, 3, 4),
        (9, 0.5, 5, 5),
        (257, 0.75, 64, 65),
        (27 * 37, 0.5, 499, 500),
        (1, 0.5, 1, 1),
        (2, 0.1, 1, 2),
        (9, 0.0, 9, 9),
    ],
)
def test_number_of_kept_tokens_is_that_of_the_original_trainer(tokens, ratio, photoroom, authors):
    """The trainer rounds the number of skipping tokens; the code of TREAD's authors rounds it down."""
    kept = sample_route(torch.rand(2, tokens, generator=torch.Generator().manual_seed(0)), ratio, 0, 1).kept
    assert kept.shape == (2, photoroom)
    assert authors == tokens - int(tokens * ratio)
    assert authors - photoroom in (0, 1)
