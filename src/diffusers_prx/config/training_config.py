"""The configuration of a training run: one typed, frozen dataclass. `recipes` reads it from YAML and flags."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..files import expand_path
from ..prompt_cleaning import CaptionCleaning
from .fields import (
    AT_LEAST_ONE,
    BELOW_ONE,
    CACHED,
    FIXED,
    FROM_ONE,
    NOT_NEGATIVE,
    PART,
    PATH,
    POSITIVE,
    RUNTIME,
    SHARE,
    STAGE,
    Range,
    marked,
    settings_of,
)

# Sources of data that are drawn on the fly; see `data.sources`.
DRAWN_SOURCES = ("scenes", "emoji_scenes")
# The share of unreadable samples is judged over at least this many, so that a single one does not stop a run.
SAMPLES_BEFORE_JUDGING = 1000
# The study's warm-up, of a run of 100,000 steps; a run of fewer than ten times as many steps has a shorter one.
WARMUP_STEPS = 1000
DEFAULT_UNIFORM_FRACTION = 0.1
# What an adapter changes unless told otherwise: every matrix of the blocks but that of the modulation.
LORA_LAYERS = (
    "attention.img_qkv_proj", "attention.txt_kv_proj", "attention.to_out.0", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip


def check_name(repo_id: str) -> None:
    """Look at a repository's name without asking anybody; raises `ValueError` for one that the Hub would not take."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"The repository {repo_id!r} cannot be called so: {error}") from error


@dataclass(frozen=True)
class DataSource:
    """One source of a stage's data.

    Args:
        name: as `data.sources.load_source` takes it.
        weight: its share of the samples, in proportion to those of the others; None: every sample once per epoch.
        config_name, split, image_column, caption_column, instance_prompt: see `load_source`.
    """

    name: str
    weight: float | None
    config_name: str | None
    split: str
    image_column: str
    caption_column: str
    instance_prompt: str | None = None

    @property
    def is_drawn(self) -> bool:
        """True if the samples are drawn on the fly."""
        return self.name in DRAWN_SOURCES


