"""Fingerprints of networks, tokenizers and pipelines, and the image normalization of vision models.

Scores are comparable only between equal feature extractors, and caches are valid only for equal networks.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import cached_file

from .files import hash_tensors

NORMALIZATION_FILE = "preprocessor_config.json"

# keys of a configuration that do not change what a model computes
IGNORED_CONFIG_KEYS = ("_name_or_path", "architectures", "dtype", "transformers_version")


def fingerprint(module: ModelMixin | PreTrainedModel) -> str:
    """Return the class name of a network and a hash of its weights and configuration.

    The folder does not count; another revision, or any changed weight, does.

    Args:
        module: network of diffusers or transformers.

    Example:
        >>> fingerprint(pipe.vae)
        'AutoencoderKL 0f3c...'
    """
    settings = module.config if isinstance(module.config, dict) else module.config.to_dict()
    digest = hashlib.blake2b(
        json.dumps(_relevant_config(settings), sort_keys=True, default=str).encode(), digest_size=16
    )
    hash_tensors(digest, module.state_dict())
    return f"{type(module).__name__} {digest.hexdigest()}"


def _relevant_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without `IGNORED_CONFIG_KEYS` and private keys."""
    return {
        str(key): _relevant_config(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if not str(key).startswith("_") and key not in IGNORED_CONFIG_KEYS
    }


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a hash of a fast tokenizer, without padding and truncation, which every call sets anew.

    Example:
        >>> tokenizer_fingerprint(pipe.tokenizer) == tokenizer_fingerprint(other.tokenizer)
        True
    """
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {key: value for key, value in settings.items() if key not in ("padding", "truncation")}
    return hashlib.blake2b(json.dumps(rules, sort_keys=True).encode(), digest_size=16).hexdigest()


def pipeline_fingerprint(pipeline: DiffusionPipeline) -> str:
    """Return a hash of everything that a pipeline's images depend on: class, configuration and components.

    Example:
        >>> pipeline_fingerprint(pipe) == pipeline_fingerprint(PRXPipeline.from_pretrained("my-prx"))
        True
    """
    digest = hashlib.blake2b(type(pipeline).__name__.encode(), digest_size=16)
    components = pipeline.components
    own = {key: value for key, value in pipeline.config.items() if key not in components}
    digest.update(json.dumps(_relevant_config(own), sort_keys=True, default=str).encode())
    for name, component in sorted(components.items()):
        if isinstance(component, torch.nn.Module):
            described = fingerprint(component)
        elif hasattr(component, "backend_tokenizer"):
            described = tokenizer_fingerprint(component)
        else:  # schedulers, and helpers without a configuration
            settings = getattr(component, "config", {})
            described = (
                f"{type(component).__name__} {json.dumps(_relevant_config(settings), sort_keys=True, default=str)}"
            )
        digest.update(f"{name}: {described}".encode())
    return digest.hexdigest()


def read_normalization(name: str, revision: str | None = None, kind: str = "model") -> tuple[list[float], list[float]]:
    """Read mean and standard deviation per channel, for pixels in [0, 1], of a vision model's images.

    It does not use transformers' image processors, some of which need torchvision, and has no defaults.

    Args:
        name: folder with a preprocessor_config.json, or Hub id.
        revision: revision on the Hub.
        kind: kind of model, for messages.

    Raises:
        ValueError: if the file is missing or incomplete.

    Example:
        >>> mean, std = read_normalization("facebook/dinov2-base")
    """
    try:
        path = cached_file(name, NORMALIZATION_FILE, revision=revision)
    except OSError as error:
        raise ValueError(
            f"The {kind} {name!r} has no {NORMALIZATION_FILE}, which holds the normalization of its images. Use a "
            'folder or repository with this file, for example {"image_mean": [...], "image_std": [...]}.'
        ) from error
    settings = json.loads(Path(str(path)).read_text())
    if abs(settings.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise ValueError(
            f"{NORMALIZATION_FILE} of the {kind} {name!r} has `rescale_factor` {settings['rescale_factor']}; "
            "accepted is 1/255."
        )
    if settings.get("do_normalize", True) is False:
        return [0.0] * 3, [1.0] * 3
    mean, std = settings.get("image_mean"), settings.get("image_std")
    for key, values in (("image_mean", mean), ("image_std", std)):
        if not isinstance(values, list) or len(values) != 3:
            raise ValueError(
                f"{NORMALIZATION_FILE} of the {kind} {name!r} has `{key}` {values}; accepted are three numbers."
            )
    return mean, std
