"""Validation of combinations of settings, before anything is loaded."""

from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..files import expand_path
from .data_sources import DataSource, check_entry, data_sources_of, is_weight
from .settings import TrainingSettings


def check_combinations(cfg: TrainingSettings) -> None:
    """Validate all settings of a run, or of one of its stages, against each other.

    Raises:
        ValueError: settings exclude each other, or one lacks another.
    """
    check_adapter(cfg)
    check_data(cfg)
    check_model(cfg)
    if cfg.precomputed_dir is not None:
        check_precomputed(cfg)
    check_optimization(cfg)
    check_techniques(cfg)
    check_objective(cfg)
    check_validation_metrics(cfg)
    check_upload(cfg)


def check_model(cfg: TrainingSettings) -> None:
    """Validate the origin of each network."""
    if cfg.pretrained_model_name_or_path is None:
        if cfg.revision is not None:
            raise ValueError(f"`revision` is {cfg.revision!r}, but `pretrained_model_name_or_path` is not set.")
        if not cfg.transformer_config:
            raise ValueError("Pass `pretrained_model_name_or_path`, or `transformer_config` for a new transformer.")
        if not cfg.text_encoder_config and cfg.text_encoder_name_or_path is None:
            raise ValueError("Pass `text_encoder_name_or_path`, or `text_encoder_config` for a new text encoder.")
    elif cfg.revision is not None and Path(cfg.pretrained_model_name_or_path).is_dir():
        raise ValueError(
            f"`revision` is {cfg.revision!r}, but `pretrained_model_name_or_path` is a folder: only Hub repositories "
            "have revisions. Remove `revision`."
        )
    if cfg.text_encoder_config and cfg.text_encoder_name_or_path is not None:
        raise ValueError("Pass either `text_encoder_config` (a new one) or `text_encoder_name_or_path`, not both.")
    if cfg.text_encoder_config and not cfg.train_text_encoder:
        raise ValueError("`text_encoder_config` makes an untrained text encoder: set `train_text_encoder`.")


def check_adapter(cfg: TrainingSettings) -> None:
    """Validate the settings of a LoRA adapter, and the settings that an adapter rules out."""
    if cfg.lora_rank is None:
        unused: dict[str, object] = {
            "lora_alpha": cfg.lora_alpha,
            "lora_dropout": cfg.lora_dropout,
            "use_dora": cfg.use_dora,
        }
        if not cfg.has_default_lora_layers:
            unused["lora_layers"] = cfg.lora_layers
        for name, value in unused.items():
            if value:
                raise ValueError(f"`{name}` is {value}, but `lora_rank` is not set: pass a rank, or remove it.")
        return
    if not cfg.lora_layers or not all(isinstance(name, str) and name for name in cfg.lora_layers):
        raise ValueError(f"`lora_layers` must be a list of layer names, got {cfg.lora_layers}.")
    if cfg.pretrained_model_name_or_path is None:
        raise ValueError(
            f"`lora_rank` is {cfg.lora_rank}, but an adapter needs a trained pipeline: pass "
            "`pretrained_model_name_or_path`."
        )
    for name in ("transformer_config", "vae_name_or_path", "text_encoder_name_or_path", "train_text_encoder"):
        if getattr(cfg, name):
            raise ValueError(
                f"`{name}` is {getattr(cfg, name)}, but an adapter (`lora_rank`) is loaded into the unchanged "
                "pretrained pipeline: remove it."
            )
    if cfg.optimizer == "muon":
        raise ValueError(
            "`optimizer` is muon, which orthogonalizes updates of whole weights; an adapter (`lora_rank`) has only "
            "their factors: pass `--optimizer adamw`."
        )


