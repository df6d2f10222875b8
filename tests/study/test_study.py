"""Statistics against independent computations, study files, the registered plan, and the report of synthetic runs."""

import dataclasses
import json
import math
import re

import numpy as np
import PIL.Image
import pytest
from scipy import stats

from diffusers_prx.files import write_json
from diffusers_prx.study.report import settings_that_differ, write_report
from diffusers_prx.study.results import constant_until
from diffusers_prx.study.spec import PLAN_FILE, flatten_numbers, load_study, record_path, register
from diffusers_prx.study.statistics import (
    equal_time_steps,
    holm,
    mean_difference,
    mean_ratio,
    paired_difference,
    seeds_needed,
    value_at,
    verdict,
)

# --- statistics


def test_paired_difference_equals_values_computed_by_hand():
    found = paired_difference({1: 0.5, 2: 0.7, 3: 0.6, 9: 5.0}, {1: 0.4, 2: 0.5, 3: 0.5, 8: -5.0})
    # 0.1, 0.2, 0.1: mean 2/15, standard deviation 0.1/sqrt(3), standard error 1/30, so t = 4
    assert found.n == 3  # seeds that one side lacks do not count
    half = 0.95 * math.sqrt(2 / (1 - 0.95**2)) / 30
    assert (found.mean, found.low, found.high) == pytest.approx((2 / 15, 2 / 15 - half, 2 / 15 + half))
    assert found.p == pytest.approx(1 - 4 / math.sqrt(2 + 4**2))
    assert not found.excludes_zero


def test_differences_without_spread_or_with_one_seed():
    assert paired_difference({1: 1.0}, {2: 1.0}) is None
    one = mean_difference({1: 0.3})
    assert (one.mean, one.low, one.high, one.p, one.excludes_zero) == (0.3, None, None, None, False)
    none = mean_difference({1: 0.0, 2: 0.0, 3: 0.0})
    assert (none.low, none.high, none.p, none.excludes_zero) == (0.0, 0.0, 1.0, False)
    same = mean_difference({1: -0.5, 2: -0.5, 3: -0.5})
    assert (same.low, same.high, same.p, same.excludes_zero) == (-0.5, -0.5, 0.0, True)


def test_intervals_cover_the_true_mean_in_95_percent_of_cases():
    rng = np.random.default_rng(0)
    intervals = [mean_difference(dict(enumerate(rng.normal(0.3, 2.0, 3)))) for _ in range(2000)]
    covered = np.mean([found.low <= 0.3 <= found.high for found in intervals])
    assert covered == pytest.approx(0.95, abs=0.015)  # three standard errors of a share of 2000


@pytest.mark.parametrize(
    ("values", "better", "expected", "expected_verdict"),
    [
        ([0.1, 0.11, 0.12], "higher", "better", "agrees"),
        ([0.1, 0.11, 0.12], "higher", "worse", "disagrees"),
        ([-0.1, -0.11, -0.12], "lower", "better", "agrees"),
        ([-0.1, -0.11, -0.12], "higher", None, "worse"),
        ([0.1, -0.11, 0.12], "higher", "better", "undecided"),
        ([0.1, 0.11], "higher", "better", "too few seeds"),
    ],
)
def test_verdicts(values, better, expected, expected_verdict):
    assert verdict(mean_difference(dict(enumerate(values))), better, expected) == expected_verdict


def test_holm_correction_equals_values_computed_by_hand():
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9})
    assert adjusted == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.9})


def test_seeds_needed_is_the_first_count_whose_interval_excludes_zero():
    found = mean_difference({1: 0.5, 2: -0.4, 3: 0.8})
    n = seeds_needed(found)
    spread = np.std([0.5, -0.4, 0.8], ddof=1)
    halves = [stats.t.ppf(0.975, k - 1) * spread / math.sqrt(k) for k in (n - 1, n)]
    assert halves[1] < found.mean <= halves[0]
    assert n > 10
    assert seeds_needed(mean_difference({1: 1.0, 2: -1.0})) is None
    assert seeds_needed(mean_difference({1: 1.0, 2: -0.9})) is None  # more than 1000
    assert seeds_needed(mean_difference({1: 1.0, 2: 1.0})) == 2


