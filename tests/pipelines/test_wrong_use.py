"""Wrong use is a ValueError that names the argument."""

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


class Elsewhere(torch.Generator):
    """A generator as on a GPU."""

    device = torch.device("cuda")


@pytest.fixture(scope="module")
def pipe():
    return tiny.latent_pipeline()


def embeds(rows=1, tokens=5, width=tiny.TEXT_WIDTH):
    return torch.zeros(rows, tokens, width)


@pytest.mark.parametrize(
    ("match", "kwargs"),
    [
        ("`height`", {"height": 0}),
        ("`height`", {"height": -32}),
        ("`width`", {"width": 32.0}),
        ("multiples of 4", {"height": 34}),
        ("multiples of 4", {"width": 30}),
        ("neither of `prompt`", {"prompt": None}),
        ("`prompt`", {"prompt": []}),
        ("`prompt`", {"prompt": 3}),
        ("`prompt`", {"prompt": ["a", None]}),
        ("`prompt`", {"prompt": ("a", "b")}),
        ("both of `prompt` and `prompt_embeds`", {"prompt_embeds": embeds()}),
        ("`negative_prompt` has 2", {"negative_prompt": ["a", "b"]}),
        ("`negative_prompt` is", {"negative_prompt": [1]}),
        ("`negative_prompt` is", {"negative_prompt": []}),
        ("both `negative_prompt` and", {"negative_prompt": "a", "negative_prompt_embeds": embeds()}),
        ("`generator` is a list of 2", {"generator": tiny.generators(0, 1)}),
        ("`generator` is a list of 1", {"generator": tiny.generators(0), "num_images_per_prompt": 2}),
        ("`generator`", {"generator": 0}),
        ("`num_inference_steps`", {"num_inference_steps": 0}),
        ("`num_inference_steps`", {"num_inference_steps": 2.5}),
        ("`num_images_per_prompt`", {"num_images_per_prompt": 0}),
        ("`prompt_attention_mask` is", {"prompt": None, "prompt_embeds": embeds(), "guidance_scale": 1.0,
                                        "prompt_attention_mask": torch.ones(1, 4)}),
        ("`negative_prompt_attention_mask` is", {"negative_prompt_embeds": embeds(),
                                                 "negative_prompt_attention_mask": torch.ones(2, 5)}),
        ("`prompt_attention_mask` came without", {"prompt_attention_mask": torch.ones(1, 5)}),
        ("`prompt_embeds` is", {"prompt": None, "prompt_embeds": embeds(width=31), "guidance_scale": 1.0}),
        ("`prompt_embeds` is", {"prompt": None, "prompt_embeds": embeds()[0], "guidance_scale": 1.0}),
        ("`negative_prompt_embeds` is", {"negative_prompt_embeds": embeds(width=31)}),
        ("`negative_prompt_embeds` has 2", {"negative_prompt_embeds": embeds(rows=2)}),
        ("without `negative_prompt_embeds`", {"prompt": None, "prompt_embeds": embeds()}),
        ("`guidance_scale`", {"guidance_scale": 0.5}),
        ("`guidance_scale`", {"guidance_scale": float("nan")}),
        ("`guidance_scale`", {"guidance_scale": float("inf")}),
        ("`guidance_scale`", {"guidance_scale": None}),
        ("`guidance_scale`", {"guidance_scale": -1.0}),
        ("`guidance_scale`", {"guidance_scale": True}),
        ("`guidance_scale`", {"guidance_scale": 10**400}),
        ("`output_type`", {"output_type": np.array(["pil", "np"])}),
        ("`return_dict`", {"return_dict": "no"}),
        ("`guidance_scale`", {"guidance_scale": "4"}),
        ("`guidance_scale`", {"guidance_scale": np.float32("nan")}),
        ("`height`", {"height": np.float64(32)}),
        ("`height`", {"height": np.True_}),
        ("`num_inference_steps`", {"num_inference_steps": "4"}),
        ("`num_images_per_prompt`", {"num_images_per_prompt": 1.0}),
        ("`tokenizer_max_length`", {"tokenizer_max_length": 8.0}),
        ("`use_resolution_binning`", {"use_resolution_binning": "no"}),
        ("`skip_text_cleaning`", {"skip_text_cleaning": "yes"}),
        ("`generator`", {"generator": []}),
        ("`generator`", {"generator": [None]}),
        ("`generator` is on", {"generator": Elsewhere()}),
        ("`generator` is on", {"generator": [torch.Generator(), Elsewhere()], "num_images_per_prompt": 2}),
        ("`latents` is of torch.int64", {"latents": torch.zeros(1, 4, 16, 16, dtype=torch.int64)}),
        ("`latents` is a ndarray", {"latents": np.zeros((1, 4, 16, 16))}),
        ("`prompt_embeds` is a list", {"prompt": None, "prompt_embeds": [[0.0]], "guidance_scale": 1.0}),
        ("`prompt_embeds` is of", {"prompt": None, "prompt_embeds": embeds().long(), "guidance_scale": 1.0}),
        ("`prompt_embeds` has entries", {"prompt": None, "prompt_embeds": embeds() + math.nan, "guidance_scale": 1.0}),
        ("`negative_prompt_embeds` has entries", {"negative_prompt_embeds": embeds() + math.inf}),
        ("`negative_prompt_attention_mask` has entries", {"negative_prompt_embeds": embeds(),
                                                          "negative_prompt_attention_mask": torch.full((1, 5), -1e4)}),
        ("`prompt_attention_mask` is a list", {"prompt": None, "prompt_embeds": embeds(), "guidance_scale": 1.0,
                                               "prompt_attention_mask": [[1] * 5]}),
        ("`callback_on_step_end` is a int", {"callback_on_step_end": 3}),
        ("`latents` of torch.int64", {"callback_on_step_end": lambda *_: {"latents": torch.zeros(1).long()}}),
        ("`callback_on_step_end_tensor_inputs`", {"callback_on_step_end_tensor_inputs": [["latents"]]}),
        ("`latents` has entries", {"latents": torch.full((1, 4, 16, 16), float("nan"))}),
        ("`latents` has the shape", {"latents": torch.zeros(1, 4, 16, 8)}),
        ("`latents` has the shape", {"latents": torch.zeros(2, 4, 16, 16)}),
        ("`callback_on_step_end_tensor_inputs`", {"callback_on_step_end_tensor_inputs": ["noise"]}),
        ("`callback_on_step_end_tensor_inputs`", {"callback_on_step_end_tensor_inputs": "latents"}),
        ("'noise'", {"callback_on_step_end": lambda *_: {"noise": torch.zeros(1)}}),
        ("`latents` of shape", {"callback_on_step_end": lambda *_: {"latents": torch.zeros(1)}}),
        ("'latents'", {"callback_on_step_end": lambda *_: {"latents": [0.0]}}),
        ("returned a Tensor", {"callback_on_step_end": lambda *_: torch.zeros(1)}),
        ("`output_type`", {"output_type": "jpeg"}),
        ("`tokenizer_max_length`", {"tokenizer_max_length": 0}),
        ("`timesteps` and `sigmas`", {"timesteps": [1000, 500], "sigmas": [1.0, 0.5]}),
        ("`sigmas`", {"sigmas": [0.5, 1.0]}),
        ("`timesteps`", {"timesteps": [500, 1000]}),
    ],
)  # fmt: skip
def test_arguments_of_the_call(pipe, match, kwargs):
    with pytest.raises(ValueError, match=match):
        pipe(**{"prompt": "a cat", "num_inference_steps": 1, "output_type": "latent"} | kwargs)


