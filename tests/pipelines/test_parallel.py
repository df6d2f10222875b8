"""Sampling on several processes is sampling on one: context parallelism, and a process for each branch of guidance."""

import pytest
import torch
import torch.distributed as dist
from accelerate import debug_launcher
from diffusers import (
    ContextParallelConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    ParallelConfig,
    TaylorSeerCacheConfig,
    TensorParallelConfig,
)
from diffusers.guiders import ClassifierFreeGuidance
from torch.distributed.device_mesh import init_device_mesh

import tiny
from diffusers_prx.models.transformer_prx import PRXAttnProcessor, PRXTransformer2DModel

PROMPTS = ["a red cat on the beach", "two blue dog", "sunset"]
TOLERANCE = 5e-6  # relative; seen: 2e-7 for a single token, else none at all

# 64 tokens, 48 on a wide grid, 15, and 1 (so that the second process has nothing but padding)
SIZES = [(16, 16), (8, 24), (6, 10), (2, 2)]
MODELS = {
    "plain": {},
    "pixels": tiny.PIXEL_SETTINGS,
    "tokens and fusion": {"resolution_tokens": True, "depth": 4, "fusion_range": [1, 3]},
}


class RecordingProcessor(PRXAttnProcessor):
    """Records the rows, tokens and heads of every attention."""

    def __init__(self):
        self.seen = set()

    def attend(self, query, *args):
        self.seen.add(tuple(query.shape[:3]))
        return super().attend(query, *args)


def record_attention(transformer):
    """Set a recording processor; call it before `enable_parallelism`, which configures the processors."""
    processor = RecordingProcessor()
    transformer.set_attn_processor(processor)
    return processor


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@torch.no_grad()
def forwards(model):
    """Run every size with a padding mask, without a mask, and with two contexts of different lengths."""
    random = torch.Generator().manual_seed(1)
    text, timestep = torch.randn(4, 7, tiny.TEXT_WIDTH, generator=random), torch.tensor([0.1, 0.4, 0.6, 0.9])
    mask = torch.arange(7) < torch.tensor([[7], [3], [5], [1]])
    outputs = []
    for height, width in [(2 * h, 2 * w) for h, w in SIZES] if model.config.patch_size == 4 else SIZES:
        images = torch.randn(4, model.config.in_channels, height, width, generator=random)
        for given in (mask, None):
            outputs.append(model(images, timestep, text, given, return_dict=False)[0])
        negative = model.encode_text_context(text[:1, :1], height=height, width=width)
        positive = model.encode_text_context(text[:2], mask[:2], height, width)
        time = model.encode_timesteps(timestep, height, width).at(2)
        outputs.append(model(images, text_context=(negative, positive), time_context=time, return_dict=False)[0])
    return outputs


def draw(pipe, seed=0, prompt=PROMPTS, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    settings = {"num_inference_steps": 4, "output_type": "pt", "height": 20, "width": 36}
    return pipe(prompt, generator=generator, **settings | kwargs).images


def end_guidance(pipe, step):
    if step == 1:
        pipe._guidance_scale = 0.0


def mag_cache(pipe):
    ratios = [1.0, 1.1, 0.99, 0.98]
    pipe.transformer.enable_cache(
        MagCacheConfig(threshold=0.5, max_skip_steps=1, retention_ratio=0.25, num_inference_steps=4, mag_ratios=ratios)
    )
    return pipe


def taylor_seer(pipe):
    pipe.transformer.enable_cache(TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2))
    return pipe


def offloaded(pipe):
    """Offload the transformer, so that it computes no contexts."""
    pipe.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    return pipe


# name -> pipeline and call; 45 tokens for the latents of 20 x 36 pixels and for pixels in patches of 4
PICTURES = {
    "prompts": (tiny.latent_pipeline, {}),
    "own negative prompts": (tiny.latent_pipeline, {"negative_prompt": ["circle", "", "one big green square"]}),
    "pixels": (tiny.pixel_pipeline, {"num_images_per_prompt": 2}),
    "one prompt": (tiny.latent_pipeline, {"prompt": PROMPTS[0], "height": 32, "width": 32}),
    "a callback": (tiny.latent_pipeline, {"callback_on_step_end": lambda pipe, step, *_: end_guidance(pipe, step)}),
    "a guider": (tiny.pixel_pipeline, {"guider": ClassifierFreeGuidance(3.0, stop=0.6)}),
    "MagCache": (lambda: mag_cache(tiny.latent_pipeline()), {}),
    "TaylorSeer": (lambda: taylor_seer(tiny.latent_pipeline()), {}),
    "group offloading": (lambda: offloaded(tiny.latent_pipeline()), {}),
}


def error_message(call):
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing was raised"


def on_one_of_two(folder) -> None:
    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.group.WORLD
    found = {}
    for name, settings in MODELS.items():
        model = tiny.transformer(**settings)
        found[f"attended by {name}"] = record_attention(model)
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        found[name] = forwards(model)
    found["twice"] = error_message(lambda: model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2)))
    found["cache"] = error_message(lambda: model.enable_cache(FirstBlockCacheConfig()))
    images, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, tiny.TEXT_WIDTH)
    found["feature"] = error_message(lambda: model(images, torch.ones(1), text, feature_block=1))

    for name, (make, call) in PICTURES.items():
        pipe = make()
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        found[f"context, {name}"] = draw(pipe, rank, **call)  # the second process would draw other noise
        pipe = make()
        processor = record_attention(pipe.transformer)
        found[f"guidance, {name}"] = draw(pipe, rank, guidance_group=world, **call)
        found[f"attended by guidance, {name}"] = processor

    alone = [dist.new_group([other]) for other in range(2)][rank]
    found["alone"] = error_message(lambda: draw(tiny.latent_pipeline(), guidance_group=alone))
    found["unguided"] = error_message(lambda: draw(tiny.latent_pipeline(), guidance_group=world, guidance_scale=1.0))
    pipe = tiny.latent_pipeline(token_route=(0, 1, 0.5))
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    found["cached"] = error_message(lambda: draw(pipe, guidance_group=world))
    pipe.transformer.disable_cache()
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    routed = {"guidance_scale": 1.0, "self_guidance_scale": 2.0}
    found["self-guidance"] = error_message(lambda: draw(pipe, **routed))
    found = {name: value.seen if isinstance(value, RecordingProcessor) else value for name, value in found.items()}
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict]:
    """Results of each of two processes."""
    folder = tmp_path_factory.mktemp("two")
    debug_launcher(on_one_of_two, (folder,), num_processes=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", MODELS)
def test_forward_on_two_processes_equals_one(both, name):
    expected = forwards(tiny.transformer(**MODELS[name]))
    for found in both:
        assert len(found[name]) == len(expected) == 3 * len(SIZES)
        for actual, output in zip(found[name], expected):
            assert relative_error(actual, output) < TOLERANCE
        assert {heads for _, _, heads in found[f"attended by {name}"]} == {1}  # of two
        assert {tokens for _, tokens, _ in found[f"attended by {name}"]} == {64, 48, 15, 1}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("kind", ["context", "guidance"])
def test_pictures_of_two_processes_equal_one(both, kind, name):
    make, call = PICTURES[name]
    expected = draw(make(), **call)
    first, second = (found[f"{kind}, {name}"] for found in both)
    assert torch.equal(first, second)
    assert relative_error(first, expected) < TOLERANCE
    assert relative_error(draw(make(), 1, **call), expected) > 1e-2


def test_each_process_runs_one_branch(both):
    for found in both:
        assert {rows for rows, _, _ in found["attended by guidance, prompts"]} == {3}  # of six
        assert {rows for rows, _, _ in found["attended by guidance, pixels"]} == {6}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("twice", "Parallelism is already on"),
        ("cache", "FirstBlockCacheConfig"),
        ("feature", "`feature_block`"),
        ("alone", "`guidance_group` is a group of 1"),
        ("unguided", "`guidance_group`"),
        ("cached", "FirstBlockCache"),
        ("self-guidance", "`self_guidance_scale`"),
    ],
)
def test_refusals_on_two_processes(both, name, message):
    for found in both:
        assert message in found[name]


def test_refusals_on_one_process():
    model = tiny.transformer()
    for config, message in [
        (ContextParallelConfig(ring_degree=2), "`ring_degree`"),
        (ContextParallelConfig(ulysses_degree=3), "`ulysses_degree`"),
        (ContextParallelConfig(ulysses_degree=2, ulysses_anything=True), "`ulysses_anything`"),
        (ParallelConfig(tensor_parallel_config=TensorParallelConfig(2)), "`config`.*ContextParallelConfig"),
        (TensorParallelConfig(2), "`config`.*ContextParallelConfig"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.enable_parallelism(config=config)
    good = ContextParallelConfig(ulysses_degree=2)
    with pytest.raises(ValueError, match="`cp_plan`"):
        model.enable_parallelism(config=good, cp_plan=PRXTransformer2DModel._cp_plan)
    with pytest.raises(RuntimeError, match="init_process_group"):
        model.enable_parallelism(config=good)
    model.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="FirstBlockCacheConfig"):
        model.enable_parallelism(config=good)
    with pytest.raises(ValueError, match="`guidance_group`"):
        draw(tiny.latent_pipeline(), guidance_group="both")


def on_one_of_four(folder) -> None:
    """Draw with one branch of guidance per pair of processes, and each forward split over a pair."""
    torch.set_num_threads(1)
    names = ("guidance", "ring", "ulysses")
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=names)
    pipe = tiny.latent_pipeline()
    processor = record_attention(pipe.transformer)
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, mesh=mesh))
    images = draw(pipe, dist.get_rank(), guidance_group=mesh["guidance"].get_group())
    torch.save((images, processor.seen), folder / f"{dist.get_rank()}.pt")


def test_guidance_group_and_parallel_forward_on_four_processes(tmp_path):
    debug_launcher(on_one_of_four, (tmp_path,), num_processes=4)
    expected = draw(tiny.latent_pipeline())
    for rank in range(4):
        images, seen = torch.load(tmp_path / f"{rank}.pt")
        assert relative_error(images, expected) < TOLERANCE
        assert seen == {(3, 45, 1)}
