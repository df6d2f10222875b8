"""Wrong arguments and broken components raise a ValueError that names them."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

import tiny
from diffusers_prx.pipelines import PRXPipeline, PRXPixelPipeline
from diffusers_prx.schedulers import PRXFlowMatchScheduler, PRXXPredictionScheduler

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


class GPUGenerator(torch.Generator):
    """A CPU generator that says it is on a GPU."""

    device = torch.device("cuda")


@pytest.fixture(scope="module")
def pipe():
    return tiny.latent_pipeline()


def embeds(rows=1, tokens=5, width=tiny.TEXT_WIDTH):
    return torch.zeros(rows, tokens, width)


def in_place_of_text(**changes):
    """Arguments of a call without guidance that takes embeddings."""
    return {"prompt": None, "prompt_embeds": embeds(), "guidance_scale": 1.0} | changes


def as_negative(**changes):
    return {"negative_prompt_embeds": embeds()} | changes


WRONG_ARGUMENTS = [
    *(("`height`", {"height": height}) for height in (0, 34, np.float64(32), np.True_)),
    ("`width`", {"width": 32.0}),
    *(("`prompt`", {"prompt": prompt}) for prompt in (None, [], 3, ["a", None], ("a", "b"))),
    ("`prompt_embeds`", {"prompt_embeds": embeds()}),
    *(("`negative_prompt`", {"negative_prompt": negative}) for negative in (["a", "b"], [1], [])),
    ("`negative_prompt_embeds`", as_negative(negative_prompt="a")),
    *(("`generator`", {"generator": g}) for g in (0, [], [None], tiny.generators(0, 1), GPUGenerator())),
    ("`generator`", {"generator": [torch.Generator(), GPUGenerator()], "num_images_per_prompt": 2}),
    *(("`num_inference_steps`", {"num_inference_steps": steps}) for steps in (0, 2.5, "4")),
    ("`num_images_per_prompt`", {"num_images_per_prompt": 0}),
    *(("`tokenizer_max_length`", {"tokenizer_max_length": length}) for length in (0, 8.0)),
    *(("`guidance_scale`", {"guidance_scale": scale}) for scale in (0.5, -1.0, math.nan, math.inf, 10**400)),
    *(("`guidance_scale`", {"guidance_scale": scale}) for scale in (None, True, "4", np.float32("nan"))),
    *(("`output_type`", {"output_type": kind}) for kind in ("jpeg", np.array(["pil", "np"]))),
    *((f"`{flag}`", {flag: "no"}) for flag in ("return_dict", "use_resolution_binning", "skip_text_cleaning")),
    *(("`latents`", {"latents": torch.zeros(shape)}) for shape in ((1, 4, 16, 8), (2, 4, 16, 16))),
    ("`latents`", {"latents": torch.full((1, 4, 16, 16), math.nan)}),
    ("`latents`", {"latents": torch.zeros(1, 4, 16, 16, dtype=torch.int64)}),
    ("`latents`", {"latents": np.zeros((1, 4, 16, 16))}),
    *(
        ("`prompt_embeds`", in_place_of_text(prompt_embeds=given))
        for given in (embeds(width=31), embeds()[0], [[0.0]], embeds().long(), embeds() + math.nan)
    ),
    ("`negative_prompt_embeds`", in_place_of_text(guidance_scale=4.0)),
    *(
        ("`negative_prompt_embeds`", as_negative(negative_prompt_embeds=given))
        for given in (embeds(width=31), embeds(rows=2), embeds() + math.inf)
    ),
    ("`prompt_attention_mask`", {"prompt_attention_mask": torch.ones(1, 5)}),
    *(
        ("`prompt_attention_mask`", in_place_of_text(prompt_attention_mask=mask))
        for mask in (torch.ones(1, 4), [[1] * 5])
    ),
    *(
        ("`negative_prompt_attention_mask`", as_negative(negative_prompt_attention_mask=mask))
        for mask in (torch.ones(2, 5), torch.full((1, 5), -1e4))
    ),
    ("`callback_on_step_end`", {"callback_on_step_end": 3}),
    *(
        ("`callback_on_step_end`", {"callback_on_step_end": lambda *_, returned=returned: returned})
        for returned in (
            torch.zeros(1),
            {"noise": torch.zeros(1)},
            {"latents": [0.0]},
            {"latents": torch.zeros(1)},
            {"latents": torch.zeros(1, 4, 16, 16).long()},
        )
    ),
    *(
        ("`callback_on_step_end_tensor_inputs`", {"callback_on_step_end_tensor_inputs": names})
        for names in ("latents", ["noise"], [["latents"]])
    ),
    ("`sigmas`", {"timesteps": [1000, 500], "sigmas": [1.0, 0.5]}),
]


@pytest.mark.parametrize(("argument", "kwargs"), WRONG_ARGUMENTS)
def test_wrong_argument_of_the_call_is_named(pipe, argument, kwargs):
    with pytest.raises(ValueError, match=argument):
        pipe(**{"prompt": "a cat", "num_inference_steps": 1, "output_type": "latent"} | kwargs)


@pytest.mark.parametrize("levels", ["sigmas", "timesteps"])
@pytest.mark.parametrize("scheduler", ["ours", "euler", "unipc", "dpm"])
def test_invalid_noise_levels_are_refused_by_every_scheduler(pipe, scheduler, levels):
    """Without the check, diffusers' own schedulers would draw something from most of them."""
    swapped = PRXPipeline(**pipe.components, default_sample_size=32)
    others = {"euler": FlowMatchEulerDiscreteScheduler(), "unipc": UniPCMultistepScheduler(**FLOW)}
    others["dpm"] = DPMSolverMultistepScheduler(**FLOW)
    swapped.scheduler = others.get(scheduler, swapped.scheduler)
    unit = 1 if levels == "sigmas" else 1000
    wrong = [[], "abc", [[1.0]]]
    for values in ([1.2, 0.5], [0.2, 0.9], [1.0, 0.0], [math.nan]):
        wrong += [[unit * value for value in values], unit * torch.tensor(values)]
    for values in wrong:
        with pytest.raises(ValueError, match=f"`{levels}`"):
            swapped("a cat", **{levels: values}, output_type="latent")


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        (FlowMatchEulerDiscreteScheduler(shift=math.nan), 2),
        (FlowMatchEulerDiscreteScheduler(shift=-3.0), 2),
        (FlowMatchEulerDiscreteScheduler(shift_terminal=0.1), 1),
        (UniPCMultistepScheduler(**FLOW, flow_shift=math.inf), 2),
        (DPMSolverMultistepScheduler(**FLOW, flow_shift=-2.0), 2),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_scheduler_options_that_give_invalid_noise_levels_are_refused(pipe, scheduler, steps):
    swapped = PRXPipeline(**pipe.components, default_sample_size=32)
    swapped.scheduler = scheduler
    with pytest.raises(ValueError, match=f"`scheduler` is a {type(scheduler).__name__}"):
        swapped("a cat", num_inference_steps=steps, output_type="latent")