def test_mean_ratio_is_geometric():
    mean, low, high = mean_ratio([0.5, 2.0, 1.0])
    assert mean == pytest.approx(1)
    assert low * high == pytest.approx(1)
    assert mean_ratio([2.0]) == (pytest.approx(2.0), None, None)


def test_equal_time_steps_and_interpolation_of_curves():
    # the arm is twice as fast and has 100 steps that count, the reference 60: 60 steps take as long as 120 of the arm
    assert equal_time_steps(1.0, 2.0, 100, 60) == (100, 50)
    assert equal_time_steps(1.0, 2.0, 200, 60) == (120, 60)
    assert all(equal_time_steps(1 / (ratio / 7), 1.0, 240, 240)[0] <= 240 for ratio in range(1, 100))
    curve = [(10, 4.0), (20, 2.0), (40, 1.0)]  # 40 over the step, at every step
    assert [value_at(curve, step) for step in (10, 15, 32, 40)] == pytest.approx([4, 40 / 15, 40 / 32, 1], rel=1e-12)
    assert value_at(curve, 9) is None
    assert value_at(curve, 41) is None
    assert value_at([], 1) is None


# --- the study file


def study_values(**changes):
    values = {
        "name": "hand-made",
        "about": "Runs that nobody made.",
        "steps": 100,
        "seeds": [1, 2, 3],
        "recipe": "recipe.yaml",
        "metric": "score",
        "step_shares": {"lr_warmup_steps": 0.1, "lr_decay_steps": 0.4},
        "evaluations": {"long": {"num_prompts": 8}, "short": {"caption": "short"}},
        "metrics": {"score": {"better": "higher"}, "validation_loss": {"better": "lower", "label": "held-out loss"}},
        "arms": {
            "baseline": {"text": "Nothing changed."},
            "good": {"settings": {"repa_weight": 0.5}},
            "bad": {"step_shares": {"repa_until_step": 0.5}},
            "lost": {"comparable_loss": False},
            "more": {"starts_from": "good"},
        },
        "findings": {
            "gain": {"text": "It helps.", "arm": "good", "expected": "better", "published": {"FID": [18.2, 14.64]}},
            "harm": {"text": "It helps, too.", "arm": "bad", "expected": "better", "at_this_size": "It is small."},
            "crash": {"text": "It runs.", "arm": "lost"},
            "tuned": {"text": "Tuning helps.", "arm": "more", "metric": "short/score", "expected": "better"},
        },
    }
    return values | changes


def save_study(folder, **changes):
    (folder / "study.yaml").write_text(json.dumps(study_values(**changes)))
    return load_study(folder / "study.yaml")


