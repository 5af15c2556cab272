"""jsft export: any step checkpoint of a run as a Hugging Face model directory.

It needs no accelerator (it runs on the CPU unless JAX_PLATFORMS says otherwise), holds one parameter at a time, and may
run during training.
"""

import argparse
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsft
from jsft.environments import PACKAGE, no_serving
from jsft.errors import CheckpointError, ConfigError, ModelError, run_command
from jsft.files import LATEST, latest_run
from jsft.help import Parser

_TOLERANCE = 0.01  # nats between jsft and vLLM, both in float32; in practice below 1e-4

_HELP = """\
examples:
  jsft export --step 640              step 640 of the run runs/latest
  jsft export --step all --workdir runs/qwen3_14b-math_cot_ep8
  jsft export --step latest --check   and compare it with checkpoint and vLLM

Writes the parameters after the given update(s) as a Hugging Face directory: safetensors shards with
index, and the base model's config, tokenizer, chat template, generation config and custom code.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0. Raises ConfigError, ModelError or CheckpointError."""
    arguments = _parse(argv)
    _prefer_cpu()
    from jsft.hf.push import check_push, push
    from jsft.run.manifest import list_steps, reading
    from jsft.run.saved import read_run

    workdir = _workdir(arguments.workdir)
    run = read_run(workdir)
    steps = _steps(arguments.step, list_steps(workdir), workdir)
    if arguments.push:
        if len(steps) > 1:
            raise ConfigError(f"--push uploads one step, --step {arguments.step} means {len(steps)}; name one")
        check_push(arguments.push, public=arguments.public)
    elif arguments.public:
        raise ConfigError("--public is for --push ORG/NAME")
    for step in steps:
        out = Path(arguments.out) if arguments.out else workdir / "hf"
        if not arguments.out or len(steps) > 1:
            out = out / f"step_{step}"
        with reading(workdir, step):  # a running training does not remove it meanwhile
            _export(workdir, run, step, out, arguments)
        if arguments.push:
            message = f"{run.get('name', 'unnamed')}, step {step} (jsft)"
            address = push(out, arguments.push, public=arguments.public, message=message)
            print(f"uploaded, {'public' if arguments.public else 'private'}: {address}")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("jsft export", "--step N [--workdir RUN] [--out DIR] [OPTIONS]", _HELP)
    parser.add_argument("--step", required=True, help="an update's number, several (10,20,40), 'latest' or 'all'")
    parser.add_argument("--workdir", help="the run's directory (default: what runs/latest points to)")
    parser.add_argument("--out", help="directory to write (default: WORKDIR/hf/step_N); with several steps, its parent")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the weights on disk")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare every tensor with the checkpoint, and log-probabilities with vLLM's where a serving environment "
        "is",
    )
    parser.add_argument(
        "--push", metavar="ORG/NAME", help="then upload the directory to the hub (token: HF_TOKEN or hf auth login)"
    )
    parser.add_argument("--public", action="store_true", help="with --push: everybody sees it (default: private)")
    return parser.parse_args(argv)


def _prefer_cpu() -> None:
    """Uses the CPU: the accelerators may be busy with training, and an export does not need one."""
    import jax

    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")


def _workdir(given: str | None) -> Path:
    if given:
        workdir = Path(given)
        if not workdir.is_dir():
            raise CheckpointError(f"--workdir {given} does not exist")
        return workdir
    workdir = latest_run()
    if workdir is None:
        raise CheckpointError(f"{LATEST} does not exist: no run was started here; name one with --workdir")
    print(f"run: {workdir} ({LATEST})")
    return workdir


def _steps(text: str, available: list[int], workdir: Path) -> list[int]:
    if not available:
        raise CheckpointError(f"{workdir} has no finished checkpoint yet")
    if text == "all":
        return available
    if text == "latest":
        return available[-1:]
    try:
        steps = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--step {text!r} is not a number, a list like 10,20, 'latest' or 'all'") from None
    if unknown := [step for step in steps if step not in available]:
        raise CheckpointError(
            f"{workdir} has no finished checkpoint of step {unknown[0]}; there are: {', '.join(map(str, available))}"
        )
    return steps


