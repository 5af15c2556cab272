"""The scripts of docs/proof.md, whole, with --tiny; and what they refuse."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import jsft
from jsft import config as schema
from jsft.evaluation.models import find_targets
from jsft.hf.random_model import write_random_model

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("pretrained", "scratch", "fidelity", "fp8")


def proof(name: str, *arguments, **environment) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "scripts" / f"proof_{name}.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | environment)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_wrong_options(name):
    shown = proof(name, "--help")
    assert shown.returncode == 0 and "--tiny" in shown.stdout and f"scripts/proof_{name}.sh" in shown.stdout
    for arguments, said in (
        (["--tinny"], "unknown option '--tinny'"),
        (["--stages", "data,bake"], "unknown stage 'bake'; there are: data"),
        (["--stages"], "--stages needs a value"),
    ):
        done = proof(name, *arguments)
        assert done.returncode == 2 and done.stderr.startswith(f"proof_{name}: {said}"), done.stderr
        assert done.stderr.count("\n") == 1


def module_of(file: Path):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_recipes_resolve():
    module = module_of(ROOT / "configs" / "proof.py")
    assert len(module.RECIPES) == 18
    for recipe in module.RECIPES:
        config = schema.resolve(module.get_config(recipe))
        assert ("proof_tiny" in config.data.train) == recipe.endswith("_tiny")
        modes = {"fidelity_reference": "reference"}
        assert config.fidelity == modes.get(recipe.removesuffix("_tiny"), "best")


@pytest.mark.parametrize(
    "options, layers", [((), 10), (("--tiny",), 2), (("--size", "qwen3_4b"), 36)], ids=["neither", "tiny", "size"]
)
def test_the_base_model_has_the_size_that_the_options_name(monkeypatch, tmp_path, options, layers):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "proof")
    models = module_of(ROOT / "scripts" / "proof" / "models.py")
    monkeypatch.setattr(sys, "argv", ["models.py", "countdown", "train.parquet", str(tmp_path / "base"), *options])
    made = []
    monkeypatch.setattr(models, "countdown", lambda data, out, sizes: made.append(sizes["layers"]))
    assert models.main() == 0 and made == [layers]


def test_float8_criteria_hold_or_not():
    figures = module_of(ROOT / "scripts" / "proof" / "figures.py")
    learnt = lambda loss, held=1.0, solved=0.5: figures.Learnt(672, loss, held, {"mean": solved, "ci95": (0.4, 0.6)})
    wide = {f"bfloat16_seed{i}": learnt(loss) for i, loss in enumerate((0.500, 0.504, 0.498))}

    def holds(float8) -> list[str]:
        return [row.split("|")[-2].strip() for row in figures.fp8_criteria("gsm8k", wide | {"float8_seed0": float8})]

    assert holds(learnt(0.505)) == ["yes"] * 5
    assert holds(learnt(0.509)) == ["yes", "yes", "no", "yes", "yes"]  # farther than any two seeds
    assert holds(learnt(0.515)) == ["yes", "no", "no", "yes", "yes"]
    assert holds(learnt(0.505, held=1.02)) == ["yes", "yes", "yes", "no", "yes"]
    assert holds(learnt(0.505, solved=0.3)) == ["yes", "yes", "yes", "yes", "no"]
    assert holds(learnt(0.505)._replace(updates=600, solved=None)) == ["no", "yes", "yes", "yes", "not evaluated"]
    further = figures.fp8_criteria("gsm8k", wide | {"float8-none_seed0": wide["bfloat16_seed0"]})
    assert further[1].startswith("| gsm8k, forward none | training loss: within 0.01 |") and further[1].endswith(
        "| yes |"
    )
    assert figures.fp8_criteria("large", {"float8_seed0": learnt(0.5)}) == ["| large | both runs are there | | | no |"]


def test_float8_reads_the_scores_where_evaluation_writes_them(tmp_path):
    figures, run = module_of(ROOT / "scripts" / "proof" / "figures.py"), tmp_path / "run"
    model = write_random_model(run / "hf/step_224")
    (run / "checkpoints").mkdir()
    (run / "config.json").write_text("{}")
    (target,) = find_targets(str(model), None, run / "eval")
    for name, record in (("metrics", {"step": 1, "loss": 2.0}), ("heldout", {"step": 1, "heldout/loss": 3.0})):
        (run / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    assert figures.learnt(run, "gsm8k").solved is None
    solved = {"mean": 0.5, "ci95": [0.4, 0.6]}
    (target.out / "gsm8k").mkdir(parents=True)
    (target.out / "gsm8k/results.json").write_text(json.dumps({"metrics": {"reference": {"avg": solved}}}))
    assert figures.learnt(run, "gsm8k").solved == solved


@pytest.mark.vllm
def test_solve_samples_as_the_model_answers(serve_python, tmp_path):
    """Prompts of several lengths in one padded batch, greedily: most first tokens are those of our own generation."""
    base = write_random_model(tmp_path / "model", std=0.2)
    data = tmp_path / "data"
    data.mkdir()
    puzzles = [{"numbers": numbers, "target": 9} for numbers in ([4, 5], [1, 2, 3, 3], [12, 13, 14, 15, 16], [90, 81])]
    (data / "countdown.jsonl").write_text("".join(json.dumps(puzzle) + "\n" for puzzle in puzzles))
    command = [serve_python, ROOT / "scripts/proof/solve.py", base, tmp_path / "out", "--task", "countdown"]
    command += ["--data_dir", data, "--temperature", "0", "--max_tokens", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "countdown 0.0 %" in done.stdout and "4 problems x 1" in done.stdout
    samples = [json.loads(line) for line in (tmp_path / "out/countdown/samples.jsonl").read_text().splitlines()]
    ours = jsft.load_model(base).generate([sample["prompt"] for sample in samples], max_tokens=4)
    assert sum(sample["response"] == text != "" for sample, text in zip(samples, ours, strict=True)) >= 3, (
        samples,
        ours,
    )
    assert len(set(ours)) > 1


def whole(name: str, *arguments) -> tuple[Path, str]:
    """Runs a whole proof from scratch; its folder and its results."""
    folder = ROOT / "runs" / "proof_tiny" / name
    shutil.rmtree(folder, ignore_errors=True)
    done = proof(name, "--tiny", *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (folder / "curves.png").stat().st_size > 10_000
    return folder, (folder / "results.md").read_text()


def curve(run: Path, file: str, key: str) -> list[float]:
    return [json.loads(line)[key] for line in (run / file).read_text().splitlines()]


@pytest.mark.slow
def test_fidelity():
    folder, results = whole("fidelity")
    assert "the runs are bit-identical" in results and "SIGKILL after step" in results
    for mode in ("reference", "best"):
        losses = curve(folder / mode, "heldout.jsonl", "heldout/loss")
        assert losses[-1] < losses[0] - 1
    # The comparison can fail: the modes are different runs.
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/proof/same_run.py", folder / "best", folder / "reference"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1 and "metrics.jsonl: 60 of 60 steps differ" in done.stdout


@pytest.mark.slow
def test_fp8():
    folder, results = whole("fp8", "--no-serve", "--forward", "none")
    for what in ("gsm8k", "countdown", "large"):
        wide, float8 = (curve(folder / what / f"{p}_seed0", "metrics.jsonl", "loss") for p in ("bfloat16", "float8"))
        assert wide != float8 and wide[-1] < wide[0] - 0.5
        assert max(abs(a - b) for a, b in zip(wide, float8, strict=True)) < 0.1
        assert f"| {what} | training loss: within 0.01 |" in results and f"| {what} | float8 | 0 |" in results
        if what != "large":
            none = curve(folder / what / "float8-none_seed0", "metrics.jsonl", "loss")
            assert abs(none[0] - wide[0]) < 1e-3 * abs(float8[0] - wide[0])  # the forward pass is bfloat16's
            assert f"| {what}, forward none | training loss: within 0.01 |" in results
    assert "| gsm8k | training loss: within the spread of bfloat16's 3 seeds |" in results
    assert (folder / "gsm8k/float8_seed0/hf").is_dir() and not list(
        (folder / "large/float8_seed0/checkpoints").iterdir()
    )
    runs = [folder / f"gsm8k/{products}_seed0" for products in ("float8", "bfloat16")]
    command = [sys.executable, ROOT / "scripts/proof/both_products.py", *runs, "--updates", "4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    for run in runs:
        found = json.loads((run / "both_products.json").read_text())
        for losses in found.values():
            assert 0 < abs(losses["float8"] - losses["bfloat16"]) < 0.01
        assert found["heldout rows"]["bfloat16"] == pytest.approx(
            curve(run, "heldout.jsonl", "heldout/loss")[-1], abs=1e-4
        )
        # The weights of all updates but the last few are worse, those of the last ones as good.
        assert found["training rows"]["bfloat16"] == pytest.approx(curve(run, "metrics.jsonl", "loss")[-1], abs=0.1)


@pytest.mark.slow
@pytest.mark.vllm
def test_scratch():
    folder, results = whole("scratch")
    for run in ("cot", "answers"):
        losses = curve(folder / run, "heldout.jsonl", "heldout/loss")
        assert losses[-1] < losses[0] - 1
        found = json.loads((folder / run / "eval/step_12/countdown/results.json").read_text())
        assert found["problems"] == 20
    assert "| chain of thought | 12 |" in results


@pytest.mark.slow
@pytest.mark.vllm
def test_pretrained():
    folder, results = whole("pretrained")
    for ours, control in (("qwen2", "control"), ("internlm2", "control_llama")):
        for file, key in (
            ("metrics.jsonl", "loss"),
            ("metrics.jsonl", "grad_norm"),
            ("heldout.jsonl", "heldout/loss"),
        ):
            a, b = (curve(folder / run, file, key) for run in (ours, control))
            assert max(abs(x - y) / y for x, y in zip(a, b, strict=True)) < 2e-4, (ours, key)
        losses = curve(folder / ours, "metrics.jsonl", "loss")
        assert len(losses) == 12 and losses[-1] < losses[0] - 1
    # One function at first; then the output matrix of its own and Qwen2's biases make two models of it.
    first = [curve(folder / run, "metrics.jsonl", "loss") for run in ("qwen2", "internlm2")]
    assert abs(first[0][0] - first[1][0]) < 1e-5 < abs(first[0][-1] - first[1][-1])
    assert "| base | greedy |" in results and "| internlm2, step 12 | greedy |" in results