def test_settings_evaluations_and_selection_of_arms(tmp_path):
    study = save_study(tmp_path, settings={"report_to": "none", "repa_weight": 0.1}, evaluation={"scenes": True})
    steps = {"max_train_steps": 100, "lr_warmup_steps": 10, "lr_decay_steps": 40}
    assert study.settings_of("good") == steps | {"report_to": "none", "repa_weight": 0.5}
    assert study.settings_of("bad")["repa_until_step"] == 50
    assert study.evaluations_of("good") == ["long"]
    assert study.evaluations_of("baseline") == study.evaluations_of("more") == ["long", "short"]
    assert study.evaluation_of("more", "short") == {"scenes": True, "caption": "short"}
    assert study.recipe_of("good") == tmp_path / "recipe.yaml"
    assert study.split_metric("short/score") == ("short", "score")
    assert study.split_metric("a/b") == ("long", "a/b")  # `a` is no evaluation
    assert study.select(["tuned"]) == ["baseline", "good", "more"]  # the arm, its reference, what it starts from
    assert study.select(["good"]) == ["good"]
    with pytest.raises(ValueError, match=r"`only`.*'gone'"):
        study.select(["gone"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 1}, "stepz"),
        ({"steps": True}, "`steps`"),
        ({"seeds": [1, 1]}, "`seeds`"),
        ({"recipe": None}, "baseline.*`recipe`"),
        ({"metrics": {"score": {"better": "more"}}}, "`metrics`: score: `better`"),
        ({"evaluations": {"training": {}}}, "`evaluations`"),
        ({"evaluations": {"long": 3}}, "`evaluations`: long"),
        ({"arms": {"baseline": {"needs": ["teacher"]}}, "findings": {}}, "baseline.*teacher"),
        ({"arms": {"a": {"starts_from": "b"}, "b": {}}, "findings": {}}, "`starts_from` 'b'"),
        ({"arms": {"a": {"step_shares": {"x": -1}}}, "findings": {}}, "`step_shares`"),
        ({"findings": {"gain": {"text": "x", "arm": "gone"}}}, "gain.*'gone'"),
        ({"findings": {"gain": {"text": "x", "arm": "good", "metric": "short/x"}}}, "gain.*'x'"),
        ({"findings": {"gain": {"arm": "good"}}}, "gain.*text"),
        ({"findings": {"gain": {"text": "x", "arm": "baseline"}}}, "`arm` and `reference`"),
        ({"findings": {"gain": {"text": "x", "arm": "good", "expected": "up"}}}, "`expected`"),
        ({"findings": {"gain": {"text": "x", "arm": "good", "published": {"FID": 3}}}}, "`published`"),
    ],
)
def test_invalid_study_files_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        save_study(tmp_path, **changes)


def test_numbers_of_a_report_are_flattened():
    report = {"score": 1, "metrics": {"FID (x)": {"value": 2.5, "interval": [1, 2]}}, "good": True, "name": "a"}
    assert flatten_numbers(report) == {"score": 1.0, "metrics.FID (x).value": 2.5}


# --- the plan


def test_plan_is_written_once_and_its_changes_are_appended(tmp_path):
    report_dir = tmp_path / "report"
    register(save_study(tmp_path), report_dir, "2026-01-01", "abc")
    first = (report_dir / "plan.json").read_text()
    register(save_study(tmp_path), report_dir, "2026-01-02", "def")
    assert (report_dir / "plan.json").read_text() == first
    text = (report_dir / "plan.md").read_text()
    assert "Stated on 2026-01-01 at commit abc, after 0 runs" in text
    assert "| It helps. | good | baseline | score | higher | better | 100 | 1, 2, 3 |" in text

    write_json(record_path(report_dir, "bad", 1), {})
    values = study_values()
    values["arms"]["extra"] = {}
    values["findings"]["gain"]["expected"] = None  # its arm has not been run
    register(save_study(tmp_path, **values), report_dir, "2026-01-03", "ghi")
    text = (report_dir / "plan.md").read_text()
    assert "Stated on 2026-01-01" in text
    assert "Changed on 2026-01-03 at commit ghi, after 1 runs: arms extra; findings gain" in text
    entries = json.loads((report_dir / PLAN_FILE).read_text())
    assert [entry["plan"]["findings"]["gain"]["expected"] for entry in entries] == ["better", None]


def test_texts_findings_and_evaluations_may_be_added_after_runs(tmp_path):
    report_dir = tmp_path / "report"
    register(save_study(tmp_path), report_dir, "2026-01-01", "abc")
    write_json(record_path(report_dir, "good", 1), {})
    values = study_values()
    values["findings"]["gain"]["text"] = "It helps a lot."
    values["findings"]["other"] = {"text": "It helps with short captions.", "arm": "good", "metric": "short/score"}
    register(save_study(tmp_path, **values), report_dir, "2026-01-02", "def")
    assert "after 1 runs: arms good; findings gain, other" in (report_dir / "plan.md").read_text()
    values["findings"].pop("other")
    with pytest.raises(ValueError, match="`arms`: good"):  # an evaluation that was stated is made
        register(save_study(tmp_path, **values), report_dir, "2026-01-03", "ghi")
    values["evaluations"] = {"long": {"num_prompts": 4}, "short": {}}
    with pytest.raises(ValueError, match="`arms`: good"):
        register(save_study(tmp_path, **values), report_dir, "2026-01-03", "ghi")