def check_data(cfg: TrainingSettings) -> None:
    """Validate the data sources and how they are read."""
    given = [bool(cfg.data_sources), cfg.dataset_name is not None, cfg.train_data_dir is not None]
    if sum(given) != 1:
        raise ValueError(
            f"`dataset_name` is {cfg.dataset_name!r}, `train_data_dir` is {cfg.train_data_dir!r} and `data_sources` "
            f"is {cfg.data_sources}: pass exactly one of the three. Built-in data: `--dataset_name scenes`."
        )
    for entry in cfg.data_sources:
        check_entry(entry, bool(cfg.caption_weights))
    sources = data_sources_of(cfg)
    drawn_source = next((source.name for source in sources if source.is_drawn), None)
    weights = [source.weight for source in sources]
    is_weighted = any(weight is not None for weight in weights)
    if cfg.dataset_config_name is not None and (drawn_source or cfg.dataset_name is None):
        raise ValueError(
            f"`dataset_config_name` is {cfg.dataset_config_name!r}, but only `dataset_name` with a Hub data set has "
            "configurations: remove it, or set `config_name` of an entry of `data_sources`."
        )
    if is_weighted and None in weights:
        raise ValueError(
            f"`data_sources` have the weights {weights}: give every source a `weight`, or none to read each sample "
            "equally often."
        )
    if len(sources) > 1 and not is_weighted and (drawn_source or cfg.streaming):
        raise ValueError(
            "`data_sources` without an end (scenes, or any source with `streaming`) need a `weight` each."
        )
    for column, weight in cfg.caption_weights.items():
        if not is_weight(weight):
            raise ValueError(f"`caption_weights` must be positive and finite, got {weight!r} for {column}.")
    check_instance_prompts(cfg, sources)
    for name, is_used in (("weight", is_weighted and len(sources) > 1), ("streaming", cfg.streaming)):
        if is_used and cfg.aspect_ratio_buckets != "none":
            raise ValueError(
                f"`aspect_ratio_buckets` is {cfg.aspect_ratio_buckets}, which needs the sizes of all images: remove "
                f"it or `{name}`."
            )
        if is_used and cfg.precomputed_dir is not None:
            raise ValueError(f"`precomputed_dir` needs data with an end: remove it or `{name}`.")
    if drawn_source:
        for name in ("streaming", "random_flip"):
            if getattr(cfg, name):
                raise ValueError(
                    f"`{name}` is True, but {drawn_source} is not stored, and its captions name left and right: "
                    "remove it."
                )
        if cfg.aspect_ratio_buckets != "none":
            raise ValueError(
                f"`aspect_ratio_buckets` is {cfg.aspect_ratio_buckets}, but {drawn_source} is square: remove it."
            )
    if cfg.emoji_dir is None and any(source.name == "emoji_scenes" for source in sources):
        raise ValueError(
            "`emoji_dir` is not set, but emoji_scenes needs it: pass `--emoji_dir` with the folder that "
            "training/tools/fetch_emoji.py has written."
        )


def check_instance_prompts(cfg: TrainingSettings, sources: list[DataSource]) -> None:
    """Validate the captions that replace those of the data."""
    if cfg.instance_prompt is not None and all(source.is_drawn for source in sources):
        raise ValueError(
            f"`instance_prompt` is {cfg.instance_prompt!r}, but {sources[0].name} has its own captions: remove it."
        )
    with_prompt = [source for source in sources if source.instance_prompt is not None]
    for name in ("caption_weights", "streaming"):
        if with_prompt and getattr(cfg, name):
            raise ValueError(
                f"`instance_prompt` is {with_prompt[0].instance_prompt!r}, which needs indexed data with one caption "
                f"per image: remove `{name}`."
            )
    output_dir = Path(expand_path(cfg.output_dir)).resolve()
    for source in with_prompt:
        if not str(source.instance_prompt).strip():
            raise ValueError(f"`instance_prompt` must not be empty, got {source.instance_prompt!r}.")
        if Path(expand_path(source.name)).resolve() in (output_dir, *output_dir.parents):
            raise ValueError(
                f"`output_dir` is {cfg.output_dir}, inside the data folder {source.name}: with `instance_prompt`, the "
                "run would train on its own validation images. Pass another `--output_dir`."
            )


def check_precomputed(cfg: TrainingSettings) -> None:
    """Validate that the data can be read from a cache."""
    drawn_sources = [source.name for source in data_sources_of(cfg) if source.is_drawn]
    if drawn_sources and cfg.scenes_size is None:
        raise ValueError(
            f"`precomputed_dir` is {cfg.precomputed_dir!r}, but {drawn_sources[0]} has no end: pass `--scenes_size`."
        )
    if cfg.train_text_encoder:
        raise ValueError(
            "`precomputed_dir` holds the output of a frozen text encoder: remove it or `train_text_encoder`."
        )
    if not cfg.center_crop or cfg.random_flip:
        raise ValueError(
            f"`precomputed_dir` holds one crop of each image, but `center_crop` is {cfg.center_crop} and "
            f"`random_flip` is {cfg.random_flip}: pass `--center_crop` and remove `random_flip`."
        )
    if cfg.repa_cache_dir is not None:
        raise ValueError("`precomputed_dir` already holds the teacher's features: remove `repa_cache_dir`.")


