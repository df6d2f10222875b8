"""Class names in model_index.json: how a PRX pipeline is stored so that stock diffusers loads it, and loaded again.

diffusers resolves an entry ["library", "Class"] of model_index.json as the attribute `Class` of the imported module
`library`, and finds out how to load it by the base classes in that same module. `resolve_components` names this module
as the library of our own classes, so it imports them and their base classes.
"""

import importlib
import inspect
import json
import os
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import FrozenDict
from transformers import PreTrainedModel, T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig

from ..compat import unwrap_compiled
from ..models.transformer_prx import OWN_CLASS_NAME, STOCK_CLASS_NAME, PRXTransformer2DModel, load_complete
from ..schedulers.scheduling_prx import STOCK_ONLY_OPTIONS, PRXFlowMatchScheduler, PRXXPredictionScheduler
from ..text import encoder_only

__all__ = [
    "ModelMixin",
    "PRXFlowMatchScheduler",
    "PRXTransformer2DModel",
    "PRXXPredictionScheduler",
    "PreTrainedModel",
    "PublishedT5GemmaEncoder",
    "SchedulerMixin",
    "check_same_kind",
    "resolve_components",
    "storable_copy",
]

PIPELINE_KINDS = ("PRXPipeline", "PRXPixelPipeline")
# ends stored class names that stock diffusers does not have, so that its error message says what to install
INSTALL_HINT = " (pip install diffusers-prx)"
_SCHEDULERS = {scheduler.prediction_type: scheduler for scheduler in (PRXFlowMatchScheduler, PRXXPredictionScheduler)}


class PublishedT5GemmaConfig(T5GemmaConfig):
    """Read the configuration of a published text encoder: the encoder's own, or that of the whole T5Gemma."""

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, subfolder: str = "", **kwargs: Any) -> T5GemmaConfig:  # type: ignore[override]
        stored, _ = T5GemmaConfig.get_config_dict(folder, subfolder=subfolder, **kwargs)
        if stored.get("model_type") == T5GemmaConfig.model_type:
            stored = stored["encoder"]
        encoder = T5GemmaModuleConfig.from_dict(stored)
        return encoder_only(
            encoder,
            vocab_size=encoder.vocab_size,
            dropout_rate=stored.get("dropout_rate", 0.0),
            attention_dropout=encoder.attention_dropout or 0.0,
            dtype=stored.get("dtype", stored.get("torch_dtype")),
        )


class PublishedT5GemmaEncoder(T5GemmaEncoderModel):
    """Load the text encoder of the published checkpoints, whose class has no public name in transformers 5.

    The folder was saved from the encoder half of a T5GemmaModel, with the half's configuration or with the whole
    model's. diffusers 0.42 loads the second kind only. Here both kinds become the `encoder` of the public
    T5GemmaEncoderModel. (transformers' `key_mapping` would load them as well, but reverts the names on saving, and the
    result could not be loaded again.)
    """

    config_class = PublishedT5GemmaConfig

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **kwargs: Any) -> T5GemmaEncoderModel:  # type: ignore[override]
        """Load the folder's weights into a T5GemmaEncoderModel.

        Args:
            folder: folder of the text encoder.
            kwargs: arguments of `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: if the folder's weights are not exactly those of the encoder.
        """
        config = PublishedT5GemmaConfig.from_pretrained(folder)
        with torch.device("meta"):
            encoder_class: Any = type(T5GemmaEncoderModel(config).encoder)
        encoder, info = encoder_class.from_pretrained(
            folder, config=config.encoder, output_loading_info=True, **kwargs
        )
        mismatches = {
            key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        }
        if any(mismatches.values()):
            raise ValueError(f"The text encoder in {folder} does not fit T5GemmaEncoderModel: {mismatches}.")
        config.encoder, config.dtype = encoder.config, encoder.dtype
        with torch.device("meta"):
            model = T5GemmaEncoderModel(config)
        model.encoder = encoder
        return model.eval()


def __getattr__(name: str) -> Any:
    """Return a model class of diffusers or transformers whose `from_pretrained` raises an error for missing weights.

    Args:
        name: "library.Class", as `resolve_components` writes it. Both libraries initialize missing weights at random.
    """
    model_class = _model_class(*name.partition(".")[::2])
    if model_class is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def from_pretrained(cls: Any, folder: str | os.PathLike, **kwargs: Any) -> Any:
        if kwargs.get("use_flashpack"):
            return model_class.from_pretrained(folder, **kwargs)  # this format cannot list missing weights
        return load_complete(model_class.from_pretrained, folder, **kwargs)

    return type(model_class.__name__, (model_class,), {"from_pretrained": classmethod(from_pretrained)})


def _model_class(library: str, name: str) -> Any:
    """Return the class of a network in diffusers or transformers, or None."""
    if library not in ("diffusers", "transformers"):
        return None
    value = getattr(importlib.import_module(library), name, None)
    return value if isinstance(value, type) and issubclass(value, (ModelMixin, PreTrainedModel)) else None


def check_same_kind(pipeline_class: Any, pipeline: Any) -> None:
    """Raise a ValueError unless a pipeline, ours or diffusers', draws in the same space as a class."""
    if not _kinds(pipeline_class) & _kinds(type(pipeline)):
        raise ValueError(
            f"`pipeline` is a {type(pipeline).__name__}; accepted by {pipeline_class.__name__}.from_pipe is a"
            f" {' or '.join(sorted(_kinds(pipeline_class)))}."
        )


