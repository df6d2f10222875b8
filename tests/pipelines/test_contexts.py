"""Text and time contexts, computed once per call: the pictures stay the same, and nothing is computed twice."""

import diffusers
import pytest
import torch
import torch._dynamo.testing
from diffusers.guiders import ClassifierFreeGuidance

import tiny
from diffusers_prx.models.transformer_prx import PRXTransformer2DModel

PROMPTS = ["a red cat on the beach", "two blue dog", "sunset"]
CALLS = [
    {"guidance_scale": 1.0},
    {"guidance_scale": 4.0},
    {"negative_prompt": ["circle", "", "one big green square"]},
    {"guidance_scale": 1.0, "self_guidance_scale": 2.0},
    {"num_images_per_prompt": 2, "seeds": range(6)},
    {"num_images_per_prompt": 2, "seeds": range(6), "negative_prompt": ["", "", "one big green square"]},
    {"guider": ClassifierFreeGuidance(4.0, start=0.5)},  # the first step without guidance
]


def draw(pipe, prompt=PROMPTS, seeds=(0, 1, 2), steps=4, **kwargs):
    generator = tiny.generators(*seeds)
    return pipe(prompt, generator=generator, num_inference_steps=steps, output_type="pt", **kwargs).images


def pipeline(kind, cls, **changes):
    make, settings = {
        "latent": (tiny.latent_pipeline, {}),
        "pixel": (tiny.pixel_pipeline, tiny.PIXEL_SETTINGS),
        "tokens": (tiny.latent_pipeline, {"resolution_tokens": True}),
    }[kind]
    return make(transformer=tiny.transformer(cls=cls, depth=4, **settings), **changes)


@pytest.mark.parametrize("kind", ["latent", "pixel", "tokens"])
@pytest.mark.parametrize("call", CALLS)
def test_same_pictures_as_without_contexts(kind, call):
    """Prompts of three lengths, a generator for each."""
    pipes = [
        pipeline(kind, cls, token_route=(1, 3, 0.5)) for cls in (PRXTransformer2DModel, tiny.EmbeddingsTransformer)
    ]
    images, expected = (draw(pipe, **call) for pipe in pipes)
    assert (images - expected).abs().max() < 1e-5  # seen: 2e-6
    assert (images - draw(pipes[0], PROMPTS[::-1], **call)).abs().max() > 1e-3


def test_contexts_are_computed_once_per_call():
    pipe = pipeline("latent", tiny.RecordingTransformer)
    draw(pipe, PROMPTS[0], (0,))
    # 1 token of the empty prompt and 7 of the other, neither padded to the other
    assert pipe.transformer.texts == [(1, 1, False), (1, 7, False)]
    assert pipe.transformer.steps == [4]
    assert pipe.transformer.rows == [2] * 4

    pipe = pipeline("latent", tiny.RecordingTransformer)
    draw(pipe, negative_prompt="circle")
    assert pipe.transformer.texts == [(1, 2, False), (3, 7, True)]  # one negative prompt for all
    assert pipe.transformer.rows == [6] * 4

    pipe = pipeline("latent", tiny.RecordingTransformer)
    draw(pipe, negative_prompt=["circle", "", ""], num_images_per_prompt=2, seeds=range(6))
    assert pipe.transformer.texts == [(6, 2, True), (6, 7, True)]
    assert pipe.transformer.rows == [12] * 4

    pipe = pipeline("latent", tiny.RecordingTransformer)
    draw(pipe, guidance_scale=1.0)
    assert pipe.transformer.texts == [(3, 7, True)]
    assert pipe.transformer.rows == [3] * 4  # no second branch


def test_number_of_prompts_does_not_recompile(fresh_dynamo):
    pipe, plain = (pipeline("latent", cls) for cls in (PRXTransformer2DModel, tiny.EmbeddingsTransformer))
    counter = torch._dynamo.testing.CompileCounter()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=counter)
    compiled = []
    for count in (3, 5, 7, 9, 10, 2):
        prompts = [PROMPTS[n % 3] + n * " cat" for n in range(count)]
        before = counter.frame_count
        images = draw(pipe, prompts, range(count), guidance_scale=1.0)
        compiled.append(counter.frame_count - before)
        assert (images - draw(plain, prompts, range(count), guidance_scale=1.0)).abs().max() < 1e-5
    assert compiled[1:] == [0, 0, 0, 0, 0]


def test_text_that_a_callback_changes_is_projected_again():
    pipe, plain = pipeline("latent", tiny.RecordingTransformer), pipeline("latent", tiny.EmbeddingsTransformer)
    names = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}

    def swap(pipeline, step, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"].flip(0)} if step == 1 else {"latents": tensors["latents"]}

    images = draw(pipe, callback_on_step_end=swap, **names)
    assert (images - draw(plain, callback_on_step_end=swap, **names)).abs().max() < 1e-5
    assert (images - draw(plain)).abs().max() > 1e-3
    assert len(pipe.transformer.texts) == 4


def test_equal_texts_are_encoded_once(monkeypatch):
    pipe = pipeline("latent", PRXTransformer2DModel)
    rows = []
    forward = pipe.text_encoder.forward

    def counting(*args, **kwargs):
        rows.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipe.text_encoder, "forward", counting)
    draw(pipe)
    draw(pipe, [PROMPTS[0]] * 3)
    draw(pipe, guidance_scale=1.0)
    assert rows == [4, 2, 3]


def test_group_offloading_to_disk(tmp_path):
    """No context can be computed before the blocks run, because their weights are on disk."""
    pipe = pipeline("latent", PRXTransformer2DModel)
    expected = draw(pipe)
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        offload_to_disk_path=str(tmp_path),
    )
    assert (draw(pipe) - expected).abs().max() < 1e-5


def test_stock_transformer_in_our_pipeline():
    """It draws the same, also batches with guidance, which stock's pipeline cannot."""
    pipe = tiny.latent_pipeline(transformer=tiny.transformer(cls=diffusers.PRXTransformer2DModel))
    assert (draw(pipe) - draw(tiny.latent_pipeline())).abs().max() < 1e-4