@pytest.mark.parametrize("kind", ["arms", "findings"])
def test_plans_of_arms_that_have_run_cannot_change(tmp_path, kind):
    report_dir = tmp_path / "report"
    register(save_study(tmp_path), report_dir, "2026-01-01", "abc")
    write_json(record_path(report_dir, "bad", 1), {})
    values = study_values()
    if kind == "arms":
        values["arms"]["bad"]["settings"] = {"repa_weight": 1.0}
    else:
        values["findings"]["harm"]["expected"] = "worse"
    with pytest.raises(ValueError, match=f"`{kind}`: {'bad' if kind == 'arms' else 'harm'}"):
        register(save_study(tmp_path, **values), report_dir, "2026-01-02", "def")
    with pytest.raises(ValueError, match="`arms`: bad"):
        register(save_study(tmp_path, steps=200), report_dir, "2026-01-02", "def")


# --- the report


@pytest.mark.parametrize(
    ("schedule", "decay", "warmup", "step"),
    [("constant", None, None, 400), ("linear", 40, None, 360), ("linear", None, 7, 7), ("cosine", None, None, 40)],
)
def test_constant_part_of_the_learning_rate_schedule(schedule, decay, warmup, step):
    settings = {"lr_scheduler": schedule, "lr_decay_steps": decay, "lr_warmup_steps": warmup, "max_train_steps": 400}
    assert constant_until({"config": settings}) == step


def save_run(report_dir, arm, seed, score, loss, short=None, failed=None, **config):
    """Save a record like those of `StudyRunner`, with a loss that halves every 20 steps."""
    settings = {"lr_scheduler": "linear", "lr_decay_steps": 40, "max_train_steps": 100, "lr_warmup_steps": 10}
    settings |= {"seed": seed, "repa_weight": 0.0, "resolution": 32, "transformer_config": {"depth": 2}}
    settings["validation_prompts"] = ["a circle", "a | square"]
    record = {
        "arm": arm,
        "seed": seed,
        "status": "failed" if failed else "finished",
        "trained": not failed,
        "failures": [{"stage": "training", "message": failed}] if failed else [],
        "jobs": 1,
        "threads": 1,
        "machine": {"cpu": "abacus", "cores": 2},
        "commit": "abc",
        "versions": {"torch": "2"},
        "steps": 100,
        "seconds_per_step": 0.5,
        "config": settings | config,
        "curve": [[step, loss * 2.0 ** (-step / 20)] for step in (20, 40, 60, 80, 100)],
        "evaluations": {} if failed else {"long": {"score": score}, "short": {"score": short or score}},
    }
    write_json(record_path(report_dir, arm, seed), record)
    PIL.Image.new("RGB", (64, 32), "red").save(record_path(report_dir, arm, seed).with_suffix(".png"))


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reported")
    study, report_dir = save_study(folder), folder / "report"
    register(study, report_dir, "2026-01-01", "abc")
    for seed in (1, 2, 3):
        save_run(report_dir, "baseline", seed, 0.5 + 0.01 * seed, 8.0, short=0.25)
        save_run(report_dir, "good", seed, 0.6 + 0.012 * seed, 6.0, repa_weight=0.5, transformer_config={"depth": 3})
        save_run(report_dir, "bad", seed, 0.5 + (0.2 if seed == 2 else -0.02), 8.0)
    save_run(report_dir, "lost", 1, 0, 1.0, failed="The loss is not finite at step 3")
    save_run(report_dir, "more", 1, 0.5, 8.0, short=0.75)
    timed = [
        {"arm": "good", "reference": "baseline", "repeat": i, "seconds_arm": 2.0, "seconds_reference": 1.0}
        for i in (0, 1)
    ]
    write_json(report_dir / "throughput.json", timed)
    path = write_report(study, report_dir)
    return path.read_text(), (report_dir / "report.html").read_text(), report_dir