def test_numpy_numbers_are_accepted(pipe, tmp_path):
    settings = {"height": 16, "width": 32, "num_inference_steps": 2, "num_images_per_prompt": 2}
    settings |= {"tokenizer_max_length": 6}
    draw = lambda **given: pipe("a cat", generator=tiny.generators(0)[0], output_type="pt", **given).images  # noqa: E731
    expected = draw(**settings, guidance_scale=3.0)
    for kind in (np.int64, np.int32, np.uint8):
        given = {name: kind(value) for name, value in settings.items()}
        assert torch.equal(draw(**given, guidance_scale=kind(3)), expected)
    assert torch.equal(draw(**settings, guidance_scale=np.float32(3)), expected)
    numbers = {"default_sample_size": np.int64(32), "noise_scale": np.float32(1), "token_route": (0, np.int64(1), 0.5)}
    made = tiny.latent_pipeline(**numbers)
    made.save_pretrained(tmp_path)
    assert PRXPipeline.from_pretrained(tmp_path).config["token_route"] == (0, 1, 0.5)


def test_guidance_is_off_at_zero_and_one(pipe):
    draw = lambda scale: pipe("a cat", generator=tiny.generators(0)[0], guidance_scale=scale, output_type="pt").images  # noqa: E731
    off = draw(1.0)
    for scale in (0.0, 0, 1, np.float64(0)):
        assert torch.equal(draw(scale), off)
    assert (draw(4.0) - off).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["text_encoder", "tokenizer", "transformer", "scheduler"])
