"""Wrong use is a ValueError that names the argument."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

import tiny
from diffusers_prx.pipelines import PRXPipeline
from diffusers_prx.schedulers import PRXFlowMatchScheduler, PRXXPredictionScheduler

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


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
        ("`max_length`", {"tokenizer_max_length": 0}),
        ("`timesteps` and `sigmas`", {"timesteps": [1000, 500], "sigmas": [1.0, 0.5]}),
        ("`sigmas`", {"sigmas": [0.5, 1.0]}),
        ("`sigmas`", {"timesteps": [500, 1000]}),
    ],
)  # fmt: skip
def test_arguments_of_the_call(pipe, match, kwargs):
    with pytest.raises(ValueError, match=match):
        pipe(**{"prompt": "a cat", "num_inference_steps": 1, "output_type": "latent"} | kwargs)


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