def table_row(text, start):
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.split(" | ")]


def test_table_of_findings(reported):
    text = reported[0]
    gain = table_row(text, "`gain`: It helps.")
    assert gain[1:5] == ["good against baseline", "score, higher is better", "0.52", "0.624"]
    # 0.102, 0.104, 0.106: standard error 0.002/sqrt(3)
    half = 4.30265 * 0.002 / math.sqrt(3)
    low, high = (f"{bound:+.3g}" for bound in (0.104 - half, 0.104 + half))
    assert gain[5:8] == [f"+0.104 [{low}, {high}]", "3", "0.50 [0.50, 0.50]"]
    assert gain[9:] == ["better: FID 18.2 → 14.64 (-3.56)", "**agrees**; also after Holm's correction |"]
    harm = table_row(text, "`harm`: It helps, too.")
    assert harm[7:] == [
        "not timed",
        "not timed",
        "better: no number",
        "**undecided** |",
    ]  # the duration of runs is not throughput
    assert table_row(text, "`crash`: It runs.")[-1] == "**failed**; runs failed |"
    tuned = table_row(text, "`tuned`: Tuning helps.")
    assert tuned[3:7] == ["0.25", "0.75", "+0.5 [one seed: no interval]", "1 of 3"]
    assert tuned[-1] == "**too few seeds** |"
    assert "4 findings. agrees: 1, undecided: 1, failed: 1, too few seeds: 1." in text
    assert "about 0.1 of 2 intervals would exclude zero by chance; 1 do" in text
    assert "After Holm's correction for 2 questions, 1 remain: gain. 4 findings share" in text


def test_section_of_each_finding(reported):
    text = reported[0]
    gain = text[text.index("### gain: agrees") : text.index("### harm")]
    assert "- `repa_weight`: 0.0 → 0.5" in gain
    assert "- `transformer_config.depth`: 2 → 3" in gain
    assert table_row(gain, "2") == ["| 2", "0.52", "0.624", "+0.104 |"]
    # the arm takes twice as long: the rate is constant up to step 60 of it, or 120 of the reference, which has 60
    assert "At equal time (arm at step 30, reference at step 60)" in gain
    at_30 = 6.0 * 2 ** -(1 + math.log2(30 / 20))  # between its points at 20 and 40, on a line of the logarithms
    assert f"differ by {at_30 - 8.0 * 2**-3:+.3g} [" in gain
    loss = table_row(gain, "held-out loss (training), lower is better")
    assert loss[1:3] == [f"{8 * 2**-5:.4g}", f"{6 * 2**-5:.4g}"]
    harm = text[text.index("### harm: undecided") : text.index("### crash")]
    assert re.search(r"Why undecided: .* about \d+ seeds would decide it\. It is small\.", harm)
    assert "**Failed**: lost, seed 1: The loss is not finite at step 3" in text
    crash = text[text.index("### crash") : text.index("### tuned")]
    assert "held-out loss" not in crash  # its loss is not comparable


def test_every_planned_run_is_listed(reported):
    text = reported[0]
    assert "11 of 15 planned runs were made (5 arms, seeds 1, 2, 3). 1 failed, and 0 continued after a failure" in text
    assert table_row(text, "lost | 1")[2] == "failed: The loss is not finite at step 3"
    assert [table_row(text, f"lost | {seed}")[2] for seed in (2, 3)] == ["not run", "not run"]
    assert "machine: cpu abacus, cores 2" in text
    assert "runs at once: 1, threads of each: 1" in text
    assert "stated on 2026-01-01 (commit `abc`), before the first run" in text


