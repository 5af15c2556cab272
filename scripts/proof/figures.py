"""The curves of the proofs and their numbers.

    python scripts/proof/figures.py pretrained|scratch|fidelity|fp8 FOLDER

FOLDER is what the proof's script made. Writes curves.png and results.md there, from what there is of
metrics.jsonl, heldout.jsonl and results.json.
"""

import json
import sys
from pathlib import Path

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


def fp8(folder: Path) -> tuple[Figure, list[str]]:
    """Float8 beside bfloat16, of the same seed; the further seeds of bfloat16 show how much a run differs anyway."""
    lines = ["| run | products | seed | updates | training loss, last 100 | held-out loss, lowest | solved, % (95 %) |"]
    lines += ["|" + "---|" * 7]
    verdicts = [""]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, what in zip(figure.subplots(1, 3), ("gsm8k", "countdown", "large")):
        runs = {run.name: run for run in sorted((folder / what).glob("*_seed*")) if records(run / "metrics.jsonl")}
        losses = {}
        for name, run in runs.items():
            steps, loss = curve(run / "metrics.jsonl", "loss")
            losses[name] = loss[-min(100, len(loss) // 2) :].mean()
            _, held = curve(run / "heldout.jsonl", "heldout/loss")
            products, _, seed = name.partition("_seed")
            found = score(run / "eval" / what)
            metric = {"gsm8k": "reference", "countdown": "solved"}.get(what)
            solved = percent(found["metrics"][metric]["avg"]) if found and metric else "-"
            lines.append(
                f"| {what} | {products} | {seed} | {len(steps)} | {losses[name]:.4f} | {held.min():.4f} | {solved} |"
            )
        draw_losses(axes, {name.replace("_seed", ", seed "): run for name, run in runs.items()}, 25)
        axes.set_title(f"training loss, {what}")
        wide = [loss for name, loss in losses.items() if name.startswith("bfloat16")]
        if {"float8_seed0", "bfloat16_seed0"} <= set(losses):
            gap = losses["float8_seed0"] - losses["bfloat16_seed0"]
            spread = f"; bfloat16's seeds differ by {max(wide) - min(wide):.4f}" if len(wide) > 1 else ""
            lowest = [
                curve(runs[f"{p}_seed0"] / "heldout.jsonl", "heldout/loss")[1].min() for p in ("float8", "bfloat16")
            ]
            verdicts.append(
                f"- {what}: training loss {gap:+.4f}, lowest held-out loss {lowest[0] - lowest[1]:+.4f} in float8{spread}"
            )
    return figure, lines + verdicts


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