def _kinds(pipeline_class: Any) -> set[str]:
    return {base.__name__ for base in pipeline_class.__mro__} & set(PIPELINE_KINDS)


def resolve_components(pipeline_class: Any, config: dict[str, Any], folder: str | None) -> dict[str, Any]:
    """Return a model_index.json with entries that resolve to our own classes.

    Args:
        pipeline_class: PRXPipeline, PRXPixelPipeline or a subclass.
        config: content of model_index.json, written by this package, by stock diffusers, or published.
        folder: folder of the pipeline, for the scheduler's configuration; None if it is not on this machine.

    Raises:
        ValueError: if the folder holds the other of the two pipelines.
    """
    stored_class = config.get("_class_name")
    if stored_class in PIPELINE_KINDS and stored_class not in _kinds(pipeline_class):
        raise ValueError(f"{folder} holds a {stored_class}; load it with {stored_class}.from_pretrained.")
    resolved = dict(config)
    parameters = inspect.signature(pipeline_class.__init__).parameters
    for name, entry in config.items():
        if not isinstance(entry, (list, tuple)) or len(entry) != 2 or name.startswith("_"):
            continue
        if isinstance(entry[1], str):
            entry = (entry[0], entry[1].removesuffix(INSTALL_HINT))
        if entry[0] is None and name not in parameters:
            del resolved[name]  # the published pixel pipeline lists a VAE that it does not have
        elif entry[1] in (STOCK_CLASS_NAME, OWN_CLASS_NAME):
            resolved[name] = [__name__, "PRXTransformer2DModel"]
        elif entry[1] == "T5GemmaEncoder":
            resolved[name] = [__name__, "PublishedT5GemmaEncoder"]
        elif entry[1] in [scheduler.__name__ for scheduler in _SCHEDULERS.values()]:
            resolved[name] = [__name__, entry[1]]
        elif name == "scheduler" and str(entry[1]).startswith("PRX"):
            resolved[name] = ["diffusers", entry[1].removeprefix("PRX")]  # see `storable_copy`
        elif entry[1] == "FlowMatchEulerDiscreteScheduler" and not _is_stock_only(folder):
            prediction_type = config.get("prediction_type") or pipeline_class.default_prediction_type
            resolved[name] = [__name__, _SCHEDULERS[prediction_type].__name__]
        elif _model_class(*entry) is not None:
            resolved[name] = [__name__, ".".join(entry)]  # see `__getattr__`
    if isinstance(config.get("token_route"), list):
        resolved["token_route"] = tuple(config["token_route"])  # JSON has no tuples, and diffusers checks the type
    return resolved


def storable_copy(pipeline: Any) -> Any:
    """Return a shallow copy of a pipeline with the class names to store.

    They are stock diffusers' names if stock diffusers draws the same with them. Otherwise (x-prediction in latents,
    velocity in pixels, a noise scale in latents, a transformer with options of our own) they are names that stock
    diffusers does not know, so that it raises an error instead of drawing something else: PRXFlowMatchScheduler,
    PRXXPredictionScheduler, or the name of a stock scheduler with PRX before it, each with `INSTALL_HINT`, because the
    error repeats the name. An editing pipeline is stored as the one for text to image, which stock diffusers knows.
    """
    text_to_image = type(pipeline).__name__.replace("Img2Img", "").replace("Inpaint", "")
    stored_class = next((base for base in type(pipeline).__mro__ if base.__name__ == text_to_image), type(pipeline))
    stored: Any = object.__new__(stored_class)
    stored.__dict__.update(vars(pipeline))
    transformer = unwrap_compiled(pipeline.transformer)
    if isinstance(transformer, PRXTransformer2DModel):
        class_name = transformer.stored_class_name
        hint = INSTALL_HINT if class_name == OWN_CLASS_NAME else ""
        stored.register_to_config(transformer=("diffusers", class_name + hint))
    scheduler = pipeline.scheduler
    if scheduler is None:
        return stored
    ours = isinstance(scheduler, tuple(_SCHEDULERS.values()))
    if pipeline.is_stock_compatible:
        if ours:
            stored.register_modules(scheduler=_as_stock_scheduler(scheduler))
    else:
        name = type(scheduler).__name__
        stored.register_to_config(scheduler=("diffusers", (name if ours else f"PRX{name}") + INSTALL_HINT))
    return stored


def _as_stock_scheduler(scheduler: Any) -> Any:
    """Return the stock scheduler with the same shift; our other settings become extra keys of its configuration."""
    extra = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    stock: Any = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=extra["num_train_timesteps"], shift=extra["shift"]
    )
    stock.register_to_config(**extra)
    return stock


def _is_stock_only(folder: str | None) -> bool:
    """True if a stored FlowMatchEulerDiscreteScheduler uses an option that our schedulers do not have."""
    if folder is None:
        return False
    inside = os.path.join(folder, "scheduler")
    path = os.path.join(inside if os.path.isdir(inside) else folder, SchedulerMixin.config_name)
    if not os.path.isfile(path):
        return False
    with open(path, encoding="utf-8") as file:
        stored = FrozenDict(json.load(file))
    return any(stored.get(option) for option in STOCK_ONLY_OPTIONS)