@pytest.mark.parametrize("levels", ["sigmas", "timesteps"])
@pytest.mark.parametrize("scheduler", ["ours", "euler", "unipc", "dpm"])
def test_noise_levels_that_are_none(pipe, scheduler, levels):
    """Refused by every scheduler; diffusers' own take them as they are, and draw something."""
    swapped = PRXPipeline(**pipe.components, default_sample_size=32)
    others = {"euler": FlowMatchEulerDiscreteScheduler(), "unipc": UniPCMultistepScheduler(**FLOW)}
    others["dpm"] = DPMSolverMultistepScheduler(**FLOW)
    swapped.scheduler = others.get(scheduler, swapped.scheduler)
    unit = 1 if levels == "sigmas" else 1000
    wrong = [[], "abc", 0.5, {1.0}, [True], [None], [[1.0]], ["1"], torch.ones(1, 1)]
    for values in ([1.2, 0.5], [0.2, 0.9], [0.5, 0.5], [1.0, 0.0], [-0.5], [math.nan], [1.0, math.nan], [math.inf]):
        wrong += [[unit * value for value in values], unit * np.array(values), unit * torch.tensor(values)]
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
def test_schedulers_whose_own_options_bend_the_levels(pipe, scheduler, steps):
    swapped = PRXPipeline(**pipe.components, default_sample_size=32)
    swapped.scheduler = scheduler
    with pytest.raises(ValueError, match=f"`scheduler` is a {type(scheduler).__name__}"):
        swapped("a cat", num_inference_steps=steps, output_type="latent")


def test_numbers_of_numpy_are_numbers(pipe, tmp_path):
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
    """0 is how the rest of diffusers, and its callbacks, say off."""
    draw = lambda scale: pipe("a cat", generator=tiny.generators(0)[0], guidance_scale=scale, output_type="pt").images  # noqa: E731
    off = draw(1.0)
    for scale in (0.0, 0, 1, np.float64(0)):
        assert torch.equal(draw(scale), off)
    assert (draw(4.0) - off).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["text_encoder", "tokenizer", "transformer", "scheduler"])