@dataclass(frozen=True)
class TrainingConfig:
    """Every setting of `training/train_prx.py`.

    The defaults are those of the PRX study's baseline at 256 px, but for `ema_warmup`: without it the average of a run
    of some thousand steps is mostly the weights that the run began with.

    Raises:
        ValueError: for a value outside its range or settings that exclude each other, with what would be accepted.
    """

    # the model
    pretrained_model_name_or_path: Annotated[
        str | None,
        "A saved PRX pipeline (folder or Hub id) whose components the run starts from.",
        PATH,
    ] = None
    revision: Annotated[str | None, "Revision of the pretrained pipeline on the Hub."] = None
    transformer_config: Annotated[
        dict, "Configuration of a new transformer, trained from scratch: keys of PRXTransformer2DModel."
    ] = field(default_factory=dict)
    vae_name_or_path: Annotated[
        str | None,
        "Autoencoder (folder or Hub id, `vae` subfolder allowed) whose latents are modeled; none: pixels.",
        PATH,
    ] = None
    text_encoder_name_or_path: Annotated[
        str | None,
        "Text encoder and tokenizer (folder or Hub id), where they do not come with the pretrained pipeline.",
        PATH,
    ] = None
    text_encoder_config: Annotated[
        dict, "A new T5Gemma text encoder, trained along: keys of T5GemmaModuleConfig; its tokenizer is trained first."
    ] = field(default_factory=dict)
    tokenizer_vocab_size: Annotated[
        int,
        "Vocabulary of the tokenizer that a new text encoder gets.",
        AT_LEAST_ONE,
    ] = 1024
    train_text_encoder: Annotated[bool, "Train the text encoder along with the transformer.", FIXED] = False
    prediction_type: Annotated[
        Literal["velocity", "x_prediction"],
        "What the transformer predicts.",
        FIXED,
    ] = "velocity"
    noise_scale: Annotated[float, "Standard deviation of the noise at t = 1.", POSITIVE, FIXED] = 1.0
    max_sequence_length: Annotated[
        int, "Captions are cut to this many tokens; how many were cut is printed.", AT_LEAST_ONE, FIXED
    ] = 256
    caption_cleaning: Annotated[
        CaptionCleaning,
        "How captions are cleaned, and prompts by the saved pipeline. `full` (the study's, for T5Gemma): lower case, "
        "without links, file names, article numbers, CJK and odd signs; `full_v1`: the same as diffusers' PRXPipeline "
        "does it; `light` (the study's, for Qwen3-VL): only Unicode and HTML are repaired.",
        FIXED,
    ] = "full"

    # an adapter of the transformer, in place of its weights
    lora_rank: Annotated[
        int | None,
        "Train a LoRA adapter (arXiv 2106.09685) of this rank for the pretrained pipeline's transformer, which stays "
        "as it is; none: train the transformer itself.",
        AT_LEAST_ONE,
    ] = None
    lora_alpha: Annotated[
        int | None, "The adapter's product is multiplied by `lora_alpha` / `lora_rank`; none: by 1.", AT_LEAST_ONE
    ] = None
    lora_dropout: Annotated[float, "Share of the adapter's inputs that are dropped in training.", BELOW_ONE] = 0.0
    lora_layers: Annotated[
        list,
        "Linear layers that get an adapter, by the ends of their names: [attention.img_qkv_proj, modulation.lin].",
    ] = field(default_factory=lambda: list(LORA_LAYERS))
    use_dora: Annotated[bool, "Train the lengths of the weights' rows as well (DoRA, arXiv 2402.09353)."] = False

    # the data
    dataset_name: Annotated[
        str | None,
        "`scenes` (built in, drawn on the fly), `emoji_scenes` (drawings of `emoji_dir` on colored grounds, on the "
        "fly), or a data set on the Hub or on disk that `datasets` can load.",
        STAGE,
        CACHED,
        PATH,
    ] = None
    dataset_config_name: Annotated[
        str | None, "Configuration of the data set, where it has several.", STAGE, CACHED
    ] = None
    dataset_split: Annotated[str, "Split of the data set to train on.", STAGE, CACHED] = "train"
    train_data_dir: Annotated[
        str | None,
        "A folder of images with a metadata.jsonl or captions beside them, instead of --dataset_name.",
        STAGE,
        CACHED,
        PATH,
    ] = None
    data_sources: Annotated[
        list,
        "Several sources instead of --dataset_name: mappings with `name` and, where they differ, `weight`, "
        "`config_name`, `split`, `image_column`, `caption_column`, `instance_prompt`.",
        STAGE,
        CACHED,
    ] = field(default_factory=list)
    image_column: Annotated[str, "Column that holds the images.", STAGE, CACHED] = "image"
    caption_column: Annotated[str, "Column that holds the captions.", STAGE, CACHED] = "text"
    instance_prompt: Annotated[
        str | None,
        "Caption of every image of stored data, in place of captions of its own, as DreamBooth has it (arXiv "
        "2208.12242); scenes keep theirs.",
        STAGE,
        CACHED,
    ] = None
    caption_weights: Annotated[
        dict,
        "Caption columns with weights, one drawn per sample: {long: 0.7, short: 0.2, tags: 0.1}; over "
        "--caption_column, and with the columns long and short over --scenes_caption.",
        STAGE,
        CACHED,
    ] = field(default_factory=dict)
    streaming: Annotated[
        bool,
        "Read the data from beginning to end, shard by shard, instead of by index: for what is not on this disk.",
        STAGE,
    ] = False
    data_cache_dir: Annotated[
        str | None,
        "Folder that keeps what tars have where; none: they are searched at every start.",
        STAGE,
        RUNTIME,
        PATH,
    ] = None
    caption_statistics_samples: Annotated[
        int, "Captions of each stage that are looked at before the run, in tokens; 0: none.", NOT_NEGATIVE
    ] = 2000
    scenes_level: Annotated[Literal["easy", "medium", "hard"], "Difficulty of the built-in scenes.", STAGE, CACHED] = (
        "easy"
    )
    scenes_caption: Annotated[
        Literal["long", "short"], "Captions of `dataset_name` scenes and emoji_scenes.", STAGE, CACHED
    ] = "long"
    scenes_size: Annotated[
        int | None,
        "Number of different training scenes of `dataset_name` scenes and emoji_scenes, which gives them epochs and a "
        "`precomputed_dir`; none: no end.",
        AT_LEAST_ONE,
        STAGE,
        CACHED,
    ] = None
    emoji_dir: Annotated[
        str | None,
        "Folder that `training/tools/fetch_emoji.py` wrote, for `dataset_name` emoji_scenes.",
        STAGE,
        CACHED,
        PATH,
    ] = None
    resolution: Annotated[
        int, "Height and width in pixels: images are resized to cover it and cropped.", AT_LEAST_ONE, STAGE, CACHED
    ] = 256
    aspect_ratio_buckets: Annotated[
        Literal["none", "study", "computed"],
        "Sizes by aspect ratio: those of the study (256, 512, 1024), or computed for any resolution; none: squares.",
        STAGE,
        CACHED,
    ] = "none"
    max_aspect_ratio: Annotated[
        float, "Longer over shorter side of the most extreme computed bucket.", FROM_ONE, STAGE, CACHED
    ] = 2.0
    max_upscale: Annotated[
        float | None,
        "Images that would be enlarged by more than this factor are left out and counted; none: no limit.",
        FROM_ONE,
        STAGE,
        CACHED,
    ] = 1.0
    max_crop: Annotated[
        float, "Images of which more than this share would be cropped are left out and counted.", SHARE, STAGE, CACHED
    ] = 0.5
    center_crop: Annotated[bool, "Crop the center, not a random place.", STAGE] = False
    random_flip: Annotated[bool, "Flip half of the images from left to right.", STAGE] = False
    precomputed_dir: Annotated[
        str | None,
        "Folder of what `training/precompute_prx.py` has computed of the data; the run then reads no images. Needs "
        "`center_crop`.",
        STAGE,
        PATH,
    ] = None
    max_corrupt_share: Annotated[
        float,
        "Stop when more than this share of the images read cannot be read.",
        SHARE,
    ] = 0.01
    dataloader_num_workers: Annotated[
        int, "Processes that read and prepare images; 0: the main process.", NOT_NEGATIVE
    ] = 0

    # optimization
    seed: Annotated[
        int,
        "All random numbers of the run are functions of it.",
        Range("in [0, 2**32)", 0, 2**32, open_high=True),
        FIXED,
    ] = 42
    train_batch_size: Annotated[int, "Images per process and forward.", AT_LEAST_ONE, STAGE] = 32
    gradient_accumulation_steps: Annotated[int, "Forwards and backwards per optimizer step.", AT_LEAST_ONE, STAGE] = 1
    max_train_steps: Annotated[int, "Optimizer steps.", AT_LEAST_ONE, STAGE] = 100_000
    optimizer: Annotated[
        Literal["adamw", "muon"], "`muon`: Muon for the matrices of the repeated layers, AdamW for the rest.", FIXED
    ] = "adamw"
    learning_rate: Annotated[float, "Peak learning rate.", POSITIVE, STAGE] = 1e-4
    adam_beta1: Annotated[float, "AdamW's first beta.", BELOW_ONE, FIXED] = 0.9
    adam_beta2: Annotated[float, "AdamW's second beta.", BELOW_ONE, FIXED] = 0.95
    adam_epsilon: Annotated[float, "AdamW's epsilon.", POSITIVE, FIXED] = 1e-15
    adam_weight_decay: Annotated[float, "AdamW's weight decay.", NOT_NEGATIVE, FIXED] = 0.0
    muon_momentum: Annotated[float, "Muon's Nesterov momentum.", BELOW_ONE, FIXED] = 0.95
    muon_adjust_lr_fn: Annotated[
        Literal["match_rms_adamw", "original"],
        "Muon's learning rate over AdamW's: updates of the same root mean square, or sqrt(max(1, rows / columns)).",
        FIXED,
    ] = "match_rms_adamw"
    muon_fused: Annotated[
        bool,
        "Muon takes a fused projection (query, key, value) for one matrix, as the study did, not for several.",
        FIXED,
    ] = False
    muon_newton_schulz_dtype: Annotated[Literal["bf16", "fp32"], "Type in which Muon orthogonalizes.", FIXED] = "bf16"
    lr_scheduler: Annotated[
        Literal["constant", "linear", "cosine"],
        "After the warm-up: constant, or decay to zero over the last `lr_decay_steps`.",
        STAGE,
    ] = "constant"
    lr_warmup_steps: Annotated[
        int | None,
        f"Steps of linear warm-up; none: {WARMUP_STEPS}, or a tenth of `max_train_steps` where that is fewer.",
        NOT_NEGATIVE,
        STAGE,
    ] = None
    lr_decay_steps: Annotated[
        int | None, "Steps of the final decay (linear, cosine); none: all after warm-up.", AT_LEAST_ONE, STAGE
    ] = None
    max_grad_norm: Annotated[float, "Gradients are clipped to this norm.", POSITIVE, STAGE] = 0.2
    caption_dropout: Annotated[float, "Share of captions replaced by the empty one, for guidance.", SHARE, STAGE] = 0.1
    timestep_sampling: Annotated[
        Literal["logit_normal", "uniform"],
        "Distribution of t in training, before the shift; held in [0.001, 1).",
        STAGE,
    ] = "logit_normal"
    uniform_fraction: Annotated[
        float,
        "With logit_normal, share of timesteps that are drawn uniformly in [0.001, 1) instead, without the shift.",
        SHARE,
        STAGE,
    ] = DEFAULT_UNIFORM_FRACTION
    shift: Annotated[
        float, "Timestep shift s t / (1 + (s - 1) t), in training and in the saved scheduler.", POSITIVE, STAGE
    ] = 1.0
    shift_base_resolution: Annotated[
        int | None,
        "`shift` is meant for this resolution and grows in proportion to the run's (Stable Diffusion 3, arXiv "
        "2403.03206); none: `shift` as it is.",
        AT_LEAST_ONE,
        STAGE,
    ] = None
    use_ema: Annotated[
        bool, "Keep an exponential moving average of the weights; it becomes the saved model.", FIXED
    ] = False
    ema_decay: Annotated[float, "Decay of the moving average.", BELOW_ONE, FIXED] = 0.999
    ema_warmup: Annotated[
        bool,
        "Let the decay of the moving average grow with the n-th update as (1 + n) / (10 + n) up to `ema_decay`; 0.999 "
        "is reached after 8,990 updates. Off, as in the study: `ema_decay` from the first update on, after "
        "1,000 of which at 0.999 a third of the average is still the weights that the run began with.",
        FIXED,
    ] = True
    ema_update_every: Annotated[int, "Steps between two updates of the moving average.", AT_LEAST_ONE] = 10
    mixed_precision: Annotated[
        Literal["no", "bf16"], "Type of the computation; for that of the weights see weights_dtype."
    ] = "bf16"
    weights_dtype: Annotated[
        Literal["float32", "bf16"],
        "Type that the transformer's weights are stored in. bf16 is the study's negative result (FID 18.20 became "
        "21.87): small updates are lost.",
        FIXED,
    ] = "float32"
    gradient_checkpointing: Annotated[bool, "Recompute activations in the backward pass to save memory."] = False
    activation_budget: Annotated[
        float, "With gradient_checkpointing, share of the blocks that keep their activations; 0: none.", BELOW_ONE
    ] = 0.0
    attention_backend: Annotated[
        str | None, "diffusers' attention backend of the transformer, as `flash` or `_native_math`; none: its default."
    ] = None
    compile: Annotated[bool, "Compile the transformer's blocks with torch.compile."] = False

    sharding: Annotated[
        Literal["none", "full", "hybrid"],
        "Spread weights, gradients, optimizer and average over the processes (FSDP2): over all of them, or over "
        "groups of them with a copy in each; none: every process has all (DDP).",
    ] = "none"
    sharding_size: Annotated[
        int | None, "Processes that share one copy with `sharding` hybrid; none: those of a node.", AT_LEAST_ONE
    ] = None

    # the techniques of the study, each off by default
    route_ratio: Annotated[
        float,
        "Share of the image tokens that go around the blocks of `route_range` in training (TREAD, arXiv 2501.04765; "
        "with a `fusion_range` in transformer_config SPRINT, arXiv 2510.21986); 0: none.",
        BELOW_ONE,
        STAGE,
    ] = 0.0
    route_range: Annotated[
        list, "Half-open range [start, stop) of the blocks that routed tokens go around.", STAGE
    ] = field(default_factory=lambda: [2, 13])
    contrastive_weight: Annotated[
        float,
        "Weight of contrastive flow matching (arXiv 2506.05350), within each micro-batch; the study: 0.05.",
        NOT_NEGATIVE,
        STAGE,
    ] = 0.0
    repa_weight: Annotated[
        float,
        "Weight of the alignment with a vision teacher (REPA, arXiv 2410.06940); the study: 0.5.",
        NOT_NEGATIVE,
        STAGE,
    ] = 0.0
    repa_teacher: Annotated[
        str | None,
        "Vision model (folder or Hub id) to align with, as facebook/dinov2-with-registers-large.",
        STAGE,
        PATH,
    ] = None
    repa_block: Annotated[int, "The block, from 0, whose output is aligned.", NOT_NEGATIVE, STAGE] = 7
    repa_projector: Annotated[
        Literal["mlp", "conv", "attention"],
        "From the block's features to the teacher's: three linear layers, one 3x3 convolution (iREPA), or attention "
        "with rotary positions.",
        STAGE,
    ] = "mlp"
    repa_projector_size: Annotated[
        int | None,
        "Width inside the mlp projector, as REPA's 2048; none: that of the transformer.",
        AT_LEAST_ONE,
        STAGE,
    ] = None
    repa_spatial_gamma: Annotated[
        float | None,
        "iREPA's spatial normalization of the teacher's features (arXiv 2512.10794), as 0.8; none: off.",
        SHARE,
        STAGE,
    ] = None
    repa_until_step: Annotated[
        int | None, "Step at which the alignment ends; the study: 200,000; none: never.", AT_LEAST_ONE, STAGE
    ] = None
    repa_check_steps: Annotated[
        int | None,
        "Steps between two measurements of the cosine between the gradients of alignment and flow at the block; the "
        "alignment ends when the mean of `repa_check_window` of them is below 0; none: not measured.",
        AT_LEAST_ONE,
        STAGE,
    ] = None
    repa_check_window: Annotated[
        int, "Measurements of the gradients' cosine that decide on the end.", AT_LEAST_ONE, STAGE
    ] = 20
    repa_cache_dir: Annotated[
        str | None,
        "Folder that keeps the teacher's features of every image and crop.",
        STAGE,
        RUNTIME,
        PATH,
    ] = None
    lpips_weight: Annotated[
        float, "Weight of LPIPS-VGG (arXiv 1801.03924); the study: 0.1, in pixels.", NOT_NEGATIVE, STAGE
    ] = 0.0
    lpips_backbone: Annotated[
        str | None,
        "File with torchvision's VGG-16 weights (vgg16-397923af.pth); none: torchvision's cache.",
        STAGE,
        PATH,
    ] = None
    lpips_scale: Annotated[float, "Images are made smaller by this factor for LPIPS.", PART, STAGE] = 0.5
    dino_weight: Annotated[
        float,
        "Weight of the cosine distance of a vision model's patches; the study: 0.01, in pixels.",
        NOT_NEGATIVE,
        STAGE,
    ] = 0.0
    dino_teacher: Annotated[
        str | None,
        "Vision model (folder or Hub id) of it, as facebook/dinov2-with-registers-base.",
        STAGE,
        PATH,
    ] = None
    dino_size: Annotated[int, "Height and width in pixels that this vision model sees.", AT_LEAST_ONE, STAGE] = 224
    dino_crop: Annotated[bool, "Show it a random crop of that size, not the whole image resized to it.", STAGE] = False
    perceptual_max_timestep: Annotated[
        float, "LPIPS and DINO losses count for timesteps up to this one.", PART, STAGE
    ] = 1.0
    perceptual_decode_latents: Annotated[
        bool,
        "In latent space, decode the predicted clean latents for them, with gradients through the decoder.",
        STAGE,
    ] = False

    # validation
    validation_steps: Annotated[
        int, "Steps between two validations; the last step is always validated.", AT_LEAST_ONE
    ] = 1000
    num_validation_samples: Annotated[
        int, "Held-out images for the validation loss; 0: no validation loss.", NOT_NEGATIVE
    ] = 0
    validation_prompts: Annotated[list, "Prompts drawn at each validation."] = field(default_factory=list)
    validation_guidance_scale: Annotated[
        float, "Guidance of the validation images.", Range("finite and at least 1 (off)", 1)
    ] = 4.0
    validation_inference_steps: Annotated[int, "Sampling steps of the validation images.", AT_LEAST_ONE] = 28

    # the run
    dry_run: Annotated[
        bool,
        "Print what the run would be and stop, before any weights are loaded.",
        RUNTIME,
    ] = False
    stages: Annotated[
        list,
        "Stages of the run, one after the other: each a mapping of the settings that it changes, as resolution, data, "
        "batch size, learning rate and techniques; its `max_train_steps` counts its own steps.",
    ] = field(default_factory=list)
    output_dir: Annotated[str, "Where checkpoints, logs and the final pipeline go.", RUNTIME, PATH] = "outputs/prx"
    checkpointing_steps: Annotated[int, "Steps between two checkpoints.", AT_LEAST_ONE, RUNTIME] = 1000
    checkpoints_total_limit: Annotated[
        int | None, "Keep only this many checkpoints; none: all.", AT_LEAST_ONE, RUNTIME
    ] = None
    resume_from_checkpoint: Annotated[
        str | None,
        "The folder of a checkpoint, or `latest`: the last one in output_dir, where there is one.",
        RUNTIME,
        PATH,
    ] = None
    non_finite: Annotated[
        Literal["stop", "skip"],
        "What becomes of a step whose loss or gradient is not finite; its samples are written down in any case.",
    ] = "stop"
    step_timeout_seconds: Annotated[
        int,
        "A step or a validation that takes longer ends the run; every process writes where it hangs to its standard "
        "error.",
        AT_LEAST_ONE,
        RUNTIME,
    ] = 1800
    report_to: Annotated[
        Literal["tensorboard", "wandb", "trackio", "none"],
        "Experiment tracker.",
        RUNTIME,
    ] = "tensorboard"
    logging_steps: Annotated[int, "Steps between two entries of the log.", AT_LEAST_ONE, RUNTIME] = 10
    push_to_hub: Annotated[
        bool,
        "Upload the final pipeline; that the token may write to the repository is made sure of at the start.",
        RUNTIME,
    ] = False
    hub_model_id: Annotated[
        str | None, "Repository to upload to, as name or namespace/name; none: the name of output_dir.", RUNTIME
    ] = None

    def __post_init__(self) -> None:
        self._expand_paths()
        self._check_ranges()
        self._check_adapter()
        self._check_combinations()
        self._check_techniques()
        self.stage_configs()

    def _expand_paths(self) -> None:
        for name in marked(TrainingConfig, PATH):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, expand_path(value))
        sources = [
            source | {"name": expand_path(source["name"])}
            if isinstance(source, dict) and isinstance(source.get("name"), str)
            else source
            for source in self.data_sources
        ]
        object.__setattr__(self, "data_sources", sources)

    def _check_ranges(self) -> None:
        for name, setting in settings_of(TrainingConfig).items():
            setting.check(name, getattr(self, name))
        if not all(isinstance(prompt, str) for prompt in self.validation_prompts):
            raise ValueError(f"`validation_prompts` must be a list of strings, got {self.validation_prompts}.")

    def _check_combinations(self) -> None:
        self._check_data()
        if self.pretrained_model_name_or_path is None:
            if self.revision is not None:
                raise ValueError(f"`revision` is {self.revision!r}, but no `pretrained_model_name_or_path` is given.")
            if not self.transformer_config:
                raise ValueError("Give `pretrained_model_name_or_path`, or a `transformer_config` for a new one.")
            if not self.text_encoder_config and self.text_encoder_name_or_path is None:
                raise ValueError("Give `text_encoder_name_or_path`, or a `text_encoder_config` for a new one.")
        elif self.revision is not None and Path(self.pretrained_model_name_or_path).is_dir():
            raise ValueError("`revision` belongs to a repository on the Hub; the pretrained pipeline is a folder.")
        if self.text_encoder_config and self.text_encoder_name_or_path is not None:
            raise ValueError("Give `text_encoder_config` (a new one) or `text_encoder_name_or_path`, not both.")
        if self.text_encoder_config and not self.train_text_encoder:
            raise ValueError("A new text encoder (`text_encoder_config`) must be trained: set `train_text_encoder`.")
        if self.precomputed_dir is not None:
            self._check_precomputed()
        if self.timestep_sampling == "uniform" and self.uniform_fraction not in (0.0, DEFAULT_UNIFORM_FRACTION):
            raise ValueError(
                f"`uniform_fraction` is {self.uniform_fraction}, a share of logit_normal timesteps, but "
                "`timestep_sampling` is uniform: leave one of them out."
            )
        if self.lr_scheduler == "constant" and self.lr_decay_steps is not None:
            raise ValueError("`lr_decay_steps` needs `lr_scheduler` linear or cosine; it is constant.")
        decay = self.lr_decay_steps or 0
        if self.warmup_steps + decay > self.max_train_steps:
            raise ValueError(
                f"`lr_warmup_steps` ({self.warmup_steps}) and `lr_decay_steps` ({decay}) must fit in "
                f"`max_train_steps` ({self.max_train_steps}): make them smaller, or leave them out."
            )
        if self.weights_dtype == "bf16" and self.mixed_precision != "bf16":
            raise ValueError("`weights_dtype` bf16 needs `mixed_precision` bf16.")
        if self.activation_budget and not self.gradient_checkpointing:
            raise ValueError(
                f"`activation_budget` is {self.activation_budget}, but without `gradient_checkpointing` all are kept."
            )
        if self.use_ema and self.ema_update_every > self.max_train_steps:
            raise ValueError(
                f"`ema_update_every` ({self.ema_update_every}) must be at most `max_train_steps` "
                f"({self.max_train_steps}): the saved average would be the untrained weights."
            )
        if self.sharding_size is not None and self.sharding != "hybrid":
            raise ValueError(
                f"`sharding_size` is {self.sharding_size}, but `sharding` is {self.sharding}, not hybrid."
            )
        if self.sharding != "none" and self.repa_check_steps is not None:
            raise ValueError(
                f"`repa_check_steps` compares gradients at whole weights, which `sharding` {self.sharding} does not "
                "keep: end the alignment with `repa_until_step` instead."
            )
        if self.hub_model_id is not None and not self.push_to_hub:
            raise ValueError(f"`hub_model_id` is {self.hub_model_id!r}, but `push_to_hub` is not set.")
        if self.push_to_hub:
            check_name(self.repo_id)

    def _check_data(self) -> None:
        given = [bool(self.data_sources), self.dataset_name is not None, self.train_data_dir is not None]
        if sum(given) != 1:
            raise ValueError(
                f"`dataset_name` is {self.dataset_name!r} and `train_data_dir` is {self.train_data_dir!r}, and "
                f"`data_sources` is {self.data_sources}: give exactly one of the three (for the built-in data: "
                "`dataset_name` scenes)."
            )
        for source in self.data_sources:
            _check_source(source, bool(self.caption_weights))
        sources = sources_of(self)
        drawn = next((source.name for source in sources if source.is_drawn), None)
        weights = [source.weight for source in sources if source.weight is not None]
        if self.dataset_config_name is not None and (drawn or self.dataset_name is None):
            raise ValueError(
                f"`dataset_config_name` is {self.dataset_config_name!r}; only a data set of the Hub has such "
                "configurations: leave it out, or name it in its source as `config_name`."
            )
        if weights and len(weights) < len(sources):
            raise ValueError(
                f"`data_sources` have the weights {[source.weight for source in sources]}: give every source one, or "
                "none to read each sample equally."
            )
        if len(sources) > 1 and not weights and (drawn or self.streaming):
            raise ValueError(
                "`data_sources` need a `weight` each where they have no end: with scenes, and with `streaming`."
            )
        if self.instance_prompt is not None and all(source.is_drawn for source in sources):
            raise ValueError(f"`instance_prompt` is for stored data; `dataset_name` {drawn} has captions of its own.")
        if self.emoji_dir is None and any(source.name == "emoji_scenes" for source in sources):
            raise ValueError(
                "`emoji_dir` is None, but emoji_scenes need the folder that `training/tools/fetch_emoji.py` wrote: "
                "pass `--emoji_dir`."
            )
        prompted = [source.instance_prompt for source in sources if source.instance_prompt is not None]
        for name, used in (("caption_weights", bool(self.caption_weights)), ("streaming", self.streaming)):
            if prompted and used:
                raise ValueError(
                    f"`instance_prompt` {prompted[0]!r} is the one caption of images that are read by index: leave "
                    f"out `{name}`."
                )
        if not all(prompt.strip() for prompt in prompted):
            raise ValueError(f"`instance_prompt` must be a text, got {prompted}.")
        inside = Path(expand_path(self.output_dir)).resolve()
        for source in sources:
            if source.instance_prompt is not None and Path(expand_path(source.name)).resolve() in (
                inside,
                *inside.parents,
            ):
                raise ValueError(
                    f"`output_dir` is {self.output_dir}, inside the data {source.name}: with `instance_prompt`, the "
                    "images that the run draws would be trained on. Pass another `--output_dir`."
                )
        for column, weight in self.caption_weights.items():
            if not _is_weight(weight):
                raise ValueError(f"`caption_weights` must be positive and finite, got {weight!r} for {column}.")
        for name, used in (("weight", len(weights) > 1), ("streaming", self.streaming)):
            if used and self.aspect_ratio_buckets != "none":
                raise ValueError(
                    f"`aspect_ratio_buckets` must be none with `{name}`: buckets need the sizes of all images."
                )
            if used and self.precomputed_dir is not None:
                raise ValueError(f"`precomputed_dir` excludes `{name}`: only data with an end can be precomputed.")
        if drawn and self.streaming:
            raise ValueError(f"`streaming` is for stored data: `dataset_name` {drawn} is drawn on the fly.")
        if drawn and self.aspect_ratio_buckets != "none":
            raise ValueError(f"`aspect_ratio_buckets` must be none with `dataset_name` {drawn}: scenes are squares.")
        if drawn and self.random_flip:
            raise ValueError(
                f"`random_flip` would make the captions of `dataset_name` {drawn} wrong (left and right)."
            )

    def _check_precomputed(self) -> None:
        if self.scenes_size is None and any(source.is_drawn for source in sources_of(self)):
            raise ValueError(
                f"`precomputed_dir` is {self.precomputed_dir!r}, but `dataset_name` {self.dataset_name} has no end: "
                "pass `--scenes_size`."
            )
        if self.train_text_encoder:
            raise ValueError(
                "`precomputed_dir` keeps what a frozen text encoder computes: leave out `train_text_encoder`."
            )
        if not self.center_crop or self.random_flip:
            raise ValueError(
                f"`precomputed_dir` keeps one crop of each image: set `center_crop` (is {self.center_crop}) and leave "
                f"out `random_flip` (is {self.random_flip})."
            )
        if self.repa_cache_dir is not None:
            raise ValueError("`precomputed_dir` has the teacher's features already: leave out `repa_cache_dir`.")

    def _check_techniques(self) -> None:
        if (
            len(self.route_range) != 2
            or not all(isinstance(block, int) for block in self.route_range)
            or not 0 <= self.route_range[0] < self.route_range[1]
        ):
            raise ValueError(
                f"`route_range` must be a half-open range [start, stop) of blocks, got {self.route_range}."
            )
        fusion_range = self.transformer_config.get("fusion_range")
        if fusion_range is not None and not isinstance(fusion_range, (list, tuple)):
            raise ValueError(f"`fusion_range` of the transformer must be a range [start, stop), got {fusion_range!r}.")
        if self.route_ratio and fusion_range is not None and list(fusion_range) != list(self.route_range):
            raise ValueError(
                f"`route_range` is {self.route_range}, but the transformer's `fusion_range` is {fusion_range}: "
                "they must be the same."
            )
        if self.contrastive_weight and self.train_batch_size < 2:
            raise ValueError("`contrastive_weight` needs a `train_batch_size` of at least 2: samples are paired.")
        self._check_used_together("repa_weight", "repa_teacher")
        self._check_used_together("dino_weight", "dino_teacher")
        for name in ["repa_spatial_gamma", "repa_until_step", "repa_check_steps", "repa_cache_dir"]:
            if getattr(self, name) is not None and not self.repa_weight:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but `repa_weight` is 0: nothing is aligned.")
        if self.lpips_backbone is not None and not self.lpips_weight:
            raise ValueError(f"`lpips_backbone` is {self.lpips_backbone}, but `lpips_weight` is 0.")
        if self.repa_weight and self.repa_projector == "conv" and self.route_ratio:
            raise ValueError(
                "`repa_projector` conv needs every token in its place, but `route_ratio` takes some away: use mlp or "
                "attention, or leave out the route."
            )
        perceptual = self.lpips_weight or self.dino_weight
        self.check_perceptual_size(self.resolution)
        if self.perceptual_decode_latents and not perceptual:
            raise ValueError("`perceptual_decode_latents` is set, but `lpips_weight` and `dino_weight` are 0.")
        if perceptual and self.vae_name_or_path is not None and not self.perceptual_decode_latents:
            raise ValueError(
                "`lpips_weight` and `dino_weight` compare pixels, but `vae_name_or_path` makes this a run in latents: "
                "set `perceptual_decode_latents` to decode the predicted latents in every step."
            )

    def _check_adapter(self) -> None:
        """Refuse what an adapter cannot be, and what cannot be beside one."""
        if self.lora_rank is None:
            for name, off in (("lora_alpha", None), ("lora_dropout", 0.0), ("use_dora", False)):
                if getattr(self, name) != off:
                    raise ValueError(f"`{name}` is {getattr(self, name)}, but there is no `lora_rank`: give one.")
            if self.lora_layers != list(LORA_LAYERS):
                raise ValueError(f"`lora_layers` is {self.lora_layers}, but there is no `lora_rank`: give one.")
            return
        if not self.lora_layers or not all(isinstance(name, str) and name for name in self.lora_layers):
            raise ValueError(f"`lora_layers` must be a list of names of layers, got {self.lora_layers}.")
        if self.pretrained_model_name_or_path is None:
            raise ValueError(
                f"`lora_rank` is {self.lora_rank}, but there is no `pretrained_model_name_or_path`: an adapter is "
                "trained on a pipeline and loaded on it again."
            )
        for name in ("transformer_config", "vae_name_or_path", "text_encoder_name_or_path", "train_text_encoder"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}, but an adapter (`lora_rank`) is loaded on the pretrained "
                    "pipeline as it is: leave it out."
                )
        if self.optimizer == "muon":
            raise ValueError(
                "`optimizer` muon orthogonalizes the updates of whole weights, of which an adapter (`lora_rank`) has "
                "only factors: use adamw."
            )

    def too_many_unreadable(self, unreadable: int, read: int) -> bool:
        """Whether more samples could not be read than `max_corrupt_share` allows of those tried."""
        return unreadable > self.max_corrupt_share * max(read, SAMPLES_BEFORE_JUDGING)

    def check_perceptual_size(self, side: int) -> None:
        """Refuse perceptual losses that need larger images than these.

        Args:
            side: the shorter one of the images, in pixels.

        Raises:
            ValueError: if LPIPS or the crop for DINO does not fit.
        """
        if self.lpips_weight and round(side * self.lpips_scale) < 16:
            raise ValueError(
                f"LPIPS needs 16 pixels, but `lpips_scale` {self.lpips_scale} times the {side} of the images' shorter "
                "side is less: make `lpips_scale` or `resolution` larger."
            )
        if self.dino_weight and self.dino_crop and self.dino_size > side:
            raise ValueError(
                f"`dino_crop` cuts {self.dino_size} pixels (`dino_size`) out of images whose shorter side has {side}: "
                "make `dino_size` smaller, or leave out `dino_crop`."
            )

    @property
    def repo_id(self) -> str:
        """The repository to upload to; without a namespace it is the token's own."""
        return self.hub_model_id or Path(self.output_dir).resolve().name

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up: `lr_warmup_steps`, or what serves a run (or a stage) of this length."""
        return warmup_of(self.lr_warmup_steps, self.lr_decay_steps, self.max_train_steps)

    @property
    def timestep_shift(self) -> float:
        """The shift at this resolution: by the square root of the ratio of image tokens (arXiv 2403.03206)."""
        return self.shift * (1 if self.shift_base_resolution is None else self.resolution / self.shift_base_resolution)

    def _check_used_together(self, weight: str, teacher: str) -> None:
        if bool(getattr(self, weight)) != (getattr(self, teacher) is not None):
            raise ValueError(
                f"`{weight}` is {getattr(self, weight)} and `{teacher}` is {getattr(self, teacher)}: "
                "give both, or neither."
            )

    def stage_configs(self) -> "list[TrainingConfig]":
        """One configuration per stage; of a run without stages, the run's own.

        Raises:
            ValueError: for a stage that changes what a stage may not, or that is illegal by itself.
        """
        known, allowed = settings_of(TrainingConfig), marked(TrainingConfig, STAGE)
        configs: list[TrainingConfig] = []
        for number, stage in enumerate(self.stages):
            if not isinstance(stage, dict):
                raise ValueError(f"`stages` must be a list of mappings of settings, got {stage!r}.")
            refused = sorted(set(stage) - set(allowed))
            if refused:
                raise ValueError(f"Stage {number} changes {refused}; a stage may change {sorted(allowed)}.")
            first_step = sum(earlier.max_train_steps for earlier in configs)
            try:
                settings = {name: known[name].read(name, value) for name, value in stage.items()}
                configs.append(dataclasses.replace(self, stages=[], **settings))
            except ValueError as error:
                raise ValueError(f"Stage {number}: {error}") from error
            until = configs[-1].repa_until_step
            if until is not None and until <= first_step:
                raise ValueError(
                    f"Stage {number}: `repa_until_step` {until} counts the steps of the run, of which this stage "
                    f"begins with {first_step}: nothing would be aligned. Make it larger, or `repa_weight` 0."
                )
        return configs or [self]

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain data, as they are saved with the run."""
        return dataclasses.asdict(self)


