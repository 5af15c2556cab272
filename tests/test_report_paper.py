"""The paper beside ours: the published scores, tables and figure of the whole grid, and the verdicts on its claims.

Scores are made up, but those of published.csv.
"""

import csv
import re
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from jsft import report
from jsft.evaluation.tasks import TASKS
from jsft.reporting import claims, comparison, published
from jsft.reporting.claims import CLAIMS, FAILS, HOLDS, UNKNOWN, Evidence, Score
from jsft.reporting.collect import Curve, Point, Run
from jsft.reporting.figures import paper_figure

ROOT = Path(__file__).parents[1]
BENCHMARKS = [task for task in TASKS if task not in ("aime25", "gsm8k", "countdown")]
RECIPES = re.findall(r"^\| `(\w+)\.py:(\w+)` \| (\S+) \|", (ROOT / "docs" / "recipes.md").read_text(), re.MULTILINE)


def test_published_names_are_those_of_the_recipes():
    assert len(RECIPES) == 33
    for base, recipe, name in RECIPES:
        assert published.Published(base, recipe).name == name
        assert published.find(name) == published.find(f"{base}-{recipe}") == (base, recipe)
    assert published.find("qwen3_4b-mine") is None


def test_what_a_config_changes_is_named():
    run = published.Published("qwen3_14b", "math_cot_lr1e4_ep16_const")
    fields = {"optimizer.learning_rate": 1e-4, "train.epochs": 16.0, "train.global_batch": 256, "train.max_steps": None}
    fields |= {"optimizer.schedule": "constant", "fidelity": "reference", "data.train": "mine.parquet"}
    assert run.changes(fields) == run.changes({}) == []
    other = {"fidelity": "best", "optimizer.learning_rate": 1e-5, "train.max_steps": 20}
    assert run.changes(fields | other) == ["fidelity=best", "optimizer.learning_rate=1e-05", "train.max_steps=20"]
    for base, recipe, _ in RECIPES:
        assert published.Published(base, recipe).changes({"train.epochs": 0}) == ["train.epochs=0"]