def test_pipelines_that_lack_a_component(pipe, name):
    lacking = PRXPipeline(**pipe.components | {name: None}, default_sample_size=32, prediction_type="velocity")
    with pytest.raises(ValueError, match=f"no `{name}`"):
        lacking("a cat", num_inference_steps=1)


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
        ("`negative_prompt` has 1", {"prompt": ["a", "b"], "negative_prompt": ["x"]}),
        ("`num_images_per_prompt`", {"prompt": "a", "num_images_per_prompt": 0}),
        ("`prompt_embeds` is", {"prompt_embeds": embeds(width=31), "do_classifier_free_guidance": False}),
        ("`prompt_embeds` has entries", {"prompt_embeds": embeds() + math.nan, "do_classifier_free_guidance": False}),
        ("neither of `prompt`", {}),
    ],
)
def test_arguments_of_encode_prompt(pipe, match, kwargs):
    """It is called alone as well."""
    with pytest.raises(ValueError, match=match):
        pipe.encode_prompt(**kwargs)


def test_from_a_pipeline_of_the_other_kind(pipe):
    pixel = tiny.pixel_pipeline()
    with pytest.raises(ValueError, match="`pipeline` is a PRXPipeline"):
        PRXPixelPipeline.from_pipe(pipe)
    with pytest.raises(ValueError, match="`pipeline` is a PRXPixelPipeline"):
        PRXPipeline.from_pipe(pixel)
    with pytest.raises(ValueError, match=r"`transformer`.*4 channels"):
        PRXPixelPipeline(**pixel.components | {"transformer": pipe.transformer}, prediction_type="x_prediction")


# Values that are not finite: each would be a black picture.


def breaking(name):
    """A pipeline with a component that overflows or holds NaN, and what the error has to say."""
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
        return pipe, given, r"text embeddings.*float16.*`prompt_embeds`"
    if name == "guidance":
        return pipe, {"guidance_scale": 1e30}, r"`transformer`.*step 2 of 3.*`guidance_scale` 1e\+30"
    if name == "more guidance":
        return pipe, {"guidance_scale": 1e300}, r"latents.*step 1 of 3.*`guidance_scale` 1e\+300"
    if name == "vae":
        pipe.vae.half()
        for weight in pipe.vae.decoder.parameters():
            weight.data.mul_(1e4)
        return pipe, {"output_type": "pil"}, r"`vae`.*float16"
    if name == "callback":

        def callback(pipeline, step, timestep, tensors):
            if step == 2:  # the last: nothing is computed from it any more
                tensors["latents"].fill_(math.nan)

        return pipe, {"callback_on_step_end": callback}, r"`callback_on_step_end`.*`latents`.*step 3 of 3"
    assert name == "text of a callback"
    swap = lambda pipeline, step, t, tensors: {"prompt_embeds": tensors["prompt_embeds"] * math.inf}  # noqa: E731
    given = {"callback_on_step_end": swap, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    return pipe, given, r"text embeddings.*`callback_on_step_end`"


@pytest.mark.parametrize(
    "name",
    [
        "text encoder in float16", "weight of the text encoder", "weight of the transformer", "guidance",
        "more guidance", "text in the transformer's dtype", "vae", "callback", "text of a callback",
    ],
)  # fmt: skip
def test_what_is_not_finite_names_its_component(name):
    pipe, given, message = breaking(name)
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a red cat", "num_inference_steps": 3, "output_type": "latent"} | given)


def test_steps_do_not_wait_for_the_device(pipe, monkeypatch):
    """Reading what is watched at every step would stop a GPU each time."""
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


def test_misspelt_arguments(pipe):
    with pytest.raises(TypeError, match="guidance"):
        pipe("a cat", guidance=3.0)


@pytest.mark.parametrize(
    ("scheduler", "match"),
    [
        (PRXXPredictionScheduler(), "use PRXFlowMatchScheduler"),
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
def test_schedulers_that_do_not_fit(pipe, scheduler, match):
    """At construction, and at the call for one that was swapped in later."""
    with pytest.raises(ValueError, match=match):
        tiny.latent_pipeline(scheduler=scheduler, prediction_type="velocity")
    swapped = PRXPipeline(**pipe.components, default_sample_size=32)
    swapped.scheduler = scheduler
    with pytest.raises(ValueError, match=match):
        swapped("a cat")


def test_noise_levels_that_a_scheduler_does_not_take(pipe):
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
        ("4 channels", {"transformer": tiny.transformer(in_channels=16)}),
        ("PRXXPredictionScheduler", {"prediction_type": "x_prediction", "scheduler": PRXFlowMatchScheduler()}),
    ],
)
def test_arguments_of_the_constructor(match, kwargs):
    with pytest.raises(ValueError, match=match):
        tiny.latent_pipeline(**kwargs)


def test_text_encoder_of_another_width():
    pipe = tiny.latent_pipeline(transformer=tiny.transformer(context_in_dim=48))
    with pytest.raises(ValueError, match="width 32"):
        pipe("a cat")


def test_prompt_max_tokens():
    with pytest.raises(ValueError, match="prompt_max_tokens"):
        tiny.pixel_pipeline(prompt_max_tokens=0)