def check_optimization(cfg: TrainingSettings) -> None:
    """Validate schedules, precision, memory and sharding."""
    if cfg.timestep_sampling == "uniform" and not cfg.has_default_uniform_fraction:
        raise ValueError(
            f"`uniform_fraction` is {cfg.uniform_fraction}, which applies to logit_normal timesteps, but "
            "`timestep_sampling` is uniform: remove one of them."
        )
    if cfg.lr_scheduler == "constant" and cfg.lr_decay_steps is not None:
        raise ValueError("`lr_decay_steps` needs `lr_scheduler` linear or cosine; it is constant.")
    decay = cfg.lr_decay_steps or 0
    if cfg.warmup_steps + decay > cfg.max_train_steps:
        raise ValueError(
            f"`lr_warmup_steps` ({cfg.warmup_steps}) and `lr_decay_steps` ({decay}) together must be at most "
            f"`max_train_steps` ({cfg.max_train_steps})."
        )
    if cfg.weights_dtype == "bf16" and cfg.mixed_precision == "no":
        raise ValueError("`weights_dtype` bf16 needs `mixed_precision` bf16 or auto.")
    if cfg.activation_budget and not cfg.gradient_checkpointing:
        raise ValueError(
            f"`activation_budget` is {cfg.activation_budget}, but `gradient_checkpointing` is off, so all activations "
            "are kept: remove it, or pass `--gradient_checkpointing`."
        )
    if cfg.use_ema and cfg.ema_update_every > cfg.max_train_steps:
        raise ValueError(
            f"`ema_update_every` ({cfg.ema_update_every}) must be at most `max_train_steps` ({cfg.max_train_steps}): "
            "otherwise the average stays at the initial weights."
        )
    if cfg.sharding_size is not None and cfg.sharding != "hybrid":
        raise ValueError(f"`sharding_size` is {cfg.sharding_size}, but `sharding` is {cfg.sharding}, not hybrid.")
    if cfg.sharding != "none" and cfg.repa_check_steps is not None:
        raise ValueError(
            f"`repa_check_steps` compares gradients of whole weights, which `sharding` {cfg.sharding} does not keep: "
            "end the alignment with `repa_until_step` instead."
        )


def check_techniques(cfg: TrainingSettings) -> None:
    """Validate the settings of the study's techniques that need no network."""
    if (
        len(cfg.route_range) != 2
        or not all(isinstance(block, int) for block in cfg.route_range)
        or not 0 <= cfg.route_range[0] < cfg.route_range[1]
    ):
        raise ValueError(f"`route_range` must be a half-open range [start, stop) of blocks, got {cfg.route_range}.")
    if cfg.contrastive_weight and cfg.train_batch_size < 2:
        raise ValueError(
            f"`contrastive_weight` pairs samples: `train_batch_size` must be at least 2, got {cfg.train_batch_size}."
        )
    for weight, teacher in (("repa_weight", "repa_teacher"), ("dino_weight", "dino_teacher")):
        if bool(getattr(cfg, weight)) != (getattr(cfg, teacher) is not None):
            raise ValueError(
                f"`{weight}` is {getattr(cfg, weight)} and `{teacher}` is {getattr(cfg, teacher)}: set both or "
                "neither."
            )
    for name in ("repa_spatial_gamma", "repa_until_step", "repa_check_steps", "repa_cache_dir"):
        if getattr(cfg, name) is not None and not cfg.repa_weight:
            raise ValueError(f"`{name}` is {getattr(cfg, name)}, but `repa_weight` is 0: set both or neither.")
    if cfg.lpips_backbone is not None and not cfg.lpips_weight:
        raise ValueError(f"`lpips_backbone` is {cfg.lpips_backbone}, but `lpips_weight` is 0: set both or neither.")
    if cfg.repa_weight and cfg.repa_projector == "conv" and cfg.route_ratio:
        raise ValueError(
            f"`repa_projector` is conv, which needs all tokens, but `route_ratio` is {cfg.route_ratio}: pass "
            "`--repa_projector mlp` or attention, or remove `route_ratio`."
        )
    cfg.check_perceptual_size(cfg.resolution)
    if cfg.perceptual_decode_latents and not cfg.has_perceptual_loss:
        raise ValueError("`perceptual_decode_latents` is set, but `lpips_weight` and `dino_weight` are 0.")


