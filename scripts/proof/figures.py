"""The curves of the proofs and their numbers.

    python scripts/proof/figures.py pretrained|scratch|fidelity|fp8 FOLDER

FOLDER is what the proof's script made. Writes curves.png and results.md there, from what there is of
metrics.jsonl, heldout.jsonl and results.json.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

STYLE = {
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
COLORS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8d6a9f")


def records(file: Path) -> list[dict]:
    """The lines of a file; [] where it is not there."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def curve(file: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(r["step"], r[key]) for r in records(file) if r.get(key) is not None]
    steps, values = (np.asarray(x, float) for x in zip(*pairs)) if pairs else (np.empty(0), np.empty(0))
    return steps, values


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over a centred window, shorter at the ends."""
    half = window // 2
    return np.asarray([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def draw_losses(axes, runs: dict[str, Path], window: int) -> None:
    """Training loss (thin: each step, thick: running mean) of each run; dashes where one may hide another."""
    for i, (color, (label, run)) in enumerate(zip(COLORS, runs.items())):
        steps, values = curve(run / "metrics.jsonl", "loss")
        axes.plot(steps, values, color=color, linewidth=0.5, alpha=0.3)
        dashes = {"dashes": (4, 3 * i)} if i else {}
        axes.plot(steps, smooth(values, window), color=color, linewidth=1.5, label=label, **dashes)
    axes.set(title="training loss", xlabel="update", ylabel="nats per trained token")
    axes.legend()


def draw_heldout(axes, runs: dict[str, Path]) -> None:
    for color, (label, run), marker in zip(COLORS, runs.items(), "os^d"):
        axes.plot(
            *curve(run / "heldout.jsonl", "heldout/loss"),
            marker=marker,
            ms=3.5,
            lw=1.1,
            color=color,
            label=label,
        )
    axes.set(title="held-out loss", xlabel="update", ylabel="nats per trained token")
    axes.legend()


def difference(one: Path, other: Path) -> dict[str, float]:
    """The difference between the training losses of two runs, over the steps that both have."""
    (a_steps, a), (b_steps, b) = (curve(run / "metrics.jsonl", "loss") for run in (one, other))
    _, i, j = np.intersect1d(a_steps, b_steps, return_indices=True)
    gap = a[i] - b[j]
    return {
        "steps": len(gap),
        "first": gap[0],
        "mean": gap.mean(),
        "rms": np.sqrt((gap**2).mean()),
        "largest": np.abs(gap).max(),
        "step_to_step": np.diff(a[i]).std(),
    }


def difference_row(name: str, one: Path, other: Path) -> str:
    d = difference(one, other)
    return (
        f"| {name} | {d['steps']} | {d['first']:+.5f} | {d['mean']:+.5f} | {d['rms']:.5f} "
        f"| {d['largest']:.5f} | {d['step_to_step']:.4f} |"
    )


DIFFERENCES = [
    "| training loss | updates | first update | mean | rms | largest | deviation from update to update |",
    "|---|---|---|---|---|---|---|",
]


def speed(run: Path) -> str:
    """Median tokens per second after the first steps, and the sum of all steps' times."""
    steps = records(run / "metrics.jsonl")
    rates = [r["tokens_per_second"] for r in steps[5:] or steps if r.get("tokens_per_second")]
    seconds = sum(r.get("seconds") or 0 for r in steps)
    text = f"{len(steps)} updates in {seconds:.0f} s"
    return text + (f", median {np.median(rates):,.0f} tokens/s" if rates else "")


def score(folder: Path) -> dict | None:
    """The results of a task's folder; None where it was not finished."""
    file = folder / "results.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    return found if "metrics" in found else None


