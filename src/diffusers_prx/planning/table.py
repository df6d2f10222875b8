"""A plan as a table for people: one line per name and value."""

from typing import Any

from .planner import ALIGNMENT_PARTS, USABLE_MEMORY, UTILIZATION_SOURCE

INDENT = 26
Rows = list[tuple[str, str]]


def format_plan(plan: dict[str, Any], title: str) -> str:
    """Return a plan as lines of a name and a value.

    Args:
        plan: return value of `planner.make_plan`.
        title: name of the recipe.
    """
    cluster, stages = plan["cluster"], plan["stages"]
    rows: Rows = [("plan", title), ("", f"{cluster['num_gpus']} x {cluster['gpu']['name']}, {cluster['strategy']}")]
    rows += [(name, f"{count:,} parameters, trained") for name, count in plan["parameters"].items()]
    rows += [(name, f"{count:,} parameters, frozen") for name, count in plan["frozen_parameters"].items()]
    for number, stage in enumerate(stages):
        rows += _stage_rows(f"stage {number}" if len(stages) > 1 else "stage", stage, plan)
    rows += [("", ""), *_memory_rows(plan), ("", "")]
    peak = f"{cluster['peak_tflops']:g}e12 operations a second"
    rows.append(("utilization", f"{cluster['utilization']:.0%} of {peak} assumed; {UTILIZATION_SOURCE}"))
    steps, gpu_hours = f"{plan['steps']:,} steps", f"{_short(plan['gpu_hours'])} GPU hours"
    rows.append(("time", f"{_hours(plan['predicted_hours'])} for {steps}, {gpu_hours}"))
    price = f"${cluster['price_per_hour']:.2f} per GPU hour"
    rows.append(("cost", f"${_dollars(plan['predicted_cost_usd'])} at {price}"))
    rows += _published_rows(plan) + _storage_rows(plan)
    rows += [("not included", "reading data, validation, checkpoints, start"), ("GPU data", cluster["gpu"]["source"])]
    return "\n".join(f"{name:<{INDENT}}{value}".rstrip() for name, value in rows)


def _stage_rows(title: str, stage: dict[str, Any], plan: dict[str, Any]) -> Rows:
    images, flops = stage["images_per_step"], stage["flops_per_step"]
    batch_size, accumulation = stage["micro_batch"]
    summary = (
        f"{stage['steps']:,} steps of {images:,} images ({batch_size} x {accumulation} accumulated x "
        f"{plan['cluster']['num_gpus']}), {stage['resolution']} pixels, {stage['image_tokens']} image tokens, "
        f"{plan['text_tokens']} text tokens"
    )
    rows: Rows = [("", ""), (title, summary)]
    rows.append(("  operations", f"{flops:.3g} per step, {flops / images:.3g} per image"))
    for name, part in stage["flops_per_step_by_part"].items():
        note = ""
        if name in ALIGNMENT_PARTS and stage["steps_with_alignment"] < stage["steps"]:
            note = f"  (in {stage['steps_with_alignment']:,} steps)"
        rows.append((f"    {name}", f"{part:<10.3g}{part / flops:>6.1%}{note}"))
    for strategy, communication in stage["communication"].items():
        transfers = [f"{t['what']} {t['kind']} {_short(t['gb_sent_per_gpu'])}" for t in communication["transfers"]]
        if transfers:
            sent = f"{_short(communication['gb_sent_per_gpu'])} GB per GPU and step ({', '.join(transfers)})"
            rows.append((f"  sent, {strategy}", f"{sent}, at least {communication['seconds']:.2g} s"))
    bound = "" if stage["seconds_per_step"] == stage["seconds_computing"] else " (limited by communication)"
    rate = f"{images / stage['seconds_per_step']:,.0f} images per second"
    rows.append(("  time", f"{stage['seconds_per_step']:.3g} s per step{bound}, {rate}, {_hours(stage['hours'])}"))
    return rows


def _memory_rows(plan: dict[str, Any]) -> Rows:
    """Return the memory of every strategy with and without gradient checkpointing, and the warnings."""
    cluster, usable = plan["cluster"], plan["usable_memory_gb"]
    total = f"{cluster['gpu']['memory_gb']:g} GB"
    rows = [("memory per GPU", f"{usable:.0f} of {total} usable ({USABLE_MEMORY:.0%}, an assumption)")]
    for strategy, memory in plan["memory"].items():
        for checkpointing in ("without checkpointing", "with checkpointing"):
            parts = memory[checkpointing]
            chosen = strategy == cluster["strategy"] and parts == memory["as configured"]
            verdict = "fits" if parts["total"] <= usable else "DOES NOT FIT"
            listed = ", ".join(f"{name} {size:.3g}" for name, size in parts.items() if name != "total")
            name = f"{'>' if chosen else ' '} {strategy}, {checkpointing.split()[0]}"
            rows.append((name, f"{parts['total']:.1f} GB {verdict}: {listed}"))
    rows.append(("", "with and without gradient checkpointing; > marks the configured one"))
    rows += [("warning", warning) for warning in plan["warnings"]]
    return rows


def _published_rows(plan: dict[str, Any]) -> Rows:
    run = plan["published"]
    if run is None:
        return []
    price = plan["cluster"]["price_per_hour"]
    return [
        (
            "published",
            f"{run['hours']:g} h on {run['num_gpus']} {run['gpu']} and about ${run['cost_usd']:,.0f}: "
            f"{run['implied_utilization']:.1%} of the peak for the same {run['flops']:.3g} operations,",
        ),
        ("", f"{run['implied_utilization_without_frozen']:.1%} without the frozen networks,"),
        (
            "",
            f"{run['implied_utilization_if_each_gpu_repeats_newton_schulz']:.1%} if every GPU computes all of "
            "Newton-Schulz, which is distributed here;",
        ),
        (
            "",
            f"time and cost together: ${run['implied_price_per_gpu_hour']:.2f} per GPU hour; the cost alone, at "
            f"${price:.2f}: {run['implied_utilization_by_cost']:.1%}",
        ),
    ]


def _storage_rows(plan: dict[str, Any]) -> Rows:
    storage = plan.get("storage")
    if storage is None:
        return []
    epoch = f"{_hours(plan['hours_per_epoch'])} and ${_dollars(plan['cost_usd_per_epoch'])} each"
    rows = [
        ("data", f"{storage['num_images']:,} images, {plan['epochs']:.3g} epochs of {epoch}"),
        ("cache", f"{storage['total_tb']:,.4g} TB, at {storage['caption_tokens']:g} tokens in the mean caption"),
    ]
    for resolution, columns in storage["tb_by_resolution"].items():
        listed = ", ".join(f"{name} {size:,.4g}" for name, size in columns.items())
        rows.append((f"  {resolution} pixels", f"TB: {listed}"))
    return rows


def _dollars(amount: float) -> str:
    return f"{amount:,.2f}" if amount < 100 else f"{amount:,.0f}"


def _short(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"


def _hours(hours: float) -> str:
    return f"{hours:.3g} h" if hours < 48 else f"{hours:,.0f} h ({hours / 24:.1f} days)"