def test_every_row_of_the_published_scores_can_be_used():
    with (files("jsft.reporting") / "published.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    recipes = {(base, recipe) for base, recipe, _ in RECIPES}
    for row in rows:
        assert row["metric"] in TASKS[row["task"]].metrics and row["source"] and int(row["transcriptions"]) in (1, 2, 3)
        assert (row["base"], row["recipe"]) in recipes if row["recipe"] else row["base"] in published.BASES
        assert (row["update"] == "0") is (row["recipe"] == "")
        assert row["value"] or "unreadable" in row["doubt"]
        if row["value"] and row["task"] != "alpacaeval":
            assert 0 <= float(row["value"]) <= 100
    keys = [(r["base"], r["recipe"], r["update"], r["task"], r["metric"]) for r in rows]
    assert len(set(keys)) == len(keys)
    assert sum(1 for base in published.BASES if any(k[0] == base and k[1] == "" for k in keys)) == 8
    last = {(k[0], k[1]) for k in keys if k[1] and k[2] == "640"}
    assert len(last) == 20  # 17 of the tables, and the ends of three curves


def test_scores_of_a_run_begin_with_its_base_model():
    scores = published.find("qwen3_1_7b-math_cot_ep8").scores
    assert [scores["math500", "reference"][n].value for n in (0, 40, 640)] == [58.9, 42.9, 56.2]
    assert scores["mmlu_pro", "reference"][640].mark == "?"  # equal to IFEval's: perhaps a slip
    assert published.find("qwen3_14b-math_cot_ep8").scores["truthfulqa", "info"][640].value == 95.6
    assert published.find("qwen3_8b-math_cot_ep8").scores["math500", "reference"][640].mark == "*"
    unread = published.find("internlm2_5_20b-math_nocot_ep8").scores
    assert 640 not in unread["alpacaeval", "reward"] and unread["aime24", "reference"][640].value == 5.0
    only_base = published.find("qwen2_5_7b-math_cot_ep8").scores
    assert {step for found in only_base.values() for step in found} == {0}


def made_run(base: str, recipe: str, scores: dict[str, dict[int, float]], half: float = 3.0, **more) -> Run:
    curves = {}
    for task, course in scores.items():
        kind, points = TASKS[task], []
        for step, score in course.items():
            results = {"metrics": {}, "problems": 100, "samples_per_problem": 1, "settings": {"limit": None}}
            if task == "truthfulqa":
                results["metrics"]["info"] = {"avg": {"mean": 0.9, "ci95": [0.88, 0.92]}}
            points.append(Point(step, score, score - half, score + half, 900.0, 0.0, 0.0, results))
        curves[task] = Curve(task, kind.title, kind.group, kind.primary, kind.share, kind.lower_is_better, points)
    run = published.Published(base, recipe)
    return Run(f"{base}-{recipe}", Path("x"), curves, [], [], [], run, **more)


def grid() -> list[Run]:
    """All 33 runs on all ten benchmarks: base model, a dip at 20, the last update."""
    runs = []
    for number, (base, recipe, _) in enumerate(RECIPES):
        last = 80 if "ep1" in recipe and "bs32" not in recipe else 640
        course = {0: 40.0, 20: 30.0, last: 50.0 + number / 10}
        runs.append(made_run(base, recipe, dict.fromkeys(BENCHMARKS, course)))
    return runs


def test_the_whole_grid_beside_the_paper():
    runs = grid()
    table = comparison.grid_table(runs)
    assert len(table.rows) == 33 and table.header[1:] == [TASKS[task].title for task in BENCHMARKS]
    cells = {row[0]: dict(zip(table.header[1:], row[1:], strict=True)) for row in table.rows}
    assert cells["qwen3_14b-math_cot_ep8"]["MATH500"] == "50.0 / 95.1"
    assert cells["qwen3_8b-countdown_ep8"]["AIME 2024"] == "51.6 / 26.0*"
    assert cells["internlm2_5_20b-numina_ep8"]["AlpacaEval (reward)"] == "53.00 / -1.55*?"
    assert cells["qwen2_5_3b-math_cot_ep8"]["MATH500"].endswith("/ –")
    assert all(cell["HEx-PHI"].endswith("/ –") for cell in cells.values())
    lasts = [table for run in runs if (table := comparison.last_table(run))]
    assert len(lasts) == 32  # nothing is published of Qwen2.5-3B
    courses = [run.name for run in runs if comparison.course_table(run)]
    assert courses == [f"qwen3_{size}-math_{kind}_ep8" for size in ("4b", "1_7b") for kind in ("cot", "nocot")]
    panels = paper_figure(runs).axes
    assert [axes.get_title() for axes in panels] == [TASKS[task].title for task in BENCHMARKS if task != "hexphi"]
    assert len(panels[0].get_yticks()) == 20
    table = comparison.claims_table(runs)
    assert {row[0].partition(":")[0]: row[1] for row in table.rows}["dip and recovery"] == HOLDS
    assert max(map(len, table.text().splitlines())) < 80


@pytest.mark.slow
@pytest.mark.filterwarnings("error::UserWarning")  # a figure without room for its panels
def test_the_report_of_the_whole_grid_is_written(tmp_path):
    written = report.write_report(grid(), tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The paper's claims" in written and all(f"{base}-{recipe}" in page for base, recipe, _ in RECIPES)


def test_one_run_beside_the_paper_names_doubts_metrics_and_our_arithmetic():
    run = made_run("qwen3_14b", "math_cot_ep8", {"gpqa_diamond": {0: 40.0, 640: 63.0}, "truthfulqa": {640: 80.0}})
    run.changes = ["fidelity=best"]
    run.curves["gpqa_diamond"].points[1].results["settings"]["limit"] = 100
    table = comparison.last_table(run)
    rows = {(row[0], row[1]): row[2:] for row in table.rows}
    assert rows["GPQA-Diamond", "0"] == ["40.0 [37.0, 43.0]", "41.8?", "-1.8", "inside", "100 x 1"]
    assert rows["GPQA-Diamond", "640"][-1] == "100 x 1!"
    assert rows["TruthfulQA, info", "640"][:4] == ["90.0 [88.0, 92.0]", "95.6", "-5.6", "higher"]
    assert rows["TruthfulQA", "640"][:3] == ["80.0 [77.0, 83.0]", "–", "–"]
    assert max(map(len, table.text().splitlines())) < 80 and "AlpacaEval" in table.text()
    assert "GPQA-Diamond at 0: Table 2 says 44.1" in table.note and "(fidelity=best)" in table.note
    assert (
        comparison.grid_table([run]) is None
        and comparison.last_table(made_run("qwen2_5_3b", "math_cot_ep8", {})) is None
    )


def evidence(base: str, recipe: str, error: float = 1.0, **scores) -> Evidence:
    return Evidence(recipe, base, recipe, {t: {u: Score(v, error) for u, v in c.items()} for t, c in scores.items()})


def verdict(topic: str, *runs: Evidence) -> str:
    (claim,) = [claim for claim in CLAIMS if claim.topic == topic]
    return claims.judge(claim, list(runs)).verdict


COT, NOCOT = "math_cot_ep8", "math_nocot_ep8"


@pytest.mark.parametrize(
    "course, expected",
    [
        ({0: 50, 20: 40, 80: 45, 640: 60}, HOLDS),
        ({0: 50, 20: 40, 80: 41, 640: 42}, FAILS),  # not made up
        ({0: 50, 20: 52, 80: 55, 640: 60}, FAILS),  # no dip
        ({0: 50, 20: 48, 80: 55, 640: 60}, UNKNOWN),  # a dip within noise
        ({0: 50, 20: 40, 80: 41, 640: 49}, UNKNOWN),  # nearly made up
        ({0: 50, 80: 40, 640: 60}, UNKNOWN),  # no early update
        ({20: 40, 640: 60}, UNKNOWN),  # no base model
    ],
)
def test_a_dip_needs_a_fall_and_a_recovery_beyond_noise(course, expected):
    assert verdict("dip and recovery", evidence("qwen3_4b", COT, ifeval=course)) == expected
    assert verdict("dip and recovery", evidence("qwen3_1_7b", COT, ifeval=course)) == UNKNOWN  # too small a base
    assert verdict("dip and recovery", evidence("qwen3_4b", NOCOT, ifeval=course)) == UNKNOWN


@pytest.mark.parametrize("last, expected", [(60, HOLDS), (40, FAILS), (51, UNKNOWN)])
def test_verdicts_follow_the_sign_beyond_noise(last, expected):
    opposite = {HOLDS: FAILS, FAILS: HOLDS, UNKNOWN: UNKNOWN}[expected]
    course = {0: 50, 640: last}
    assert verdict("data quality: verified long thinking", evidence("qwen3_4b", COT, mmlu_pro=course)) == expected
    numina = evidence("qwen3_8b", "numina_ep8", math500=course)
    assert verdict("data quality: short unverified solutions", numina) == opposite
    pairs = {
        "repetition beats coverage": ("math_cot_2_5k_ep8_bs32", "math_cot_ep1_bs32", "math500"),
        "overfitting": ("math_cot_ep16", "math_cot_lr1e4_ep16_const", "math500"),
        "data structure: thinking": (COT, NOCOT, "gpqa_diamond"),
        "safety: thinking": (COT, NOCOT, "hexphi"),
    }
    for topic, (first, second, task) in pairs.items():
        runs = [evidence("qwen3_14b", first, **{task: {640: last}}), evidence("qwen3_14b", second, **{task: {640: 50}})]
        assert verdict(topic, *runs) == expected
        assert verdict(topic, runs[0], runs[1]._replace(base="qwen3_8b")) == UNKNOWN  # of another base model
    large = evidence("qwen3_14b", "countdown_ep8", math500=course)
    small = evidence("qwen3_1_7b", "countdown_ep8", math500={0: 20, 640: 20})
    assert verdict("capability: a toy game", large, small) == expected
    assert verdict("capability: a toy game", large) == UNKNOWN


def test_safety_falls_only_where_reasoning_gains():
    def run(reasoning, attacks):
        return evidence("qwen3_14b", COT, mmlu_pro={0: 50, 640: reasoning}, hexphi={0: 20, 640: attacks})

    topic = "reasoning gains, safety falls"
    assert verdict(topic, run(60, 40)) == HOLDS
    assert verdict(topic, run(60, 10)) == verdict(topic, run(40, 40)) == FAILS
    assert verdict(topic, run(60, 21)) == verdict(topic, run(51, 40)) == UNKNOWN


def test_the_same_problems_are_compared_one_by_one():
    """Of 100 problems the run solves 60, ten more than its base model, which it loses none of."""
    base, run = (np.repeat([1.0, 0.0], [solved, 100 - solved]) for solved in (50, 60))
    topic = "data quality: verified long thinking"

    def judged(asked):
        scores = {0: Score(50, 5.0, base, ("a",)), 640: Score(60, 4.9, run, asked)}
        return verdict(topic, Evidence("x", "qwen3_4b", COT, {"mmlu_pro": scores}))

    assert judged(("a",)) == HOLDS and judged(("b",)) == UNKNOWN  # other problems
    d = claims.difference({"mmlu_pro": Score(60, 4.9, run)}, {"mmlu_pro": Score(50, 5.0, base)}, ["mmlu_pro"])
    assert d.error == pytest.approx(100 * np.sqrt(0.1 * 0.9 / 99))
    same = Score(50, 5.0, base)
    assert claims.difference({"mmlu_pro": same}, {"mmlu_pro": same}, ["mmlu_pro"]).error == pytest.approx(50**0.5)


def test_no_interval_gives_no_verdict_and_runs_that_disagree_give_none():
    topic = "data quality: verified long thinking"
    sure = evidence("qwen3_4b", COT, mmlu_pro={0: 50, 640: 60})
    assert verdict(topic, evidence("qwen3_4b", COT, None, mmlu_pro={0: 50, 640: 60})) == UNKNOWN
    (claim,) = [claim for claim in CLAIMS if claim.topic == topic]
    found = claims.judge(claim, [sure, evidence("qwen3_8b", COT, mmlu_pro={0: 60, 640: 50})])
    assert found.verdict == UNKNOWN and found.text.startswith("the runs disagree: ")
    assert claims.judge(claim, []).text.startswith("needs math_cot_ep8 with evaluations of update 0")


def test_the_papers_own_scores_bear_out_its_claims():
    """All but overfitting and safety, of which no score was found."""
    runs = [found for run in published.all_runs() if (found := claims.as_published(run))]
    assert len(runs) == 20
    verdicts = {claim.topic: claims.judge(claim, runs).verdict for claim in CLAIMS}
    unsaid = {"overfitting", "reasoning gains, safety falls", "safety: thinking"}
    assert verdicts == {topic: UNKNOWN if topic in unsaid else HOLDS for topic in verdicts}