def percent(entry: dict) -> str:
    low, high = entry["ci95"] or (float("nan"),) * 2
    return f"{100 * entry['mean']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def pretrained(folder: Path) -> tuple[Figure, list[str]]:
    runs = {"Qwen2, jsft": "qwen2", "Qwen2, torch": "control", "InternLM2, jsft": "internlm2"}
    runs["InternLM2 (as Llama), torch"] = "control_llama"
    runs = {label: folder / run for label, run in runs.items()}
    runs = {label: run for label, run in runs.items() if records(run / "metrics.jsonl")}
    lines = [
        "| run | speed |",
        "|---|---|",
        *(f"| {label} | {speed(run)} |" for label, run in runs.items()),
        "",
    ]
    lines += DIFFERENCES
    for name, one, other in (
        ("Qwen2: jsft - torch", "qwen2", "control"),
        ("InternLM2: jsft - torch", "internlm2", "control_llama"),
        ("jsft: Qwen2 - InternLM2", "qwen2", "internlm2"),
    ):
        if all(records(folder / run / "metrics.jsonl") for run in (one, other)):
            lines.append(difference_row(name, folder / one, folder / other))
    steps, _ = curve(folder / "qwen2/heldout.jsonl", "heldout/loss")
    numbers = " | ".join(f"{s:.0f}" for s in steps)
    lines += ["", f"| held-out loss after update | {numbers} |", "|---|" + "---|" * len(steps)]
    for label, run in runs.items():
        _, values = curve(run / "heldout.jsonl", "heldout/loss")
        lines.append(f"| {label} | {' | '.join(f'{v:.4f}' for v in values)} |")
    models = sorted((f.parent for f in folder.glob("eval/**/gsm8k/results.json") if score(f.parent)), key=_order)
    bars = []
    if models:
        lines += ["", "| model | sampling | correct, % (95 %) | strict | tokens | cut | problems x samples |"]
        lines += ["|" + "---|" * 7]
    for out in models:
        found = score(out)
        label, _, how = out.relative_to(folder / "eval").parts[0].rpartition("-")
        label = label.replace("models-qwen2", "base").replace("-hf-", ", ").replace("_", " ")
        entry = found["metrics"]["reference"]["avg"]
        bars.append((f"{label}\n{how}", entry))
        lines.append(
            f"| {label} | {how} | {percent(entry)} | {percent(found['metrics']['strict']['avg'])} "
            f"| {found['response']['tokens']['mean']:.0f} | {100 * found['response']['share_cut']:.1f} % "
            f"| {found['problems']} x {found['samples_per_problem']} |"
        )
    figure = Figure(figsize=(12 if len(bars) > 1 else 8, 3.6), layout="constrained")
    axes = figure.subplots(1, 3 if len(bars) > 1 else 2)
    draw_losses(axes[0], runs, 25)
    draw_heldout(axes[1], runs)
    if len(bars) > 1:
        draw_bars(axes[2], bars, "GSM8K test problems solved, vLLM")
    return figure, lines


def _order(folder: Path) -> tuple:
    """The base model first, then by step."""
    name = next(part for part in folder.parts[::-1] if part.rpartition("-")[2] in ("greedy", "avg4"))
    step = name.rpartition("step_")[2].partition("-")[0]
    return (int(step) if step.isdigit() else 0, name.rpartition("-")[0], name.endswith("avg4"))


def draw_bars(axes, bars: list, title: str) -> None:
    """Bars of (model and way of sampling, its entry): a colour for a model, paler where greedy."""
    models = list(dict.fromkeys(label.split("\n")[0] for label, _ in bars))
    for i, (label, entry) in enumerate(bars):
        model, how = label.split("\n")
        low, high = entry["ci95"] or (entry["mean"],) * 2
        error = [[100 * (entry["mean"] - low)], [100 * (high - entry["mean"])]]
        axes.bar(
            i,
            100 * entry["mean"],
            yerr=error,
            capsize=3,
            color=COLORS[models.index(model) % len(COLORS)],
            alpha=0.55 if how == "greedy" else 0.85,
        )
    axes.set_xticks(range(len(bars)), [label for label, _ in bars], rotation=45, ha="right", fontsize=7)
    axes.set(title=title, ylabel="percent")