def check_objective(cfg: TrainingSettings) -> None:
    """Validate the settings of post-training."""
    used = {
        "guidance_distillation": ("distill_guidance_scale", "distill_guidance_max"),
        "mean_velocity": ("distill_guidance_scale", "distill_steps", "distill_teacher_steps"),
        "ladd": ("distill_steps", "ladd_blocks", "ladd_noise_mean", "ladd_noise_std"),
        "dpo": ("dpo_beta", "rejected_image_column"),
        "nft": (
            "reward_scorers",
            "reward_images_per_prompt",
            "reward_steps",
            "reward_guidance_scale",
            "reward_kl_weight",
        ),
    }
    for name in dict.fromkeys(name for names in used.values() for name in names):
        takers = [objective for objective, names in used.items() if name in names]
        if cfg.changes(name) and not cfg.stages and cfg.objective not in takers:
            raise ValueError(
                f"`{name}` is {getattr(cfg, name)}, but `objective` is {cfg.objective}: it belongs to "
                f"{' and '.join(takers)}."
            )
    if cfg.objective == "flow":
        return
    for name in ("route_ratio", "contrastive_weight", "repa_weight", "lpips_weight", "dino_weight", "caption_dropout"):
        if getattr(cfg, name) and (name != "caption_dropout" or cfg.changes(name)):
            raise ValueError(
                f"`{name}` is {getattr(cfg, name)}, which belongs to the flow-matching step, but `objective` is "
                f"{cfg.objective}: set it to 0."
            )
    if cfg.train_text_encoder:
        raise ValueError(
            f"`train_text_encoder` is set, but the teacher of `objective` {cfg.objective} needs it "
            "unchanged: remove it."
        )
    if cfg.objective in ("mean_velocity", "ladd", "nft") and cfg.num_validation_samples:
        raise ValueError(
            f"`num_validation_samples` is {cfg.num_validation_samples}, but the validation loss is that of flow "
            f"matching, which `objective` {cfg.objective} does not train: set it to 0 and use `validation_prompts`, "
            "or `validation_metrics` that need no held-out images."
        )
    if cfg.objective == "nft":
        check_rewards(cfg)
    if cfg.distill_guidance_max is not None:
        for name in ("lora_rank", "num_validation_samples"):
            if getattr(cfg, name):
                raise ValueError(
                    f"`{name}` is {getattr(cfg, name)}, but with `distill_guidance_max` the transformer has a new "
                    "input: remove one of them."
                )
        if cfg.changes("distill_guidance_scale"):
            raise ValueError("Both `distill_guidance_scale` and `distill_guidance_max` are given: pass one of them.")
    if cfg.objective == "dpo":
        if cfg.rejected_image_column is None:
            raise ValueError("`objective` is dpo, which needs pairs of images: pass `rejected_image_column`.")
        for name in ("streaming", "precomputed_dir"):
            if getattr(cfg, name):
                raise ValueError(
                    f"`{name}` is {getattr(cfg, name)}, which has no pairs of images for `objective` dpo."
                )
        if drawn := [source.name for source in data_sources_of(cfg) if source.is_drawn]:
            raise ValueError(f"`dataset_name` is {drawn[0]}, which has no pairs of images for `objective` dpo.")
    if cfg.objective == "mean_velocity" and cfg.distill_teacher_steps % cfg.distill_steps:
        raise ValueError(
            f"`distill_teacher_steps` must be a multiple of `distill_steps` ({cfg.distill_steps}), got "
            f"{cfg.distill_teacher_steps}."
        )
    if cfg.objective == "ladd" and cfg.lora_rank is not None and cfg.gradient_checkpointing:
        raise ValueError(
            "`gradient_checkpointing` computes blocks a second time, then with the adapter (`lora_rank`) that the "
            "teacher of `ladd` is without: remove one of them."
        )