def warmup_of(lr_warmup_steps: int | None, lr_decay_steps: int | None, max_train_steps: int) -> int:
    """Return the steps of linear warm-up that these settings mean."""
    if lr_warmup_steps is not None:
        return lr_warmup_steps
    return max(0, min(WARMUP_STEPS, max_train_steps // 10, max_train_steps - (lr_decay_steps or 0)))


def settings_of_run(stored: Mapping[str, Any], in_pixels: bool) -> dict[str, Any]:
    """Return the settings in the record of a run; where the record is older than a setting, what the run did.

    Args:
        stored: `config` of training.json.
        in_pixels: True if the run had no autoencoder.
    """
    return {"caption_cleaning": "light" if in_pixels else "full_v1", "ema_warmup": True} | dict(stored)


def sources_of(cfg: TrainingConfig) -> list[DataSource]:
    """The sources of a stage's data: those of `data_sources`, or the single one of the settings beside it."""
    listed = cfg.data_sources or [
        {"name": cfg.dataset_name or cfg.train_data_dir, "config_name": cfg.dataset_config_name}
    ]
    sources = []
    for source in listed:
        drawn = source["name"] in DRAWN_SOURCES
        settings = {
            "weight": None,
            "config_name": None,
            "split": cfg.dataset_split,
            "image_column": cfg.image_column,
            "caption_column": cfg.scenes_caption if drawn else cfg.caption_column,
            "instance_prompt": None if drawn else cfg.instance_prompt,
        }
        sources.append(DataSource(**settings | source))
    return sources


def cache_folder(cfg: TrainingConfig) -> Path:
    """Where the cache of a stage is: in a folder of `precomputed_dir` for its resolution."""
    return Path(str(cfg.precomputed_dir)) / str(cfg.resolution)


def _check_source(source: Any, weighted_captions: bool) -> None:
    """Refuse an entry of `data_sources` that is none."""
    known = [option.name for option in dataclasses.fields(DataSource)]
    if not isinstance(source, dict) or "name" not in source:
        raise ValueError(f"`data_sources` must be a list of mappings with a `name`, got {source!r}.")
    if unknown := sorted(map(str, set(source) - set(known))):
        raise ValueError(f"`data_sources` has {unknown} in {source['name']!r}; a source may have {known}.")
    for name, value in source.items():
        if name == "weight":
            if not _is_weight(value):
                raise ValueError(f"`data_sources`: `weight` must be positive and finite, got {value!r}.")
        elif not isinstance(value, str):
            raise ValueError(f"`data_sources`: `{name}` must be a word or a path, got {value!r}.")
    drawn = sorted(set(source) & {"config_name", "split", "image_column", "instance_prompt"})
    if source["name"] in DRAWN_SOURCES and drawn:
        raise ValueError(
            f"`data_sources` has {drawn} for {source['name']}, which is drawn on the fly: leave them out."
        )
    if weighted_captions and "caption_column" in source:
        raise ValueError(
            f"`data_sources` has the `caption_column` {source['caption_column']!r}, but `caption_weights` names the "
            "columns of all sources: leave one of them out."
        )


def _is_weight(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