def test_html_report_is_self_contained(reported):
    text, page, report_dir = reported
    assert page.count("data:image/png;base64,") == text.count("](pictures/") == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "a | square" in page
    assert "<strong>agrees</strong>" in page
    pictures = sorted((report_dir / "pictures").iterdir())
    assert [path.name for path in pictures] == ["curves.png", "differences.png", "samples.png"]
    assert sum(path.stat().st_size for path in pictures) < 200_000
    with PIL.Image.open(report_dir / "pictures" / "samples.png") as sheet:
        assert sheet.convert("RGB").getpixel((sheet.width - 10, 30)) == (255, 0, 0)


def test_dollar_signs_in_names_are_not_parsed_as_formulas(tmp_path):
    """matplotlib would parse the text after a dollar sign as a formula, and fail on an invalid one."""
    name = r"price $\frac{1$"
    finding = {"text": "It helps.", "arm": name, "expected": "better"}
    values = study_values()
    study = save_study(
        tmp_path,
        metrics={"score": {"better": "higher", "label": name}},
        arms={"baseline": values["arms"]["baseline"], name: values["arms"]["good"]},
        findings={name: finding},
    )
    register(study, tmp_path / "report", "2026-01-01", "abc")
    for seed in (1, 2, 3):
        save_run(tmp_path / "report", "baseline", seed, 0.5 + 0.01 * seed, 8.0)
        save_run(tmp_path / "report", name, seed, 0.6 + 0.012 * seed, 6.0)
    write_report(study, tmp_path / "report")
    assert len(list((tmp_path / "report" / "pictures").iterdir())) == 3


def test_report_names_changed_plans_and_differing_settings(tmp_path):
    study, report_dir = save_study(tmp_path), tmp_path / "report"
    with pytest.raises(ValueError, match=r"`report_dir`.*plan\.json"):
        write_report(study, report_dir)
    register(study, report_dir, "2026-01-01", "abc")
    save_run(report_dir, "baseline", 1, 0.5, 1.0)
    save_run(report_dir, "baseline", 2, 0.5, 1.0, repa_weight=0.1)
    study = save_study(tmp_path, seeds=[1, 2, 3, 4])
    register(study, report_dir, "2026-01-02", "def")
    text = write_report(study, report_dir).read_text()
    assert "**Changed** on 2026-01-02, after 2 runs: seeds [1, 2, 3] became [1, 2, 3, 4]." in text
    assert "**Warning**: the runs of baseline do not have the same settings." in text


def test_seeds_and_plans_of_existing_runs_are_required(tmp_path):
    study, report_dir = save_study(tmp_path), tmp_path / "report"
    register(study, report_dir, "2026-01-01", "abc")
    save_run(report_dir, "baseline", 3, 0.5, 1.0)
    with pytest.raises(ValueError, match=r"`seeds`.*seed_3"):
        register(save_study(tmp_path, seeds=[1, 2]), report_dir, "2026-01-02", "def")
    (report_dir / PLAN_FILE).unlink()
    with pytest.raises(ValueError, match=PLAN_FILE):
        register(study, report_dir, "2026-01-02", "def")


def test_findings_stated_after_runs_are_marked(tmp_path):
    study, report_dir = save_study(tmp_path), tmp_path / "report"
    early = dataclasses.replace(study, findings={name: study.findings[name] for name in list(study.findings)[1:]})
    register(early, report_dir, "2026-01-01", "abc")
    save_run(report_dir, "baseline", 1, 0.5, 1.0)
    register(study, report_dir, "2026-01-02", "def")
    text = write_report(study, report_dir).read_text()
    first = next(iter(study.findings))
    assert table_row(text, f"`{first}`: {study.findings[first].text}")[-1].endswith("stated after 1 runs |")
    assert text.count("stated after") == 1


def test_settings_that_differ_are_listed():
    old = {"seed": 1, "a": 1, "b": {"x": 1, "y": 2}, "c": {"x": 1}}
    new = {"seed": 2, "a": 1, "b": {"x": 3, "y": 2}, "c": {}, "of later code": 4}
    assert settings_that_differ(new, old) == ["`b.x`: 1 → 3", '`c`: {"x": 1} → {}']