def _export(workdir: Path, run: dict[str, Any], step: int, out: Path, options: argparse.Namespace) -> None:
    """One step. options: the command line."""
    from jsft.hardware.mesh import make_mesh
    from jsft.hf.write import check_output, write_model
    from jsft.run.saved import open_step, trained_files

    started = time.monotonic()
    check_output(out, workdir / "base")
    saved = open_step(workdir, step, make_mesh())
    config = run["config"]
    stop, template = trained_files(saved.base, config)
    trained_by = saved.manifest.get("code", jsft.__version__)
    facts = {"run": run.get("name"), "step": step, "base_model": config.get("model.path"), "code": trained_by}
    card = _model_card(workdir, run, step, options.dtype, stop, trained_by, options.push)
    write_model(
        saved.parameters,
        saved.model,
        saved.base,
        out,
        options.dtype,
        eos_token_id=stop,
        chat_template=template,
        model_card=card,
        facts=facts,
        say=lambda line: print(f"note: {line}"),
    )
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"step {step}: {size / 1e9:.2f} GB in {time.monotonic() - started:.0f} s: {out}")
    if options.check:
        _check(saved.parameters, out, options.dtype, saved.mesh)


def _check(checkpoint, out: Path, dtype: str, mesh) -> None:
    """Prints how the written directory compares; raises ModelError where it should not differ and does."""
    from jsft.hf import verify
    from jsft.models.families import read_config

    model = read_config(out)
    if differing := verify.compare_weights(checkpoint, out, model, mesh, dtype):
        raise ModelError(f"{out} is wrong: {differing:,} weights differ from the checkpoint's; the disk may be bad")
    print(f"check: every weight equals the checkpoint's, rounded to {dtype}")
    prompts = verify.prompt_ids(out, limit=min(512, max(2, model.max_positions - 8)))
    ours = verify.log_probabilities(out, model, prompts, mesh)
    mean = sum(map(sum, ours)) / sum(map(len, ours))
    print(f"check: {sum(map(len, prompts))} tokens of {len(prompts)} prompts, mean log-probability {mean:.4f} nats")
    if verify.serving_python() is None:
        print(f"check: not compared with vLLM: {no_serving()}")
        return
    answers = verify.vllm_answers(out, prompts)
    difference = verify.largest_difference(ours, answers["log_probs"])
    print(f"check: largest difference to vLLM {answers['version']} in float32: {difference:.2e} nats")
    if not difference < _TOLERANCE:
        raise ModelError(f"{out}: jsft and vLLM differ by {difference:.3g} nats in float32 (allowed: {_TOLERANCE})")


def _model_card(
    workdir: Path, run: dict[str, Any], step: int, dtype: str, eos: int, trained_by: str, repository: str | None
) -> str:
    from jsft.hf.base_files import read_template
    from jsft.hf.model_card import Facts, find_license, model_card
    from jsft.models.families import read_config

    config, base = run["config"], workdir / "base"
    source = Path(str(config.get("model.path"))).expanduser()
    token = config.get("data.eos_token")
    return model_card(
        Facts(
            run.get("name", "unnamed"),
            step,
            config,
            read_config(base).family,
            find_license(base, source if source.is_dir() else None),
            f"{eos} `{token}`" if token else str(eos),
            dtype,
            f"trained by jsft {trained_by}, exported by commit {_commit()}",
            _scores(workdir, step),
            repository,
            read_template(base) is not None,
        )
    )


def _scores(workdir: Path, step: int) -> list[Any]:
    """The step's finished evaluations beside the base model's."""
    from jsft.errors import DataError
    from jsft.hf.model_card import Score
    from jsft.reporting.collect import read_run
    from jsft.reporting.tables import with_interval

    try:
        curves = read_run(workdir).curves.values()
    except DataError:  # nothing is evaluated, or a file is damaged: `jsft report` says which
        return []
    found = []
    for curve in curves:
        for point in curve.points:
            if point.step == step:
                base = with_interval(curve.base, curve) if curve.base else "–"
                found.append(Score(curve.title, curve.metric, with_interval(point, curve), base))
    return found


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


if __name__ == "__main__":
    run_command(main, CheckpointError)
