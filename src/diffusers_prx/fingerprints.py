"""What is known of a saved network besides its outputs: a hash that tells it apart, and how its images are normalized.

Metrics and training both ask: numbers are only comparable between the same extractors, caches only between the same
networks.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

from .files import hash_tensors

NORMALIZATION_FILE = "preprocessor_config.json"

# Keys of a model's configuration that say where it was saved, not what it computes.
NOT_COMPUTED = ("_name_or_path", "architectures", "dtype", "transformers_version")


def fingerprint(module: Any) -> str:
    """The class of a network and a hash of its weights and configuration; it reads every weight.

    It sees another revision, and a file that was changed in its place. The same network in another folder is the same.
    """
    settings = module.config if isinstance(module.config, dict) else module.config.to_dict()
    digest = hashlib.blake2b(json.dumps(_computed(settings), sort_keys=True, default=str).encode(), digest_size=16)
    hash_tensors(digest, module.state_dict())
    return f"{type(module).__name__} {digest.hexdigest()}"


def _computed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what says where and when it was saved."""
    return {
        str(key): _computed(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if not str(key).startswith("_") and key not in NOT_COMPUTED
    }


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of a fast tokenizer; padding and truncation, which every call sets anew, do not count."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {key: value for key, value in settings.items() if key not in ("padding", "truncation")}
    return hashlib.blake2b(json.dumps(rules, sort_keys=True).encode(), digest_size=16).hexdigest()


def pipeline_fingerprint(pipeline: Any) -> str:
    """A hash of all that a pipeline's images depend on: its class, its own configuration, and every component."""
    digest = hashlib.blake2b(type(pipeline).__name__.encode(), digest_size=16)
    components = pipeline.components
    own = {key: value for key, value in pipeline.config.items() if key not in components}
    digest.update(json.dumps(_computed(own), sort_keys=True, default=str).encode())
    for name, component in sorted(components.items()):
        if isinstance(component, torch.nn.Module):
            described = fingerprint(component)
        elif hasattr(component, "backend_tokenizer"):
            described = tokenizer_fingerprint(component)
        else:  # schedulers; other helpers are told apart by their class
            settings = getattr(component, "config", {})
            described = f"{type(component).__name__} {json.dumps(_computed(settings), sort_keys=True, default=str)}"
        digest.update(f"{name}: {described}".encode())
    return digest.hexdigest()


def read_normalization(name: str, revision: str | None = None, kind: str = "model") -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, for pixels in [0, 1], of a vision model's images.

    Read without transformers' image processors, some of which need torchvision. Nothing is assumed: constants of
    ImageNet count only where the file has them.

    Args:
        name: a folder with a preprocessor_config.json, or a Hub id.
        revision: on the Hub.
        kind: what messages call the model.

    Raises:
        ValueError: if the file is not there, or does not state it.
    """
    try:
        path = cached_file(name, NORMALIZATION_FILE, revision=revision)
    except OSError as error:
        raise ValueError(
            f"The {kind} {name!r} has no {NORMALIZATION_FILE}, which states how its images are normalized; give a "
            'folder or repository that has it, for example {"image_mean": [...], "image_std": [...]}.'
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