def test_missing_component_is_named(pipe, name):
    incomplete = PRXPipeline(**pipe.components | {name: None}, default_sample_size=32, prediction_type="velocity")
    with pytest.raises(ValueError, match=f"`{name}`"):
        incomplete("a cat", num_inference_steps=1)


def test_embeddings_need_no_text_encoder(pipe):
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    given = dict(zip(names, pipe.encode_prompt("a cat")))
    components = pipe.components | {"text_encoder": None, "tokenizer": None}
    bare = PRXPipeline(**components, default_sample_size=32)
    args = {"num_inference_steps": 2, "output_type": "pt"}
    expected = pipe("a cat", generator=tiny.generators(0)[0], **args).images
    assert torch.equal(bare(generator=tiny.generators(0)[0], **given, **args).images, expected)


@pytest.mark.parametrize(
    ("match", "kwargs"),
    [
        ("`negative_prompt`", {"prompt": ["a", "b"], "negative_prompt": ["x"]}),
        ("`num_images_per_prompt`", {"prompt": "a", "num_images_per_prompt": 0}),
        ("`prompt_embeds`", {"prompt_embeds": embeds(width=31), "do_classifier_free_guidance": False}),
        ("`prompt_embeds`", {"prompt_embeds": embeds() + math.nan, "do_classifier_free_guidance": False}),
        ("`prompt`", {}),
    ],
)
def test_wrong_argument_of_encode_prompt_is_named(pipe, match, kwargs):
    with pytest.raises(ValueError, match=match):
        pipe.encode_prompt(**kwargs)


def test_pipeline_of_the_other_kind_is_refused(pipe):
    pixel = tiny.pixel_pipeline()
    with pytest.raises(ValueError, match="`pipeline`"):
        PRXPixelPipeline.from_pipe(pipe)
    with pytest.raises(ValueError, match="`pipeline`"):
        PRXPipeline.from_pipe(pixel)
    with pytest.raises(ValueError, match="`transformer`"):
        PRXPixelPipeline(**pixel.components | {"transformer": pipe.transformer}, prediction_type="x_prediction")


def break_component(name):
    """Return a pipeline in which something overflows or holds NaN, arguments, and what the message must name."""
    pipe = tiny.latent_pipeline()
    if name == "text encoder in float16":
        pipe.text_encoder.half()
        for layer in pipe.text_encoder.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.data.fill_(6e4)
        return pipe, {}, r"`text_encoder`.*float16"
    if name == "weight of the text encoder":
        next(pipe.text_encoder.parameters()).data[3] = math.nan
        return pipe, {}, r"`text_encoder`.*weights.*embed"
    if name == "weight of the transformer":
        pipe.transformer.blocks[1].down_proj.weight.data[0, 0] = math.inf
        return pipe, {}, r"`transformer`.*step 1 of 3.*blocks\.1\.down_proj\.weight"
    if name == "text in the transformer's dtype":
        pipe.transformer.half()
        given = {"prompt_embeds": embeds() + 1e6, "guidance_scale": 1.0, "prompt": None}
        return pipe, given, "float16.*`prompt_embeds`"
    if name == "guidance":
        return pipe, {"guidance_scale": 1e30}, r"`transformer`.*step 2 of 3.*`guidance_scale` 1e\+30"
    if name == "more guidance":
        return pipe, {"guidance_scale": 1e300}, r"step 1 of 3.*`guidance_scale` 1e\+300"
    if name == "vae":
        pipe.vae.half()
        for weight in pipe.vae.decoder.parameters():
            weight.data.mul_(1e4)
        return pipe, {"output_type": "pil"}, r"`vae`.*float16"
    if name == "callback":

        def callback(pipeline, step, timestep, tensors):
            if step == 2:  # the last step, so that no prediction follows
                tensors["latents"].fill_(math.nan)

        return pipe, {"callback_on_step_end": callback}, r"`callback_on_step_end`.*`latents`.*step 3 of 3"
    assert name == "text of a callback"
    swap = lambda pipeline, step, t, tensors: {"prompt_embeds": tensors["prompt_embeds"] * math.inf}  # noqa: E731
    given = {"callback_on_step_end": swap, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    return pipe, given, "`prompt_embeds`.*`callback_on_step_end`"


@pytest.mark.parametrize(
    "name",
    [
        "text encoder in float16",
        "weight of the text encoder",
        "weight of the transformer",
        "guidance",
        "more guidance",
        "text in the transformer's dtype",
        "vae",
        "callback",
        "text of a callback",
    ],
)
def test_first_component_with_nan_is_named(name):
    pipe, given, message = break_component(name)
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a red cat", "num_inference_steps": 3, "output_type": "latent"} | given)


def test_steps_do_not_wait_for_the_device(pipe, monkeypatch):
    """Reading a value at every step would make the CPU wait for a GPU each time."""
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, read=read: (reads.append(1), read(self))[1])

    def count(call):
        reads.clear()
        call()
        return len(reads)

    scheduler = PRXFlowMatchScheduler(shift=3.0)
    scheduler.set_timesteps(2)
    x, t = torch.ones(1, 2), scheduler.timesteps[0]
    each = count(lambda: scheduler.step(x, t, x))  # on the CPU, whatever the device of the call
    args = {"prompt": "a cat", "output_type": "latent"}
    few, many = (count(lambda n=n: pipe(num_inference_steps=n, **args)) for n in (2, 6))
    assert many - few == 4 * each