def check_rewards(cfg: TrainingSettings) -> None:
    """Validate the settings of rewards."""
    if not cfg.reward_scorers:
        raise ValueError("`objective` is nft, which needs scores: pass `reward_scorers`, for example {scenes: 1.0}.")
    for name, weight in cfg.reward_scorers.items():
        if not is_weight(weight):
            raise ValueError(f"`reward_scorers` has the weight {weight!r} for {name}: it must be positive and finite.")
    if cfg.precomputed_dir:
        raise ValueError(
            f"`precomputed_dir` is {cfg.precomputed_dir}, but `objective` nft draws its images itself: remove it."
        )
    if any(name.startswith("emoji=") for name in cfg.reward_scorers):
        sources = data_sources_of(cfg)
        columns = [*(cfg.caption_weights or (source.caption_column for source in sources))]
        has_drawings = not any(source.is_drawn for source in sources) and set(columns) <= {"text", "long"}
        if cfg.emoji_dir is None or not has_drawings:
            raise ValueError(
                f"`reward_scorers` has emoji=NETWORK; `emoji_dir` is {cfg.emoji_dir!r}, the data are "
                f"{[source.name for source in sources]} and the captions {columns}. Pass `--emoji_dir` with the "
                "folder that training/tools/fetch_emoji.py has written, its drawings as data, and captions that name "
                "the drawing and its style: text or long."
            )
    if "scenes" in cfg.reward_scorers:
        others = [source.name for source in data_sources_of(cfg) if source.name != "scenes"]
        if others or cfg.caption_weights or cfg.scenes_caption != "long":
            raise ValueError(
                "`reward_scorers` has scenes, which compares with whole scenes: it needs `dataset_name` scenes with "
                "the `scenes_caption` long, and no `caption_weights`."
            )


def check_validation_metrics(cfg: TrainingSettings) -> None:
    """Validate that the data allow the metrics that are measured during training."""
    if not cfg.validation_metrics:
        return
    every = cfg.validation_metrics_steps or cfg.validation_steps
    if every % cfg.validation_steps:
        raise ValueError(
            f"`validation_metrics_steps` must be a multiple of `validation_steps` ({cfg.validation_steps}), got "
            f"{cfg.validation_metrics_steps}."
        )
    sources = [source.name for source in data_sources_of(cfg)]
    for name in cfg.validation_metrics:
        if not isinstance(name, str):
            raise ValueError(f"`validation_metrics` must be a list of names, got {cfg.validation_metrics}.")
        kind, _, encoder = name.partition(":")
        if kind == "scenes":
            if encoder or "scenes" not in sources:
                raise ValueError(
                    f"`validation_metrics` has {name!r}; `scenes` grades the built-in scenes, but the data are "
                    f"{sources}: pass `--dataset_name scenes`, or another metric."
                )
        elif kind == "emoji":
            if not encoder or cfg.emoji_dir is None:
                raise ValueError(
                    f"`validation_metrics` has {name!r} and `emoji_dir` is {cfg.emoji_dir!r}: pass emoji:NETWORK with "
                    "the folder of a network that reads the drawings, and `--emoji_dir`."
                )
        elif cfg.num_validation_samples < cfg.validation_metrics_samples:
            raise ValueError(
                f"`validation_metrics` has {name!r}, which compares with held-out images, but "
                f"`num_validation_samples` is {cfg.num_validation_samples}: pass `--num_validation_samples "
                f"{cfg.validation_metrics_samples}` (`validation_metrics_samples`) or more."
            )


def check_teacher(cfg: TrainingSettings, first_stage: TrainingSettings) -> None:
    """Validate that a run that begins with post-training begins with a trained model."""
    if first_stage.objective != "flow" and (cfg.pretrained_model_name_or_path is None or cfg.transformer_config):
        raise ValueError(
            f"`objective` is {first_stage.objective}, which starts from a trained model: pass "
            "`pretrained_model_name_or_path`, and no `transformer_config`."
        )


def check_upload(cfg: TrainingSettings) -> None:
    """Validate the name of the repository to upload to."""
    if cfg.hub_model_id is not None and not cfg.push_to_hub:
        raise ValueError(f"`hub_model_id` is {cfg.hub_model_id!r}, but `push_to_hub` is not set.")
    if cfg.push_to_hub:
        check_repo_id(cfg.repo_id)


def check_repo_id(repo_id: str) -> None:
    """Validate the name of a Hub repository, offline.

    Raises:
        ValueError: the Hub would not accept the name.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not a valid repository name: {error}") from error