def scratch(folder: Path) -> tuple[Figure, list[str]]:
    runs = {"chain of thought": folder / "cot", "answers only": folder / "answers"}
    runs = {label: run for label, run in runs.items() if records(run / "metrics.jsonl")}
    lines = [
        "| run | speed |",
        "|---|---|",
        *(f"| {label} | {speed(run)} |" for label, run in runs.items()),
        "",
    ]
    columns = (
        "run",
        "update",
        "tokens seen",
        "held-out loss",
        "solved, %",
        "95 %",
        "boxed, %",
        "tokens",
        "cut",
        "of",
    )
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for color, (label, run) in zip(COLORS, runs.items()):
        seen = np.cumsum([r["tokens"] for r in records(run / "metrics.jsonl")])
        held = dict(zip(*curve(run / "heldout.jsonl", "heldout/loss")))
        points = []
        for out in sorted((run / "eval").glob("step_*"), key=lambda p: int(p.name[5:])):
            found, step = score(out / "countdown"), int(out.name[5:])
            if not found:
                continue
            entry = found["metrics"]["solved"]["avg"]
            points.append((step, entry))
            tokens = seen[step - 1] / 1e6 if step else 0
            boxed = 100 * found["metrics"]["answered"]["avg"]["mean"]
            lines.append(
                f"| {label} | {step} | {tokens:.1f} M | {held.get(step, float('nan')):.4f} "
                f"| {percent(entry).replace(' [', ' | [')} | {boxed:.1f} "
                f"| {found['response']['tokens']['mean']:.0f} | {100 * found['response']['share_cut']:.1f} % "
                f"| {found['problems']} |"
            )
        if points:
            steps, means = [s for s, _ in points], np.asarray([100 * e["mean"] for _, e in points])
            bounds = np.asarray([[100 * x for x in e["ci95"] or (e["mean"],) * 2] for _, e in points])
            error = [means - bounds[:, 0], bounds[:, 1] - means]
            axes[2].errorbar(steps, means, error, marker="o", ms=4, capsize=3, color=color, label=label)
    draw_losses(axes[0], runs, 25)
    draw_heldout(axes[1], runs)
    axes[2].set(title="held-out puzzles solved, vLLM", xlabel="update", ylabel="percent", ylim=(0, 100))
    axes[0].set_yscale("log"), axes[1].set_yscale("log")
    if axes[2].get_legend_handles_labels()[0]:
        axes[2].legend()
    return figure, lines


def fidelity(folder: Path) -> tuple[Figure, list[str]]:
    runs = {
        "reference": folder / "reference",
        "best": folder / "best",
        "best, killed and resumed": folder / "killed",
    }
    runs = {label: run for label, run in runs.items() if records(run / "metrics.jsonl")}
    lines = ["| run | speed | last held-out loss |", "|---|---|---|"]
    for label, run in runs.items():
        lines.append(f"| {label} | {speed(run)} | {curve(run / 'heldout.jsonl', 'heldout/loss')[1][-1]:.5f} |")
    for name in ("killed", "same"):
        if (folder / f"{name}.txt").exists():
            lines += ["", *(f"    {line}" for line in (folder / f"{name}.txt").read_text().splitlines())]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    draw_heldout(axes[1], runs)
    for color, (label, run) in zip(COLORS, runs.items()):
        steps, values = curve(run / "metrics.jsonl", "nll")  # per token, whatever the objective's weights
        dashes = {"dashes": (4, 3)} if "killed" in label else {}
        axes[0].plot(steps, values, color=color, linewidth=1.2, label=label, **dashes)
    axes[0].set(title="training loss", xlabel="update", ylabel="nats per trained token", yscale="log")
    axes[0].legend()
    if "best, killed and resumed" in runs and "best" in runs:
        (a_steps, a), (b_steps, b) = (curve(folder / f"{run}/metrics.jsonl", "loss") for run in ("best", "killed"))
        _, i, j = np.intersect1d(a_steps, b_steps, return_indices=True)
        axes[2].plot(a_steps[i], a[i] - b[j], color=COLORS[2], linewidth=1.2)
        axes[2].set(title="loss, resumed less undisturbed", xlabel="update", ylabel="nats")
    return figure, lines


FP8_TASKS = {"gsm8k": "reference", "countdown": "solved", "large": None}  # and the metric of the problems solved


class Learnt(NamedTuple):
    """What a run of the float8 proof came to."""

    updates: int
    loss: float  # mean training loss of the last 100 updates, or of the second half of fewer
    held_out: float  # lowest
    solved: dict | None  # mean and ci95 of the problems solved


