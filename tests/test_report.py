"""Reports: what is computed from hand-made results, what is written, and the page in a real browser."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jsft import report
from jsft.errors import ConfigError, DataError
from jsft.evaluation.behaviours import of_folder
from jsft.evaluation.tasks import TASKS
from jsft.reporting import comparison, tables
from jsft.reporting.collect import read_run, read_runs
from jsft.reporting.figures import all_figures


def write_result(run: Path, step: int, task: str, mean: float, *, half: float = 0.03, tokens: float = 900.0, **more):
    kind = TASKS[task]
    metrics = {m: {"meaning": "", "avg": {"mean": mean, "ci95": [mean - half, mean + half]}} for m in kind.metrics}
    results = {
        "state": "done",
        "task": task,
        "title": kind.title,
        "group": kind.group,
        "primary": kind.primary,
        "share": kind.share,
        "lower_is_better": kind.lower_is_better,
        "score": metrics[kind.primary]["avg"],
        "metrics": metrics,
        "problems": 100,
        "samples_per_problem": kind.samples,
        "response": {"tokens": {"mean": tokens, "ci95": None}, "share_cut": 0.1, "share_without_think_end": 0.25},
    } | more
    folder = run / "eval" / f"step_{step}" / task
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))


def write_run(path: Path, name: str, curves: dict[str, dict[int, float]], steps: int = 50) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"name": name, "config": {"model.path": "x"}}))
    for task, curve in curves.items():
        for step, mean in curve.items():
            write_result(path, step, task, mean, tokens=500 + step)
    lines = [
        {"step": n, "loss": 2 - n / steps, "lr": 1e-5, "grad_norm": 0.5, "tokens_per_second": 1000.0 + n}
        for n in range(1, steps + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    held = [{"step": n, "h/loss": 2.1 - n / 50, "h/document_loss": 9.0, "h/accuracy": 0.5} for n in (0, 50)]
    (path / "heldout.jsonl").write_text("".join(json.dumps(line) + "\n" for line in held))
    return path


CURVES = {
    "math500": {0: 0.70, 10: 0.65, 20: 0.62, 40: 0.69, 80: 0.75, 640: 0.86},
    "gpqa_diamond": {0: 0.30, 10: 0.25, 20: 0.22, 40: 0.28, 80: 0.29, 640: 0.28},
    "hexphi": {0: 0.10, 10: 0.12, 20: 0.20, 40: 0.30, 80: 0.30, 640: 0.05},
    "alpacaeval": {0: -1.0, 10: 0.5},
}


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "run", "qwen3_4b-math_cot_ep8", CURVES)


def test_dip_and_recovery(run):
    curves = read_run(run).curves
    assert list(curves) == [
        "math500",
        "gpqa_diamond",
        "alpacaeval",
        "hexphi",
    ]  # in the order of the paper's tables
    dip = curves["math500"].dip()
    assert (dip.deepest.step, dip.end.step) == (20, 80)  # 69.0 at step 40 is still below 70.0
    assert curves["gpqa_diamond"].dip().end is None
    worse = curves["hexphi"].dip()  # lower is better: its dip is a rise
    assert (worse.deepest.step, worse.end.step) == (40, 640)
    assert curves["alpacaeval"].dip() is None and curves["alpacaeval"].points[0].score == -1.0


def test_tables_name_the_papers_numbers(run):
    found = read_run(run)
    rows = {(row[0], row[1]): row[2:6] for row in comparison.last_table(found).rows}
    assert rows["MATH500", "0"] == ["70.0 [67.0, 73.0]", "70.8", "-0.8", "inside"]
    assert rows["GPQA-Diamond", "640"] == ["28.0 [25.0, 31.0]", "37.9", "-9.9", "higher"]
    assert rows["AIME 2024", "640"] == ["–", "30.7", "–", "–"]
    course = {row[0]: row[1:3] for row in comparison.course_table(found).rows}
    assert course["20"] == ["62.0 [59.0, 65.0]", "62.9"] and course["320"] == ["–", "86.3"]
    summary = {row[1]: row for row in tables.summary_table([found]).rows}
    assert summary["MATH500"][3:] == [
        "70.0",
        "62.0 @ 20",
        "80",
        "86.0 @ 640",
        "86.0 [83.0, 89.0] @ 640",
        "86.2",
    ]
    assert summary["HEx-PHI"][6] == "5.0 @ 640"  # best is lowest
    assert summary["GPQA-Diamond"][5] == "not yet"
    training = tables.training_table([found]).rows[0]
    assert training == ["qwen3_4b-math_cot_ep8", "50", "1.9800", "1.0000", "1.1", "0.500", "1,026"]


def test_report_is_written_whole(run, tmp_path, monkeypatch, capsys):
    other = write_run(tmp_path / "other", "other", {"math500": {0: 0.7, 640: 0.72}})
    write_result(other, 640, "aime24", 0.1, state="failed", reason="no judge")
    drawn = report._png(all_figures(read_runs([run]))["safety"][1])
    assert drawn.startswith(b"\x89PNG")
    monkeypatch.setattr(report, "_png", lambda figure: drawn)  # the others' SVG is drawn
    monkeypatch.setattr(sys, "argv", ["report", str(run), str(other), "--out", str(tmp_path / "out")])
    assert report.main() == 0
    out = tmp_path / "out"
    names = ["scores", "paper", "domains", "safety", "lengths", "training"]
    expected = {f"{n}.{s}" for n in names for s in ("png", "svg")} | {
        "report.md",
        "report.csv",
        "report.html",
    }
    assert {p.name for p in out.iterdir()} == expected
    rows = list(csv.DictReader((out / "report.csv").open()))
    row = next(r for r in rows if r["task"] == "math500" and r["step"] == "20" and r["metric"] == "reference")
    assert (row["mean"], row["paper_percent"], row["primary"]) == ("0.62", "62.9", "1")
    text = (out / "report.html").read_text()
    assert "no judge" in text and "qwen3_4b-math_cot_ep8: scores" in text
    assert "http://" not in text.replace("http://www.w3.org", "") and "<script" not in text
    assert "dip ends at step" in capsys.readouterr().out


def test_lines_that_are_drawn(run, tmp_path):
    figures = all_figures(read_runs([run, write_run(tmp_path / "b", "b", {"math500": {0: 0.7, 640: 0.8}})]))
    axes = {a.get_title(): a for a in figures["scores"][1].axes}
    panel = axes["MATH500: reference"]
    labelled = {line.get_label(): line for line in panel.get_lines()}
    assert list(labelled["qwen3_4b-math_cot_ep8"].get_ydata()) == [65.0, 62.0, 69.0, 75.0, 86.0]
    verticals = [line for line in panel.get_lines() if list(line.get_xdata()) == [80, 80]]
    assert len(verticals) == 1  # where the dip ends
    bases = [line for line in panel.get_lines() if list(line.get_ydata()) == [70.0, 70.0]]
    assert len(bases) == 2  # the base model's line of each run
    losses = {a.get_title(): a for a in figures["training"][1].axes}["loss"].get_lines()
    held = [line for line in losses if "held out" in str(line.get_label())]
    assert [list(line.get_ydata()) for line in held] == [[2.1, 1.1]] * 2  # per token only
    domain = figures["domains"][1].axes[0].get_lines()[0]
    assert domain.get_xdata()[-1] == pytest.approx(16.0) and domain.get_ydata()[-1] == pytest.approx(-2.0)


def test_what_responses_do_is_drawn_and_written(tmp_path, capsys):
    """Measured by the evaluation, or, for results of an earlier version, from its samples."""
    run = tmp_path / "run"
    for step, response in ((0, "It is 2."), (20, "It is 3. Wait, no: 2.")):
        write_result(run, step, "math500", 0.5)
        line = {"problem": "a", "sample": 0, "prompt": [{"role": "user", "content": "1+1?"}], "response": response}
        folder = run / "eval" / f"step_{step}" / "math500"
        (folder / "samples.jsonl").write_text(json.dumps(line | {"tokens": 50}) + "\n")
    measured = of_folder(run / "eval" / "step_20" / "math500") | {"loops": {"mean": 0.25, "ci95": None}}
    write_result(run, 40, "math500", 0.5, behaviours=measured)
    write_result(run, 80, "math500", 0.5)
    write_result(run, 160, "math500", 0.5)
    (run / "eval" / "step_160" / "math500" / "samples.jsonl").write_text("{}\n")
    found = read_runs([run])
    said = capsys.readouterr().out
    assert said.count("measuring what its responses do") == 3 and said.count("line 1 is no sample") == 1
    axes = {a.get_title(): a for a in all_figures(found)["behaviours"][1].axes}
    course, base = axes["backtracking"].get_lines()
    assert list(course.get_xdata()) == [20, 40] and list(course.get_ydata()) == [100, 100]
    assert base.get_ydata()[0] == 0 and list(axes["loops"].get_lines()[0].get_ydata()) == [0, 25]
    assert list(axes["answer tokens"].get_lines()[0].get_ydata()) == [50, 50]
    rows = {row[0]: row[1:] for row in tables.behaviour_table(found[0]).rows}
    assert rows["MATH500 at 20"] == ["100.0", "0.0", "0.0", "0.0", "0.0", "20.00", "0.00", "0.00", "0", "50"]
    assert "MATH500 at 80" not in rows
    lines = list(csv.DictReader(tables.csv_text(found).splitlines()))
    assert {line["step"]: line["backtracking"] for line in lines} == {
        "0": "0.0",
        "20": "1.0",
        "40": "1.0",
        "80": "",
        "160": "",
    }


def test_training_alone_and_evaluation_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_png", lambda figure: b"")
    trained = write_run(tmp_path / "trained", "t", {})
    with (trained / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 51, "lo')  # being written
    assert list(all_figures(read_runs([trained]))) == ["training"]
    evaluated = tmp_path / "evaluated"
    write_result(evaluated, 0, "math500", 0.5)
    assert "scores" in all_figures(read_runs([evaluated]))
    report.write_report(read_runs([evaluated]), tmp_path / "out")
    first = (tmp_path / "out" / "report.html").read_text()
    report.write_report(read_runs([evaluated]), tmp_path / "out")
    assert (tmp_path / "out" / "report.html").read_text() == first  # the same results give the same page


def test_scores_of_problems_are_read_where_they_fit(run):
    folder = run / "eval" / "step_20" / "math500"
    results = json.loads((folder / "results.json").read_text()) | {"settings": {"rows": "abc", "limit": None}}
    (folder / "results.json").write_text(json.dumps(results))
    for scores, fit in (([1.0] * 62 + [0.0] * 38, True), ([1.0] * 100, False), ([0.62], False), ({}, False)):
        (folder / "per_problem.json").write_text(json.dumps(scores))
        point = read_run(run).curves["math500"].points[2]
        assert (point.problems is not None) is fit and point.asked == ("abc", None, None)


@pytest.mark.parametrize("make, message", [(False, "is no directory"), (True, "holds nothing to report")])
def test_nothing_to_report(tmp_path, make, message):
    path = tmp_path / "empty"
    if make:
        path.mkdir()
    with pytest.raises(DataError, match=message):
        read_run(path)


def test_bare_report_without_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report"])
    with pytest.raises(ConfigError, match="there is no runs/latest here"):
        report.main()


def test_broken_lines_name_their_place(run):
    (run / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(DataError, match="metrics.jsonl, line 2: not JSON"):
        read_run(run)


@pytest.mark.parametrize("line", [b'{"step": 2, "x": "\xff"}', b"[2]", b'{"loss": 1}', b'{"step": "2"}'])
def test_lines_of_other_bytes_or_shapes_name_their_place(run, line):
    for name in ("metrics", "heldout"):
        (run / f"{name}.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
        with pytest.raises(DataError, match=rf"{name}.jsonl, line 2: .*; remove the line$"):
            read_run(run)
        (run / f"{name}.jsonl").write_bytes(b'{"step": 1}\n' + line[:8])
    read_run(run)  # a torn last line is being written


@pytest.mark.parametrize(
    "text", [b"[]", b"\xff", b'{"state": "done"}', b'{"state": "done", "task": "x", "share": true, "score": 3}']
)
def test_results_of_other_shapes_name_their_file(run, text):
    file = next(run.glob("eval/*/*/results.json"))
    file.write_bytes(text)
    with pytest.raises(DataError, match=re.escape(str(file))):
        read_run(run)


NAMES = [
    "=cmd|'/c calc'!A1",
    "$\\frac{",
    "_hidden",
    "<script>alert(1)</script> [a](javascript:b) `c` | *d*",
    "a\udcff\x01\nb",
]


def test_names_are_names_in_every_form_of_a_report(tmp_path, monkeypatch):
    """No formula of a spreadsheet or of mathematics, no HTML, no link: and every figure is drawn."""
    monkeypatch.setattr(report, "_png", lambda figure: b"")  # its SVG has been drawn
    curves = {task: {0: 0.5, 10: 0.4} for task in ("math500", "gpqa_diamond", "hexphi")}
    runs = read_runs([write_run(tmp_path / str(i), name, curves) for i, name in enumerate(NAMES)])
    printed = report.write_report(runs, tmp_path / "out")
    markdown = (tmp_path / "out" / "report.md").read_text()
    rows = list(csv.reader((tmp_path / "out" / "report.csv").open(newline="")))
    assert {row[0] for row in rows[1:]} == {"'" + NAMES[0], *NAMES[1:4], NAMES[4].replace("\udcff", "\\udcff")}
    assert "\\<script\\>alert(1)\\</script\\> [a]\\(javascript:b) \\`c\\` \\| \\*d\\*" in markdown
    assert printed.replace("\n", "").isprintable() and NAMES[3][:20] in printed
    assert "<script>" not in markdown and "\\$\\\\frac{" in markdown and "\\_hidden" in markdown
    assert "<script>" not in (tmp_path / "out" / "report.html").read_text()
    legend = {text.get_text() for text in all_figures(runs)["training"][1].legends[0].get_texts()}
    assert {" _hidden", "\\$\\frac{"} <= legend


def test_page_in_a_browser(run, tmp_path):
    """No request leaves the page, nothing is wrong on its console, and every figure is shown."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    report.write_report(read_runs([run]), tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
    look = (
        "<script>onload=()=>{let i=[...document.images];document.title='shown "
        "'+i.filter(x=>x.naturalWidth>100).length"
        "+' of '+i.length+', fetched "
        "'+performance.getEntriesByType('resource').filter(r=>!r.name.startsWith('data:'))"
        ".length+', table '+(document.querySelector('table').offsetWidth>300)}</script></body>"
    )
    probe = tmp_path / "out" / "probe.html"
    probe.write_text(page.replace("default-src 'none'", "default-src 'unsafe-inline'").replace("</body>", look))
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--virtual-time-budget=3000",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        probe.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "<title>shown 6 of 6, fetched 0, table true</title>" in done.stdout, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr
