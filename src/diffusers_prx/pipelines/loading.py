"""How a PRX pipeline is stored, and how what is stored finds its classes.

diffusers resolves an entry ["library", "Class"] of model_index.json as the attribute `Class` of the imported module
`library`, and recognizes it as loadable by the base classes that it finds in that same module. This module is that
library for our own classes: it holds them, and their base classes, by import.
"""

import copy
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
    "stored_form",
]

KINDS = ("PRXPipeline", "PRXPixelPipeline")
_SCHEDULERS = {scheduler.prediction_type: scheduler for scheduler in (PRXFlowMatchScheduler, PRXXPredictionScheduler)}


class PublishedT5GemmaConfig(T5GemmaConfig):
    """Read the configuration of a published text encoder: of the encoder alone, or of the model it was part of."""

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
    """Load the text encoder of the published checkpoints, whose class transformers 5 has no public name for.

    The folder was saved from the encoder half of a T5GemmaModel, with its own configuration or with that of the whole
    model. diffusers 0.42 loads the second kind; for the first it builds an encoder of transformers' default sizes,
    which fits no other. Here both become that half of the public T5GemmaEncoderModel, whose keys begin with
    `encoder.`. (The `key_mapping` of transformers would load it as well, but is undone on saving: what is saved then
    could not be loaded again.)
    """

    config_class = PublishedT5GemmaConfig

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **kwargs: Any) -> T5GemmaEncoderModel:  # type: ignore[override]
        """A T5GemmaEncoderModel with the weights of the folder; keyword arguments as `PreTrainedModel` takes them.

        Raises:
            ValueError: the folder's weights are not exactly those of the encoder.
        """
        config = PublishedT5GemmaConfig.from_pretrained(folder)
        with torch.device("meta"):
            half = type(T5GemmaEncoderModel(config).encoder)
        half_config: Any = config.encoder
        loaded: Any = half.from_pretrained(folder, config=half_config, output_loading_info=True, **kwargs)
        encoder, info = loaded
        wrong = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        if any(wrong.values()):
            raise ValueError(f"The text encoder in {folder} does not fit T5GemmaEncoderModel: {wrong}.")
        config.encoder, config.dtype = encoder.config, encoder.dtype
        with torch.device("meta"):
            model = T5GemmaEncoderModel(config)
        model.encoder = encoder
        return model.eval()


def __getattr__(name: str) -> Any:
    """Return a model class of diffusers or transformers that refuses weights that are not all there.

    Args:
        name: "library.Class", as `resolve_components` writes it. Both libraries fill what is missing at random.
    """
    model_class = _model_class(*name.partition(".")[::2])
    if model_class is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def from_pretrained(cls: Any, folder: str | os.PathLike, **kwargs: Any) -> Any:
        if kwargs.get("use_flashpack"):
            return model_class.from_pretrained(folder, **kwargs)  # a format of one tensor, with no report
        return load_complete(model_class.from_pretrained, folder, **kwargs)

    return type(model_class.__name__, (model_class,), {"from_pretrained": classmethod(from_pretrained)})


def _model_class(library: str, name: str) -> Any:
    """The class of a network in diffusers or transformers, or None."""
    found = getattr(importlib.import_module(library), name, None) if library in ("diffusers", "transformers") else None
    return found if isinstance(found, type) and issubclass(found, (ModelMixin, PreTrainedModel)) else None


def check_same_kind(pipeline_class: Any, pipeline: Any) -> None:
    """Raise a ValueError unless a pipeline, ours or diffusers', is of the kind of a class, latent or pixel."""
    if not _kinds(pipeline_class) & _kinds(type(pipeline)):
        raise ValueError(
            f"`pipeline` is a {type(pipeline).__name__}; accepted by {pipeline_class.__name__}.from_pipe is a"
            f" {' or '.join(sorted(_kinds(pipeline_class)))}."
        )


def _kinds(pipeline_class: Any) -> set[str]:
    return {base.__name__ for base in pipeline_class.__mro__} & set(KINDS)


