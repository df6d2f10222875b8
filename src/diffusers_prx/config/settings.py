"""The settings of a training run with their help texts, defaults and accepted ranges.

The comments that divide the fields are the headings of the settings page in the documentation.
"""

from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from ..prompt_cleaning import CaptionCleaning
from .fields import (
    AT_LEAST_ONE,
    AT_LEAST_TWO,
    FIXED_ON_RESUME,
    FRACTION,
    FRACTION_ABOVE_ZERO,
    FRACTION_BELOW_ONE,
    NON_NEGATIVE,
    PATH,
    PER_STAGE,
    POSITIVE,
    RUNTIME,
    SHARED_CACHE,
    Range,
)

# Below this number of samples, `max_corrupt_share` is applied to this number: one bad file does not stop a run.
MIN_SAMPLES_FOR_CORRUPT_SHARE = 1000
# The PRX study warms up for 1,000 of 100,000 steps.
WARMUP_STEPS = 1000
DEFAULT_UNIFORM_FRACTION = 0.1
# All linear layers of a block except its modulation.
LORA_LAYERS = (
    "attention.img_qkv_proj",
    "attention.txt_kv_proj",
    "attention.to_out.0",
    "gate_proj",
    "up_proj",
    "down_proj",
)


@dataclass(frozen=True)
class TrainingSettings:
    """Fields of `TrainingConfig`, which validates them."""

    # the model
    pretrained_model_name_or_path: Annotated[
        str | None, "Saved PRX pipeline to start from: a folder or a Hub id. Its components are used.", PATH
    ] = None
    revision: Annotated[str | None, "Branch, tag or commit of the pretrained pipeline on the Hub."] = None
    transformer_config: Annotated[
        dict,
        "Arguments of PRXTransformer2DModel for a new transformer that is trained from scratch. Leave it empty to "
        "train the pretrained one.",
    ] = field(default_factory=dict)
    vae_name_or_path: Annotated[
        str | None,
        "Autoencoder (folder or Hub id, also of a pipeline with a `vae` subfolder) for training in latent space. "
        "Without one, a new model is trained in pixel space.",
        PATH,
    ] = None
    text_encoder_name_or_path: Annotated[
        str | None,
        "Text encoder and tokenizer (folder or Hub id). Needed if no pretrained pipeline provides them.",
        PATH,
    ] = None
    text_encoder_config: Annotated[
        dict,
        "Arguments of T5GemmaModuleConfig for a new text encoder. It is trained with the transformer, and its "
        "tokenizer is trained on the captions first.",
    ] = field(default_factory=dict)
    tokenizer_vocab_size: Annotated[
        int, "Number of tokens in the vocabulary of the tokenizer for a new text encoder.", AT_LEAST_ONE
    ] = 1024
    train_text_encoder: Annotated[bool, "Train the text encoder together with the transformer.", FIXED_ON_RESUME] = (
        False
    )
    prediction_type: Annotated[
        Literal["velocity", "x_prediction"],
        "Output of the transformer: the velocity (noise - image), or the clean image, which suits pixel space.",
        FIXED_ON_RESUME,
    ] = "velocity"
    noise_scale: Annotated[
        float,
        "Standard deviation of the noise at t = 1. Values above 1 make up for the redundancy of large pixel images.",
        POSITIVE,
        FIXED_ON_RESUME,
    ] = 1.0
    max_sequence_length: Annotated[
        int,
        "Maximum number of text tokens. Longer captions are truncated and counted.",
        AT_LEAST_ONE,
        FIXED_ON_RESUME,
    ] = 256
    caption_cleaning: Annotated[
        CaptionCleaning,
        "Cleaning of captions, and of prompts in the saved pipeline. `full` (the study's setting for T5Gemma) lowers "
        "the case and removes links, file names, article numbers, CJK characters and unusual symbols; `full_v1` "
        "cleans like diffusers' PRXPipeline; `light` (the study's setting for Qwen3-VL) only repairs Unicode and "
        "HTML.",
        FIXED_ON_RESUME,
    ] = "full"

    # a LoRA adapter instead of the weights
    lora_rank: Annotated[
        int | None,
        "Rank of a LoRA adapter (arXiv 2106.09685) to train instead of the transformer's weights. A higher rank "
        "learns more and makes a larger file.",
        AT_LEAST_ONE,
    ] = None
    lora_alpha: Annotated[
        int | None,
        "Scale of the adapter: its output is multiplied by `lora_alpha` / `lora_rank`; null: by 1.",
        AT_LEAST_ONE,
    ] = None
    lora_dropout: Annotated[
        float, "Dropout probability of the adapter's inputs during training.", FRACTION_BELOW_ONE
    ] = 0.0
    lora_layers: Annotated[
        list,
        "Linear layers that get an adapter, as suffixes of their names: [attention.img_qkv_proj, modulation.lin].",
    ] = field(default_factory=lambda: list(LORA_LAYERS))
    use_dora: Annotated[bool, "Also train the norms of the weight rows (DoRA, arXiv 2402.09353)."] = False

    # the data
    dataset_name: Annotated[
        str | None,
        "Data set: a folder, a pattern of tar or parquet files, or a Hub id. `scenes` (built in) and `emoji_scenes` "
        "(emoji of `emoji_dir` on colored backgrounds) are drawn during training.",
        PER_STAGE,
        SHARED_CACHE,
        PATH,
    ] = None
    dataset_config_name: Annotated[
        str | None, "Configuration of a Hub data set that has several.", PER_STAGE, SHARED_CACHE
    ] = None
    dataset_split: Annotated[str, "Split of the data set to train on.", PER_STAGE, SHARED_CACHE] = "train"
    train_data_dir: Annotated[
        str | None,
        "Folder of images with a metadata.jsonl, or with one caption file per image. An alternative to "
        "`dataset_name`.",
        PER_STAGE,
        SHARED_CACHE,
        PATH,
    ] = None
    data_sources: Annotated[
        list,
        "Several data sets: a list of mappings with a `name` each. Optional keys are `weight` (sampling proportion), "
        "`config_name`, `split`, `image_column`, `caption_column` and `instance_prompt`. An alternative to "
        "`dataset_name`.",
        PER_STAGE,
        SHARED_CACHE,
    ] = field(default_factory=list)
    image_column: Annotated[str, "Column of the images.", PER_STAGE, SHARED_CACHE] = "image"
    rejected_image_column: Annotated[
        str | None,
        "With `objective` dpo, column of the rejected images; `image_column` has the preferred ones.",
        PER_STAGE,
    ] = None
    caption_column: Annotated[str, "Column of the captions.", PER_STAGE, SHARED_CACHE] = "text"
    instance_prompt: Annotated[
        str | None,
        "Caption for all images of stored data, which replaces their own (DreamBooth, arXiv 2208.12242). The "
        "built-in scenes keep theirs.",
        PER_STAGE,
        SHARED_CACHE,
    ] = None
    caption_weights: Annotated[
        dict,
        "Caption columns with sampling weights, for data with several captions per image: {long: 0.7, short: 0.2, "
        "tags: 0.1}. One column is drawn for each sample. It overrides `caption_column` and `scenes_caption`; the "
        "columns of the built-in scenes are long and short.",
        PER_STAGE,
        SHARED_CACHE,
    ] = field(default_factory=dict)
    streaming: Annotated[
        bool,
        "Read the data sequentially, shard by shard, instead of by index. Use it for data that is not on this "
        "machine's disk.",
        PER_STAGE,
    ] = False
    data_cache_dir: Annotated[
        str | None,
        "Folder for the indexes of tar files. Without it, every start reads all tar headers.",
        PER_STAGE,
        RUNTIME,
        PATH,
    ] = None
    caption_statistics_samples: Annotated[
        int,
        "Number of captions per stage whose token counts are summarized before training. 0 skips the summary.",
        NON_NEGATIVE,
    ] = 2000
    scenes_level: Annotated[
        Literal["easy", "medium", "hard"], "Difficulty of the built-in `scenes`.", PER_STAGE, SHARED_CACHE
    ] = "easy"
    scenes_caption: Annotated[
        Literal["long", "short"], "Style of the captions of `scenes` and `emoji_scenes`.", PER_STAGE, SHARED_CACHE
    ] = "long"
    scenes_size: Annotated[
        int | None,
        "Number of different training samples of `scenes` and `emoji_scenes`; null: no limit. Set it to train by "
        "epochs or to use `precomputed_dir`.",
        AT_LEAST_ONE,
        PER_STAGE,
        SHARED_CACHE,
    ] = None
    emoji_dir: Annotated[
        str | None,
        "Folder that training/tools/fetch_emoji.py has written, for `dataset_name` emoji_scenes, and for emoji in "
        "`validation_metrics` and `reward_scorers`.",
        PER_STAGE,
        SHARED_CACHE,
        PATH,
    ] = None
    resolution: Annotated[
        int,
        "Height and width in pixels. Images are resized until they cover this square, then cropped.",
        AT_LEAST_ONE,
        PER_STAGE,
        SHARED_CACHE,
    ] = 256
    aspect_ratio_buckets: Annotated[
        Literal["none", "study", "computed"],
        "Image sizes by aspect ratio: the study's (for a resolution of 256, 512 or 1024), or computed for any "
        "resolution. none: squares only.",
        PER_STAGE,
        SHARED_CACHE,
    ] = "none"
    max_aspect_ratio: Annotated[
        float,
        "Ratio of the longer to the shorter side in the most elongated computed bucket.",
        AT_LEAST_ONE,
        PER_STAGE,
        SHARED_CACHE,
    ] = 2.0
    max_upscale: Annotated[
        float | None,
        "Maximum factor by which an image may be enlarged. Smaller images are left out and counted; null: no limit.",
        AT_LEAST_ONE,
        PER_STAGE,
        SHARED_CACHE,
    ] = 1.0
    max_crop: Annotated[
        float,
        "Maximum fraction of an image that cropping may remove. Other images are left out and counted.",
        FRACTION,
        PER_STAGE,
        SHARED_CACHE,
    ] = 0.5
    center_crop: Annotated[bool, "Crop images at their center instead of a random position.", PER_STAGE] = False
    random_flip: Annotated[bool, "Mirror half of the images horizontally, chosen at random.", PER_STAGE] = False
    precomputed_dir: Annotated[
        str | None,
        "Folder with the output of training/precompute_prx.py. The run reads latents and text embeddings from it "
        "instead of images and captions. Requires `center_crop`.",
        PER_STAGE,
        PATH,
    ] = None
    max_corrupt_share: Annotated[
        float, "Maximum fraction of unreadable samples. The run stops if there are more.", FRACTION
    ] = 0.01
    dataloader_num_workers: Annotated[
        int, "Number of worker processes that load data. 0 loads it in the main process.", NON_NEGATIVE
    ] = 0

    # optimization
    seed: Annotated[
        int,
        "Seed of all random numbers of the run.",
        Range("in [0, 2**32)", 0, 2**32, exclude_high=True),
        FIXED_ON_RESUME,
    ] = 42
    train_batch_size: Annotated[int, "Number of images per process and forward pass.", AT_LEAST_ONE, PER_STAGE] = 32
    gradient_accumulation_steps: Annotated[
        int,
        "Number of forward and backward passes per optimizer step. Increase it for larger batches at the same memory.",
        AT_LEAST_ONE,
        PER_STAGE,
    ] = 1
    max_train_steps: Annotated[int, "Number of optimizer steps.", AT_LEAST_ONE, PER_STAGE] = 100_000
    optimizer: Annotated[
        Literal["adamw", "muon"],
        "Optimizer. `muon` uses Muon for the matrices of the repeated layers and AdamW for all other parameters.",
        FIXED_ON_RESUME,
    ] = "adamw"
    learning_rate: Annotated[float, "Learning rate after the warm-up.", POSITIVE, PER_STAGE] = 1e-4
    adam_beta1: Annotated[float, "Decay rate of AdamW's first moment.", FRACTION_BELOW_ONE, FIXED_ON_RESUME] = 0.9
    adam_beta2: Annotated[float, "Decay rate of AdamW's second moment.", FRACTION_BELOW_ONE, FIXED_ON_RESUME] = 0.95
    adam_epsilon: Annotated[
        float, "Term that AdamW adds to the denominator of its updates.", POSITIVE, FIXED_ON_RESUME
    ] = 1e-15
    adam_weight_decay: Annotated[float, "Weight decay of AdamW.", NON_NEGATIVE, FIXED_ON_RESUME] = 0.0
    muon_momentum: Annotated[float, "Nesterov momentum of Muon.", FRACTION_BELOW_ONE, FIXED_ON_RESUME] = 0.95
    muon_adjust_lr_fn: Annotated[
        Literal["match_rms_adamw", "original"],
        "Scaling of Muon's learning rate. `match_rms_adamw` gives updates the root mean square of AdamW's; "
        "`original` multiplies by sqrt(max(1, rows / columns)).",
        FIXED_ON_RESUME,
    ] = "match_rms_adamw"
    muon_fused: Annotated[
        bool,
        "Let Muon orthogonalize a fused projection (query, key, value) as one matrix, as the study did, instead of "
        "each part separately.",
        FIXED_ON_RESUME,
    ] = False
    muon_iteration: Annotated[
        Literal["newton_schulz", "polar_express"],
        "Polynomials of Muon's orthogonalization. `newton_schulz` brings singular values to 0.68 to 1.2, as PyTorch "
        "does; `polar_express` (arXiv 2505.16932) to 0.85 to 1.12, in the same time.",
        FIXED_ON_RESUME,
    ] = "newton_schulz"
    muon_newton_schulz_dtype: Annotated[
        Literal["auto", "bf16", "fp32"],
        "Data type of Muon's orthogonalization. fp32 is more precise, and on GPUs slower. auto: as for "
        "`mixed_precision`.",
        FIXED_ON_RESUME,
    ] = "auto"
    lr_scheduler: Annotated[
        Literal["constant", "linear", "cosine"],
        "Learning rate after the warm-up: constant, or a decay to zero over the last `lr_decay_steps`.",
        PER_STAGE,
    ] = "constant"
    lr_warmup_steps: Annotated[
        int | None,
        f"Number of steps of linear warm-up; null: {WARMUP_STEPS}, or a tenth of `max_train_steps` if that is less.",
        NON_NEGATIVE,
        PER_STAGE,
    ] = None
    lr_decay_steps: Annotated[
        int | None,
        "Number of steps of the final decay, for `lr_scheduler` linear or cosine; null: all steps after the warm-up.",
        AT_LEAST_ONE,
        PER_STAGE,
    ] = None
    max_grad_norm: Annotated[float, "Norm that gradients are clipped to.", POSITIVE, PER_STAGE] = 0.2
    caption_dropout: Annotated[
        float,
        "Fraction of captions that are replaced by the empty one, so that the model supports classifier-free "
        "guidance.",
        FRACTION,
        PER_STAGE,
    ] = 0.1
    timestep_sampling: Annotated[
        Literal["logit_normal", "uniform"],
        "Distribution of training timesteps before the shift. Timesteps are clamped to [0.001, 1).",
        PER_STAGE,
    ] = "logit_normal"
    uniform_fraction: Annotated[
        float,
        "With `timestep_sampling` logit_normal, fraction of timesteps drawn uniformly from [0.001, 1) without the "
        "shift.",
        FRACTION,
        PER_STAGE,
    ] = DEFAULT_UNIFORM_FRACTION
    shift: Annotated[
        float,
        "Timestep shift s in s t / (1 + (s - 1) t), for training and for the saved scheduler. Larger values spend "
        "more steps at high noise, which high resolutions need.",
        POSITIVE,
        PER_STAGE,
    ] = 1.0
    shift_base_resolution: Annotated[
        int | None,
        "Resolution in pixels that `shift` refers to. The shift grows in proportion to `resolution` (Stable Diffusion "
        "3, arXiv 2403.03206); null: `shift` is used unchanged.",
        AT_LEAST_ONE,
        PER_STAGE,
    ] = None
    use_ema: Annotated[
        bool,
        "Keep an exponential moving average (EMA) of the weights and save it as the final model.",
        FIXED_ON_RESUME,
    ] = False
    ema_decay: Annotated[
        float,
        "Decay of the moving average per optimizer step. Use a higher value for longer runs.",
        FRACTION_BELOW_ONE,
        FIXED_ON_RESUME,
    ] = 0.999
    ema_warmup: Annotated[
        bool,
        "Increase the decay with the n-th update as (1 + n) / (10 + n), up to `ema_decay`; 0.999 is reached after "
        "8,990 updates. Without it, as in the study, a third of the average is still the initial weights after 1,000 "
        "updates with a decay of 0.999.",
        FIXED_ON_RESUME,
    ] = True
    ema_update_every: Annotated[int, "Number of steps between two updates of the moving average.", AT_LEAST_ONE] = 10
    mixed_precision: Annotated[
        Literal["auto", "no", "bf16"],
        "Data type of the computation (autocast); no: float32. auto: bf16, but float32 on a CPU without AVX512, which "
        "takes up to 50 times as long in bf16. Weights have `weights_dtype`.",
    ] = "auto"
    weights_dtype: Annotated[
        Literal["float32", "bf16"],
        "Data type that stores the transformer's weights. bf16 loses small updates: it reproduces a negative result "
        "of the study (FID 21.87 instead of 18.20).",
        FIXED_ON_RESUME,
    ] = "float32"
    gradient_checkpointing: Annotated[
        bool, "Recompute activations in the backward pass. It saves memory and costs about a third more computation."
    ] = False
    activation_budget: Annotated[
        float,
        "Fraction of the blocks that keep their activations despite `gradient_checkpointing`. Increase it while "
        "memory lasts.",
        FRACTION_BELOW_ONE,
    ] = 0.0
    attention_backend: Annotated[
        str | None,
        "Attention backend of diffusers for the transformer, for example `flash` or `_native_math`; null: diffusers' "
        "default.",
    ] = None
    compile: Annotated[bool, "Compile the transformer's blocks with torch.compile."] = False

    # distribution over several processes
    sharding: Annotated[
        Literal["none", "full", "hybrid"],
        "Sharding of weights, gradients, optimizer state and average (FSDP2). `full` shards over all processes, "
        "`hybrid` within groups of processes; none: every process holds a copy (DDP).",
    ] = "none"
    sharding_size: Annotated[
        int | None,
        "Number of processes per group with `sharding` hybrid; null: the processes of one machine.",
        AT_LEAST_ONE,
    ] = None

    # the techniques of the study, all off by default
    route_ratio: Annotated[
        float,
        "Fraction of image tokens that skip the blocks of `route_range` during training (TREAD, arXiv 2501.04765; "
        "with `fusion_range` in `transformer_config`: SPRINT, arXiv 2510.21986). 0: no routing.",
        FRACTION_BELOW_ONE,
        PER_STAGE,
    ] = 0.0
    route_range: Annotated[list, "Half-open range [start, stop) of the blocks that routed tokens skip.", PER_STAGE] = (
        field(default_factory=lambda: [2, 13])
    )
    contrastive_weight: Annotated[
        float,
        "Weight of the contrastive flow-matching loss (arXiv 2506.05350), computed within each forward pass. The "
        "study uses 0.05.",
        NON_NEGATIVE,
        PER_STAGE,
    ] = 0.0
    repa_weight: Annotated[
        float,
        "Weight of the alignment with a vision teacher (REPA, arXiv 2410.06940). The study uses 0.5.",
        NON_NEGATIVE,
        PER_STAGE,
    ] = 0.0
    repa_teacher: Annotated[
        str | None,
        "Vision model (folder or Hub id) to align with, for example facebook/dinov2-with-registers-large.",
        PER_STAGE,
        PATH,
    ] = None
    repa_block: Annotated[int, "Index, from 0, of the block whose output is aligned.", NON_NEGATIVE, PER_STAGE] = 7
    repa_projector: Annotated[
        Literal["mlp", "conv", "attention"],
        "Network that maps the block's features to the teacher's: three linear layers, one 3x3 convolution (iREPA), "
        "or attention with rotary positions.",
        PER_STAGE,
    ] = "mlp"
    repa_projector_size: Annotated[
        int | None,
        "Hidden width of the mlp projector (REPA: 2048); null: width of the transformer.",
        AT_LEAST_ONE,
        PER_STAGE,
    ] = None
    repa_spatial_gamma: Annotated[
        float | None,
        "Strength of iREPA's spatial normalization of the teacher's features (arXiv 2512.10794), for example 0.8; "
        "null: no normalization.",
        FRACTION,
        PER_STAGE,
    ] = None
    repa_until_step: Annotated[
        int | None, "Step at which the alignment ends (the study: 200,000); null: never.", AT_LEAST_ONE, PER_STAGE
    ] = None
    repa_check_steps: Annotated[
        int | None,
        "Number of steps between two measurements of the cosine between the gradients of the alignment loss and the "
        "flow-matching loss at the aligned block. The alignment ends when the mean of `repa_check_window` cosines is "
        "negative; null: no measurements.",
        AT_LEAST_ONE,
        PER_STAGE,
    ] = None
    repa_check_window: Annotated[
        int, "Number of measured cosines that are averaged to end the alignment.", AT_LEAST_ONE, PER_STAGE
    ] = 20
    repa_cache_dir: Annotated[
        str | None,
        "Folder for the teacher's features of every image and crop. They are computed once and read afterwards.",
        PER_STAGE,
        RUNTIME,
        PATH,
    ] = None
    lpips_weight: Annotated[
        float,
        "Weight of the LPIPS loss with VGG-16 (arXiv 1801.03924). The study uses 0.1, in pixel space.",
        NON_NEGATIVE,
        PER_STAGE,
    ] = 0.0
    lpips_backbone: Annotated[
        str | None,
        "File with torchvision's VGG-16 weights (vgg16-397923af.pth); null: torchvision's download cache.",
        PER_STAGE,
        PATH,
    ] = None
    lpips_scale: Annotated[
        float, "Factor that images are resized by before LPIPS.", FRACTION_ABOVE_ZERO, PER_STAGE
    ] = 0.5
    dino_weight: Annotated[
        float,
        "Weight of the cosine distance between patch features of a vision model. The study uses 0.01, in pixel space.",
        NON_NEGATIVE,
        PER_STAGE,
    ] = 0.0
    dino_teacher: Annotated[
        str | None,
        "Vision model (folder or Hub id) for `dino_weight`, for example facebook/dinov2-with-registers-base.",
        PER_STAGE,
        PATH,
    ] = None
    dino_size: Annotated[
        int, "Height and width in pixels of the images that `dino_teacher` sees.", AT_LEAST_ONE, PER_STAGE
    ] = 224
    dino_crop: Annotated[
        bool, "Show `dino_teacher` a random crop of `dino_size` pixels instead of the resized image.", PER_STAGE
    ] = False
    perceptual_max_timestep: Annotated[
        float,
        "Highest timestep at which the LPIPS and DINO losses count. Lower it to ignore very noisy samples.",
        FRACTION_ABOVE_ZERO,
        PER_STAGE,
    ] = 1.0
    perceptual_decode_latents: Annotated[
        bool,
        "In latent space, decode the predicted latents for the LPIPS and DINO losses, with gradients through the "
        "decoder.",
        PER_STAGE,
    ] = False

    # post-training: distillation and preferences
    objective: Annotated[
        Literal["flow", "guidance_distillation", "mean_velocity", "ladd", "dpo", "nft"],
        "What a step trains. flow: flow matching. guidance_distillation: one "
        "evaluation predicts what the teacher predicts with guidance (arXiv 2210.03142). mean_velocity: each of "
        "`distill_steps` evaluations covers several steps of the guided teacher. ladd: adversarial distillation "
        "(arXiv 2403.12015). dpo: prefer one image of a pair (Flow-DPO, arXiv 2501.13918). nft: draw images and learn "
        "from their scores (DiffusionNFT, arXiv 2509.16117). The teacher or reference "
        "is the model that the run starts from; later stages take the weights that the stage before has trained.",
        PER_STAGE,
    ] = "flow"
    distill_guidance_scale: Annotated[
        float,
        "Guidance scale of the teacher in distillation; the student draws without guidance.",
        AT_LEAST_ONE,
        PER_STAGE,
    ] = 4.0
    distill_guidance_max: Annotated[
        float | None,
        "With `guidance_distillation`, draw the teacher's scale for each sample from 1 to this, and make it an input "
        "of the student (`guidance_embeds` of the transformer), whose `guidance_scale` can then be chosen when it "
        "draws. null: `distill_guidance_scale` for all.",
        AT_LEAST_ONE,
    ] = None
    distill_steps: Annotated[
        int,
        "Number of evaluations that the student of `mean_velocity` or `ladd` draws with. It learns the noise levels "
        "of the scheduler's grid of that length.",
        AT_LEAST_ONE,
        PER_STAGE,
    ] = 4
    distill_teacher_steps: Annotated[
        int,
        "Number of steps from noise to image in which the teacher of `mean_velocity` draws: a multiple of "
        "`distill_steps`.",
        AT_LEAST_ONE,
        PER_STAGE,
    ] = 28
    ladd_blocks: Annotated[
        list,
        "Indices, from 0, of the teacher's blocks whose features the discriminator of `ladd` sees; empty: four at "
        "equal distances.",
        PER_STAGE,
    ] = field(default_factory=list)
    ladd_noise_mean: Annotated[
        float,
        "Mean of the logit-normal noise levels at which the discriminator of `ladd` compares images (its paper: 1). "
        "Higher values judge the composition, lower ones the details.",
        Range("from -10 to 10", -10, 10),
        PER_STAGE,
    ] = 1.0
    ladd_noise_std: Annotated[float, "Standard deviation of these levels before the sigmoid.", POSITIVE, PER_STAGE] = (
        1.0
    )
    dpo_beta: Annotated[
        float,
        "Strength of `dpo`: factor of the difference between the model's and the reference's errors, mean over all "
        "values of an image. Higher values keep the model closer to the reference.",
        POSITIVE,
        PER_STAGE,
    ] = 2000.0
    reward_scorers: Annotated[
        dict,
        "Scorers of the images that `nft` draws, with their weights: {scenes: 1.0, clip=NAME: 0.5, emoji=NETWORK: "
        "1.0, module:function: 2.0}. See `evaluation.scorers.load_scorer`.",
        PER_STAGE,
    ] = field(default_factory=dict)
    reward_images_per_prompt: Annotated[
        int, "Number of images that `nft` draws of each caption and compares with each other.", AT_LEAST_TWO, PER_STAGE
    ] = 8
    reward_steps: Annotated[int, "Number of Euler steps in which `nft` draws.", AT_LEAST_ONE, PER_STAGE] = 12
    reward_guidance_scale: Annotated[
        float, "Guidance scale with which `nft` draws; 1 is off and takes half the time.", AT_LEAST_ONE, PER_STAGE
    ] = 1.0
    reward_kl_weight: Annotated[
        float,
        "Weight of the squared difference between the velocities of model and reference in `nft`. Higher values keep "
        "the model closer to the reference; 0 needs no reference.",
        NON_NEGATIVE,
        PER_STAGE,
    ] = 0.0

    # validation
    validation_steps: Annotated[
        int, "Number of steps between two validations. The last step is always validated.", AT_LEAST_ONE
    ] = 1000
    num_validation_samples: Annotated[
        int, "Number of images held out of training for the validation loss. 0: no validation loss.", NON_NEGATIVE
    ] = 0
    validation_prompts: Annotated[list, "Prompts that are drawn at each validation."] = field(default_factory=list)
    validation_guidance_scale: Annotated[
        float, "Guidance scale of the validation images. 1: no guidance.", AT_LEAST_ONE
    ] = 4.0
    validation_inference_steps: Annotated[int, "Number of sampling steps of the validation images.", AT_LEAST_ONE] = 28
    validation_metrics: Annotated[
        list,
        "Metrics of training/evaluate_prx.py that are measured during training: `scenes`, `emoji:NETWORK`, and `fid`, "
        "`cmmd`, `dino_mmd`, `clip_score`, `fid:ENCODER` or `mmd:ENCODER` against the held-out images.",
    ] = field(default_factory=list)
    validation_metrics_steps: Annotated[
        int | None,
        "Number of steps between two measurements, a multiple of `validation_steps`; null: at every validation. The "
        "last step is always measured.",
        AT_LEAST_ONE,
    ] = None
    validation_metrics_samples: Annotated[
        int,
        "Number of images that are drawn for each group of prompts of `validation_metrics`.",
        AT_LEAST_TWO,
    ] = 256

    # the run
    dry_run: Annotated[bool, "Print the plan of the run and stop before weights are loaded.", RUNTIME] = False
    stages: Annotated[
        list,
        "Stages of the run, in order: a list of mappings with the settings that each stage changes, for example "
        "`resolution`, data, batch size or learning rate. `max_train_steps` of a stage counts its own steps.",
    ] = field(default_factory=list)
    output_dir: Annotated[str, "Folder for checkpoints, logs and the final pipeline.", RUNTIME, PATH] = "outputs/prx"
    checkpointing_steps: Annotated[int, "Number of steps between two checkpoints.", AT_LEAST_ONE, RUNTIME] = 1000
    checkpoints_total_limit: Annotated[
        int | None, "Number of checkpoints to keep; null: all.", AT_LEAST_ONE, RUNTIME
    ] = None
    resume_from_checkpoint: Annotated[
        str | None,
        "Checkpoint folder to resume from, or `latest`: the newest one in `output_dir`, or step 0 if there is none.",
        RUNTIME,
        PATH,
    ] = None
    non_finite: Annotated[
        Literal["stop", "skip"],
        "Reaction to a loss or gradient that is NaN or infinite: stop the run, or skip the step. Both record the "
        "samples of the step.",
    ] = "stop"
    step_timeout_seconds: Annotated[
        int,
        "Maximum duration of a step or validation, in seconds. When it is exceeded, all processes print their stack "
        "traces and the run ends.",
        AT_LEAST_ONE,
        RUNTIME,
    ] = 1800
    report_to: Annotated[Literal["tensorboard", "wandb", "trackio", "none"], "Experiment tracker.", RUNTIME] = (
        "tensorboard"
    )
    logging_steps: Annotated[int, "Number of steps between two log entries.", AT_LEAST_ONE, RUNTIME] = 10
    push_to_hub: Annotated[
        bool, "Upload the final pipeline to the Hub. The token's write access is checked at the start.", RUNTIME
    ] = False
    hub_model_id: Annotated[
        str | None,
        "Repository to upload to, as name or namespace/name; null: the last part of `output_dir`.",
        RUNTIME,
    ] = None

    @property
    def repo_id(self) -> str:
        """Repository to upload to; without a namespace, it belongs to the token's account."""
        return self.hub_model_id or Path(self.output_dir).resolve().name

    @property
    def warmup_steps(self) -> int:
        """Number of warm-up steps, with the default for this length resolved."""
        return resolve_warmup_steps(self.lr_warmup_steps, self.lr_decay_steps, self.max_train_steps)

    @property
    def needs_reference(self) -> bool:
        """True if the step compares with the frozen model that the run or the stage starts from."""
        return self.objective != "flow" and (self.objective != "nft" or self.reward_kl_weight > 0)

    @property
    def student_steps(self) -> int | None:
        """Number of steps in which the distilled network draws; None for a network that any number suits."""
        return self.distill_steps if self.objective in ("mean_velocity", "ladd") else None

    @property
    def draws_without_guidance(self) -> bool:
        """True if the network is distilled, so that it draws without guidance."""
        guided = self.objective == "guidance_distillation" and self.distill_guidance_max is None
        return guided or self.student_steps is not None

    def changes(self, name: str) -> bool:
        """True if a setting differs from its default."""
        field = type(self).__dataclass_fields__[name]
        default = field.default if field.default_factory is MISSING else field.default_factory()
        return bool(getattr(self, name) != default)

    @property
    def timestep_shift(self) -> float:
        """Timestep shift at this resolution: it grows with the square root of the token count (arXiv 2403.03206)."""
        return self.shift * (1 if self.shift_base_resolution is None else self.resolution / self.shift_base_resolution)

    @property
    def has_perceptual_loss(self) -> bool:
        """True if the LPIPS or the DINO loss is on."""
        return bool(self.lpips_weight or self.dino_weight)

    @property
    def has_default_lora_layers(self) -> bool:
        """True if `lora_layers` is unchanged."""
        return self.lora_layers == list(LORA_LAYERS)

    @property
    def has_default_uniform_fraction(self) -> bool:
        """True if `uniform_fraction` is unchanged or 0."""
        return self.uniform_fraction in (0.0, DEFAULT_UNIFORM_FRACTION)

    @property
    def trains_bf16_weights(self) -> bool:
        """True if trainable weights are stored in bf16; an adapter of bf16 weights is float32."""
        return self.weights_dtype == "bf16" and self.lora_rank is None

    @property
    def precomputed_folder(self) -> Path:
        """Folder of the precomputed data of this stage: `precomputed_dir` has one per resolution."""
        return Path(str(self.precomputed_dir)) / str(self.resolution)

    def exceeds_corrupt_share(self, unreadable: int, total: int) -> bool:
        """True if more samples are unreadable than `max_corrupt_share` allows."""
        return unreadable > self.max_corrupt_share * max(total, MIN_SAMPLES_FOR_CORRUPT_SHARE)

    def check_perceptual_size(self, side: int) -> None:
        """Validate that images are large enough for the perceptual losses.

        Args:
            side: shorter side of the images in pixels.

        Raises:
            ValueError: the image for LPIPS is below 16 pixels, or the crop for DINO is larger than the image.
        """
        if self.lpips_weight and round(side * self.lpips_scale) < 16:
            raise ValueError(
                f"`lpips_scale` is {self.lpips_scale}, but LPIPS needs at least 16 pixels and the shorter side has "
                f"{side} before scaling: increase `lpips_scale` or `resolution`."
            )
        if self.dino_weight and self.dino_crop and self.dino_size > side:
            raise ValueError(
                f"`dino_crop` takes {self.dino_size} pixels (`dino_size`) from images whose shorter side has {side}: "
                "decrease `dino_size`, or remove `dino_crop`."
            )


def resolve_warmup_steps(lr_warmup_steps: int | None, lr_decay_steps: int | None, max_train_steps: int) -> int:
    """Return the number of warm-up steps: the given one, or the default for a run of this length."""
    if lr_warmup_steps is not None:
        return lr_warmup_steps
    return max(0, min(WARMUP_STEPS, max_train_steps // 10, max_train_steps - (lr_decay_steps or 0)))