@pytest.mark.parametrize(
    ("scheduler", "match"),
    [
        (PRXXPredictionScheduler(), "PRXFlowMatchScheduler"),
        (DDIMScheduler(), "DDIMScheduler"),
        (DPMSolverMultistepScheduler(), "use_flow_sigmas=True, prediction_type='flow_prediction'"),
        (UniPCMultistepScheduler(use_flow_sigmas=True), "prediction_type='flow_prediction'"),
        (UniPCMultistepScheduler(**FLOW, use_karras_sigmas=True), "use_karras_sigmas=False"),
        (DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"), "algorithm_type='dpmsolver\\+\\+'"),
        (UniPCMultistepScheduler(**FLOW, final_sigmas_type="sigma_min"), "final_sigmas_type='zero'"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting=False"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling=False"),
    ],
)
def test_unsuitable_scheduler_is_refused(pipe, scheduler, match):
    """At construction, and at the call if it was replaced later."""
    with pytest.raises(ValueError, match=match):
        tiny.latent_pipeline(scheduler=scheduler, prediction_type="velocity")
    swapped = PRXPipeline(**pipe.components, default_sample_size=32)
    swapped.scheduler = scheduler
    with pytest.raises(ValueError, match=match):
        swapped("a cat")


def test_custom_noise_levels_need_a_scheduler_that_takes_them(pipe):
    swapped = PRXPipeline(**pipe.components, default_sample_size=32)
    swapped.scheduler = DPMSolverMultistepScheduler(**FLOW)
    with pytest.raises(ValueError, match="`sigmas`"):
        swapped("a cat", sigmas=[1.0, 0.5])
    swapped.scheduler = UniPCMultistepScheduler(**FLOW)
    with pytest.raises(ValueError, match="`timesteps`"):
        swapped("a cat", timesteps=[1000, 500])


@pytest.mark.parametrize(
    ("match", "kwargs"),
    [
        ("`prediction_type`", {"prediction_type": "epsilon"}),
        ("`noise_scale`", {"noise_scale": 0.0}),
        ("`noise_scale`", {"noise_scale": float("nan")}),
        ("`default_sample_size`", {"default_sample_size": 0}),
        ("`vae`", {"vae": tiny.text_encoder()}),
        ("`transformer`", {"transformer": tiny.transformer(in_channels=16)}),
        ("PRXXPredictionScheduler", {"prediction_type": "x_prediction", "scheduler": PRXFlowMatchScheduler()}),
    ],
)
def test_wrong_argument_of_the_constructor_is_named(match, kwargs):
    with pytest.raises(ValueError, match=match):
        tiny.latent_pipeline(**kwargs)


def test_text_encoder_of_another_width_is_refused():
    pipe = tiny.latent_pipeline(transformer=tiny.transformer(context_in_dim=48))
    with pytest.raises(ValueError, match="`text_encoder`"):
        pipe("a cat")


def test_prompt_max_tokens_must_be_positive():
    with pytest.raises(ValueError, match="prompt_max_tokens"):
        tiny.pixel_pipeline(prompt_max_tokens=0)