def resolve_components(pipeline_class: Any, config: dict[str, Any], folder: str | None) -> dict[str, Any]:
    """A stored model_index.json with the entries of our own classes in place.

    Args:
        pipeline_class: PRXPipeline or PRXPixelPipeline (or a class derived from one).
        config: what model_index.json says: written by us, by stock diffusers, or published.
        folder: where the pipeline lies, to read the scheduler's configuration; None when it is not on this machine.

    Raises:
        ValueError: the folder holds the other of the two pipelines.
    """
    stored_class = config.get("_class_name")
    if stored_class in KINDS and stored_class not in _kinds(pipeline_class):
        raise ValueError(f"{folder} holds a {stored_class}; load it with {stored_class}.from_pretrained.")
    resolved = dict(config)
    parameters = inspect.signature(pipeline_class.__init__).parameters
    for name, entry in config.items():
        if not isinstance(entry, (list, tuple)) or len(entry) != 2 or name.startswith("_"):
            continue
        if entry[0] is None and name not in parameters:
            del resolved[name]  # the published pixel layout lists a VAE that it does not have
        elif entry[1] in (STOCK_CLASS_NAME, OWN_CLASS_NAME):
            resolved[name] = [__name__, "PRXTransformer2DModel"]
        elif entry[1] == "T5GemmaEncoder":
            resolved[name] = [__name__, "PublishedT5GemmaEncoder"]
        elif entry[1] in [scheduler.__name__ for scheduler in _SCHEDULERS.values()]:
            resolved[name] = [__name__, entry[1]]
        elif name == "scheduler" and str(entry[1]).startswith("PRX"):
            resolved[name] = ["diffusers", entry[1].removeprefix("PRX")]  # see `stored_form`
        elif entry[1] == "FlowMatchEulerDiscreteScheduler" and not _is_stock_only(folder):
            prediction_type = config.get("prediction_type") or pipeline_class.default_prediction_type
            resolved[name] = [__name__, _SCHEDULERS[prediction_type].__name__]
        elif _model_class(*entry) is not None:
            resolved[name] = [__name__, ".".join(entry)]  # see `__getattr__`
    if isinstance(config.get("token_route"), list):
        resolved["token_route"] = tuple(config["token_route"])  # JSON has no tuples, and diffusers checks the type
    return resolved


def stored_form(pipeline: Any) -> Any:
    """A shallow copy of a pipeline under the class names to store.

    They are stock diffusers' names wherever stock diffusers draws the same with them. What it cannot express
    (x-prediction in latents, velocity in pixels, another scale of the noise in latents) is stored with a scheduler
    class of a name that it does not know and so refuses: PRXFlowMatchScheduler, PRXXPredictionScheduler, or PRX before
    the name of one of its own schedulers. So is a transformer with options that it does not have.
    """
    stored = copy.copy(pipeline)
    transformer = unwrap_compiled(pipeline.transformer)
    if isinstance(transformer, PRXTransformer2DModel):
        stored.register_to_config(transformer=("diffusers", transformer.stored_class_name))
    scheduler = pipeline.scheduler
    if scheduler is None:
        return stored
    ours = isinstance(scheduler, tuple(_SCHEDULERS.values()))
    if pipeline.stock_can_express:
        if ours:
            stored.register_modules(scheduler=_as_stock_scheduler(scheduler))
    else:
        name = type(scheduler).__name__
        stored.register_to_config(scheduler=("diffusers", name if ours else f"PRX{name}"))
    return stored


def _as_stock_scheduler(scheduler: Any) -> Any:
    """The stock scheduler with the same shift; what only ours knows stays in its configuration as extra keys."""
    extra = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    stock: Any = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=extra["num_train_timesteps"], shift=extra["shift"]
    )
    stock.register_to_config(**extra)
    return stock


def _is_stock_only(folder: str | None) -> bool:
    """Whether a stored FlowMatchEulerDiscreteScheduler is set to something that our schedulers do not do."""
    if folder is None:
        return False
    inside = os.path.join(folder, "scheduler")
    path = os.path.join(inside if os.path.isdir(inside) else folder, SchedulerMixin.config_name)
    if not os.path.isfile(path):
        return False
    with open(path, encoding="utf-8") as file:
        stored = FrozenDict(json.load(file))
    return any(stored.get(option) for option in STOCK_ONLY_OPTIONS)