def learnt(run: Path, what: str) -> Learnt:
    _, loss = curve(run / "metrics.jsonl", "loss")
    _, held = curve(run / "heldout.jsonl", "heldout/loss")
    scores = (score(out) for out in sorted(run.glob(f"eval/step_*/{what}")))  # of the one update that was exported
    found, metric = next(filter(None, scores), None), FP8_TASKS[what]
    last = loss[-min(100, (len(loss) + 1) // 2) :].mean()
    return Learnt(len(loss), last, held.min(initial=np.inf), found["metrics"][metric]["avg"] if found else None)


def fp8_criteria(what: str, runs: dict[str, Learnt]) -> list[str]:
    """Rows of a table: does float8 learn as bfloat16 does? `runs` by name, as in float8_seed0 or float8-mlp_seed0."""
    wide, rows = runs.get("bfloat16_seed0"), []
    if wide:
        for name, run in runs.items():
            if name.startswith("float8"):
                label = what + name.removeprefix("float8").removesuffix("_seed0").replace("-", ", forward ")
                rows += _criteria(what, label, run, wide, runs)
    return rows or [f"| {what} | both runs are there | | | no |"]


def _criteria(what: str, label: str, float8: Learnt, wide: Learnt, runs: dict[str, Learnt]) -> list[str]:
    # The loss falls to the end: a run that is shorter would make the spread a large one.
    seeds = [r.loss for name, r in runs.items() if name.startswith("bfloat16") and r.updates == wide.updates]
    gap, spread = float8.loss - wide.loss, max(seeds) - min(seeds)
    rows = [
        ("both made the same updates", float8.updates, wide.updates, float8.updates == wide.updates),
        ("training loss: within 0.01", f"{float8.loss:.4f}", f"{wide.loss:.4f}", abs(gap) <= 0.01),
    ]
    if len(seeds) > 1:
        within = f"within the spread of bfloat16's {len(seeds)} seeds"
        rows.append((f"training loss: {within}", f"{gap:+.4f}", f"{spread:.4f}", abs(gap) <= spread))
    apart = float8.held_out - wide.held_out
    rows.append(
        ("held-out loss, lowest: within 0.01", f"{float8.held_out:.4f}", f"{wide.held_out:.4f}", abs(apart) <= 0.01)
    )
    table = [f"| {label} | {claim} | {a} | {b} | {'yes' if holds else 'no'} |" for claim, a, b, holds in rows]
    if FP8_TASKS[what]:
        claim = "solved, %: within bfloat16's interval"
        if float8.solved and wide.solved and wide.solved["ci95"]:
            low, high = wide.solved["ci95"]
            holds = "yes" if low <= float8.solved["mean"] <= high else "no"
            table.append(f"| {label} | {claim} | {percent(float8.solved)} | {percent(wide.solved)} | {holds} |")
        else:
            table.append(f"| {label} | {claim} | | | not evaluated |")
    return table


def fp8(folder: Path) -> tuple[Figure, list[str]]:
    """Float8 beside bfloat16, of the same seed; the further seeds of bfloat16 show how much a run differs anyway."""
    lines = ["| run | products | seed | updates | training loss, last 100 | held-out loss, lowest | solved, % (95 %) |"]
    lines += ["|" + "---|" * 7]
    criteria = ["", "| task | criterion | float8 | bfloat16 | holds |", "|" + "---|" * 5]
    figure = Figure(figsize=(12, 6.8), layout="constrained")
    for axes, what in zip(figure.subplots(2, 3).T, FP8_TASKS):
        there = sorted((folder / what).glob("*_seed*"), key=lambda run: (run.name.startswith("bfloat16"), run.name))
        folders = {run.name: run for run in there if records(run / "metrics.jsonl")}
        runs = {name: learnt(run, what) for name, run in folders.items()}
        for name, run in runs.items():
            products, _, seed = name.partition("_seed")
            lines.append(
                f"| {what} | {products} | {seed} | {run.updates} | {run.loss:.4f} | {run.held_out:.4f} "
                f"| {percent(run.solved) if run.solved else '-'} |"
            )
        criteria += fp8_criteria(what, runs)
        labelled = {name.replace("_seed", ", seed "): run for name, run in folders.items()}
        draw_losses(axes[0], labelled, 25 if max((run.updates for run in runs.values()), default=0) >= 100 else 1)
        draw_heldout(axes[1], labelled)
        axes[0].set_title(f"training loss, {what}")
        axes[1].set_title(f"held-out loss, {what}")
    return figure, lines + criteria


def main(proof: str, folder: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure, lines = PROOFS[proof](folder)
        figure.savefig(folder / "curves.png", dpi=130)
    (folder / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"{folder}/curves.png, {folder}/results.md")


PROOFS = {"pretrained": pretrained, "scratch": scratch, "fidelity": fidelity, "fp8": fp8}

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
