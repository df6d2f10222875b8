"""Guiders that change the network: which blocks a prediction skips or perturbs, as arguments of the transformer.

diffusers' guiders put hooks into the network for this. Here they only say which blocks they mean, and the
transformer's forward takes these blocks as arguments.
"""

from collections.abc import Iterable
from typing import Any, TypeAlias

from diffusers.guiders import AutoGuidance, BaseGuidance, PerturbedAttentionGuidance, SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig

from ..compat import has_cache
from .conditioning import check_accepts

# name of a prediction -> arguments of the transformer that change the network for it
NetworkChanges: TypeAlias = dict[str, dict[str, tuple[int, ...]]]

PLAIN_PREDICTIONS = ["pred_cond", "pred_uncond"]


def network_changes(guider: BaseGuidance | None) -> NetworkChanges:
    """Return the changes of the network that a guider asks for; empty if it only combines predictions.

    Raises:
        ValueError: for a guider, or a setting of it, that the transformer has no arguments for.
    """
    if isinstance(guider, (SkipLayerGuidance, PerturbedAttentionGuidance)):
        return {"pred_cond_skip": _block_arguments(guider, guider.skip_layer_config)}
    if isinstance(guider, AutoGuidance):
        return {"pred_uncond": _block_arguments(guider, guider.auto_guidance_config)}
    hooked = guider is not None and type(guider).prepare_models is not BaseGuidance.prepare_models
    if guider is not None and (hooked or guider._input_predictions != PLAIN_PREDICTIONS):
        raise ValueError(
            f"`guider` is a {type(guider).__name__}, which needs a prediction of a changed network; accepted are"
            " SkipLayerGuidance, PerturbedAttentionGuidance, AutoGuidance with a dropout of 1, and those that combine"
            " a prediction with the prompt and one with the negative prompt."
        )
    return {}


def _block_arguments(guider: BaseGuidance, configs: Iterable[LayerSkipConfig]) -> dict[str, tuple[int, ...]]:
    """Return `skip_blocks` and `identity_attention_blocks` of diffusers' configurations."""
    skipped: set[int] = set()
    alone: set[int] = set()
    for config in configs:
        blocks = {config.indices} if isinstance(config.indices, int) else set(config.indices)
        parts = (config.skip_attention, config.skip_attention_scores, config.skip_ff)
        if (
            config.fqn not in ("auto", "blocks")
            or config.dropout != 1
            or parts
            not in (
                (True, False, True),
                (False, True, False),
            )
        ):
            raise ValueError(
                f"`guider` is a {type(guider).__name__} with {config}; accepted are whole blocks (`skip_attention` and"
                " `skip_ff`) or `skip_attention_scores` alone, with a `dropout` of 1 and the `fqn` 'auto' or 'blocks'."
            )
        (alone if config.skip_attention_scores else skipped).update(blocks)
    return {"skip_blocks": tuple(sorted(skipped)), "identity_attention_blocks": tuple(sorted(alone))}


def check_network_changes(changes: NetworkChanges, guider: Any, transformer: Any, in_group: bool) -> None:
    """Check that the transformer can make the predictions of a changed network.

    Args:
        changes: result of `network_changes`.
        guider: guider, for the message.
        transformer: transformer of the pipeline.
        in_group: True if two processes share the branches.
    """
    name, depth = type(guider).__name__, transformer.config["depth"]
    for arguments in changes.values():
        blocks = sorted({block for chosen in arguments.values() for block in chosen})
        if not blocks or blocks[0] < 0 or blocks[-1] >= depth:
            raise ValueError(
                f"`guider` is a {name} for the blocks {blocks}; it must name some of the {depth} blocks, counted"
                " from 0."
            )
        check_accepts(transformer, "skip_blocks", f"`guider` is a {name}, which")
    if changes and has_cache(transformer):
        raise ValueError(
            f"`guider` is a {name}, but the transformer has a cache of what its blocks computed, which would mix up"
            " whole and changed network: call `transformer.disable_cache()`, or use another guider."
        )
    if changes and in_group:
        raise ValueError(
            f"`guidance_group` is given, but `guider` is a {name}, which needs more than two equal branches: leave one"
            " of them out."
        )


def check_guide_transformer(guide: Any, pipeline: Any, guided: bool, changes: NetworkChanges, in_group: bool) -> None:
    """Check a weaker transformer that guides the one of the pipeline.

    Args:
        guide: transformer.
        pipeline: pipeline.
        guided: True if `guidance_scale` is above 1, or there is a guider.
        changes: result of `network_changes`.
        in_group: True if two processes share the branches.
    """
    config = getattr(guide, "config", {})
    for name in ("in_channels", "context_in_dim"):
        expected = pipeline.transformer.config[name]
        if name not in config or config[name] != expected:
            received = f"has the `{name}` {config[name]}" if name in config else f"is a {type(guide).__name__}"
            raise ValueError(
                f"`guide_transformer` {received}; it must be a PRX transformer with the `{name}` {expected} of the"
                " pipeline's own."
            )
    problem = None
    if not guided:
        problem = "guidance is off: set `guidance_scale` above 1"
    elif "pred_uncond" in changes:
        problem = "the `guider` makes a weaker network of its own: use another guider"
    elif in_group:
        problem = "`guidance_group` shares branches of one transformer: leave one of them out"
    elif has_cache(guide):
        problem = "it has a cache: call its `disable_cache()`"
    elif guide.device != pipeline.transformer.device:
        problem = f"it is on {guide.device} and the pipeline on {pipeline.transformer.device}: move it there"
    if problem is not None:
        raise ValueError(f"`guide_transformer` is given, but {problem}.")
