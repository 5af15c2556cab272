"""Benchmarks a model, a run's steps or a published checkpoint, with vLLM or a server.

examples:
  jsft evaluate --tasks math500,aime24 --steps all     of the run runs/latest
  jsft evaluate runs/my-run/hf/step_640 --tasks gsm8k  a model directory
  jsft evaluate --url http://localhost:8000            a server with the model

vLLM runs in the serving environment: JSFT_SERVE_VENV names it (a checkout's default: .venv-serve, which
scripts/eval_vllm.sh makes). Results go to <workdir>/eval/step_<N>/<task>/ as results.json and samples.jsonl;
see docs/evaluation.md.
"""

import argparse
import dataclasses
import os
import re
import signal
import sys
from pathlib import Path

from jsft import environments
from jsft.errors import CheckpointError, ConfigError, JsftError, explained, run_command
from jsft.evaluation.judges import ROLES, parse_judges
from jsft.evaluation.models import Target, find_targets, model_digest
from jsft.evaluation.openai_engine import OpenAIEngine
from jsft.evaluation.runner import Model, Options, Outcome, run_tasks
from jsft.evaluation.tasks import TASKS, get_task
from jsft.evaluation.vllm_engine import VllmEngine, VllmSettings, check_gpus, check_model_dir
from jsft.help import Parser

_ENTERED = "JSFT_EVALUATES_WITH"  # the Python that a process was replaced by: once is enough


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("jsft evaluate", "[MODEL] [--tasks NAMES] [--steps STEPS] [OPTIONS]", __doc__)
    add = parser.add_argument_group("what is evaluated").add_argument
    add("model", nargs="?", help="model directory, run directory, or hub id[:subfolder]; bare: runs/latest")
    add("--model", dest="model_flag", help="the same as a flag")
    add("--tasks", default="countdown", help="names with commas, or all (default: countdown)")
    add("--steps", help="of a run or a published model: 10,20,... or latest or all; 0 is the base model")
    add("--list", action="store_true", help="list the tasks and exit")
    add = parser.add_argument_group("data and results").add_argument
    add("--out", type=Path, help="where results go (default: <workdir>/eval)")
    add(
        "--data_dir",
        type=Path,
        help="folder with <task>.jsonl, .json, .csv or .parquet, or the original files (default: the hub)",
    )
    add("--redo", action="store_true", help="delete earlier results of these tasks")
    add = parser.add_argument_group("sampling and grading").add_argument
    add("--limit", type=int, help="only the first N problems of each task")
    add("--samples", type=int, help="samples per problem (default: the task's)")
    add("--max_tokens", type=int, help="limit of a response in tokens (default: the task's)")
    add("--temperature", type=float, help="0 is greedy (default: the task's)")
    add("--seed", type=int, default=0, help="of the samples (default: 0)")
    add("--judge", action="append", default=[], metavar="ROLE=URL#MODEL", help=_judge_help())
    server = parser.add_argument_group("a server instead of vLLM in this process")
    server.add_argument(
        "--url",
        help="OpenAI-compatible server to sample from; the model argument only names it. Its key: JSFT_KEY_URL, or "
        "OPENAI_API_KEY for OpenAI and this machine",
    )
    server.add_argument("--url_model", help="model to ask for (default: the only one it serves)")
    server.add_argument("--reload", type=Path, metavar="DIR", help="first have the vLLM server load these weights")
    server.add_argument("--concurrency", type=int, default=64, help="requests at a time")
    server.add_argument("--timeout", type=float, default=3600.0, help="seconds for one whole response (default: 3600)")
    engine = parser.add_argument_group("vLLM")
    engine.add_argument("--tp", type=int, default=1, help="GPUs that share the model (tensor parallel)")
    engine.add_argument("--dtype", default="auto", help="bfloat16, float32 or auto (the model's)")
    engine.add_argument("--max_model_len", type=int, help="context in tokens (default: the model's, at most 32768)")
    engine.add_argument("--gpu_memory", type=float, help="share of GPU memory vLLM takes (default: 0.85)")
    engine.add_argument("--trust_remote_code", action="store_true", help="run Python code that the model brings")
    options = parser.parse_args(argv)
    if options.model and options.model_flag:
        raise ConfigError("give the model once: as the first argument or with --model")
    options.model = options.model or options.model_flag
    for name in ("limit", "samples", "max_tokens", "max_model_len", "tp", "concurrency"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(f"--{name} must be at least 1")
    if options.temperature is not None and not 0 <= options.temperature < float("inf"):
        raise ConfigError("--temperature must be at least 0")
    if not 0 < options.timeout < float("inf"):
        raise ConfigError("--timeout must be above 0 seconds")
    if options.reload is not None and not options.url:
        raise ConfigError("--reload needs --url: it is the server that loads the weights")
    if options.data_dir is not None and not options.data_dir.exists():
        raise ConfigError(f"--data_dir {options.data_dir} does not exist")
    return options


def _judge_help() -> str:
    roles = "; ".join(f"{role}: {meaning}" for role, (meaning, _, _) in ROLES.items())
    keys = "Keys: JSFT_KEY_<ROLE>, or OPENAI_API_KEY for OpenAI and this machine, in the environment"
    return f"a judging model ({roles}). {keys}"


def main(argv: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    if options.list:
        for task in TASKS.values():
            s = task.sampling
            judged = f", judges: {', '.join(task.judges)}" if task.judges else ""
            print(
                f"{task.name:18} {task.title}: {task.samples} x T {s.temperature:g}, at most {s.max_tokens} tokens, "
                f"shows {task.primary}, {task.group}{judged}"
            )
        return 0
    tasks = _tasks(options)
    judges = parse_judges(options.judge)
    if not options.url:
        check_gpus(options.tp)
    code = 0
    try:
        for target in _targets(options):
            try:
                with explained(CheckpointError, f"the evaluation in {target.out} cannot continue"):
                    outcomes = _evaluate(target, tasks, options, judges)
            except JsftError as error:  # this model cannot run; others may
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
                code = code or error.exit_code
                continue
            for outcome in outcomes:
                _say(target, outcome)
                if outcome.error:
                    code = code or outcome.error.exit_code
    finally:
        for judge in judges.values():
            judge.close()
    return code


def start(argv: list[str] | None = None) -> int:
    """`main`, in the serving environment where the command needs it: that process takes the place of this one.

    It does for vLLM, and for graders that are not installed here. Raises ConfigError where there is none for vLLM.
    """
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    tasks = _tasks(options)
    if not options.list and (not options.url or any(task.requirement() for task in tasks)):
        python = environments.serving_python()
        if python is None and not options.url:
            raise ConfigError(f"sampling needs vLLM: {environments.no_serving()}; or name a server with --url")
        entered = os.environ.get(_ENTERED) == str(python) or (python and python.parent.parent.samefile(sys.prefix))
        if python and not entered:
            _continue_in(python, argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that vLLM's process is ended too
    return main(argv)


def _tasks(options: argparse.Namespace) -> list:
    names = list(TASKS) if options.tasks == "all" else [n.strip() for n in options.tasks.split(",") if n.strip()]
    return [get_task(name) for name in names]


def _continue_in(python: Path, argv: list[str]) -> None:
    """Replaces this process by the same command under another Python, which finds this package."""
    path = [str(environments.import_path()), os.environ.get("PYTHONPATH", "")]
    own = {"JSFT_VENV": sys.prefix} | os.environ  # that exports steps
    own |= {"PYTHONPATH": os.pathsep.join(filter(None, path)), _ENTERED: str(python)}
    sys.stdout.flush()
    os.execve(python, [str(python), "-m", "jsft.evaluate", *argv], own)


def _targets(options: argparse.Namespace) -> list[Target]:
    if not options.url:
        return find_targets(options.model, options.steps, options.out)
    if options.steps:
        raise ConfigError("--steps and --url exclude each other: a server has one model loaded")
    if options.reload is not None:  # the model is that directory, on whichever server it is sampled
        return find_targets(str(options.reload), None, options.out)
    name = options.model or options.url_model or "server"
    match = re.search(r"step[_-]?(\d+)/?$", name)
    step = int(match[1]) if match else None
    if options.out:
        out = options.out / f"step_{step}" if match else options.out
    else:
        out = Path("runs") / Path(name).name / "eval" / f"step_{step or 0}"
    return [Target(Path(name).name, step, out, None, Path)]


def _evaluate(target: Target, tasks: list, options: argparse.Namespace, judges: dict) -> list[Outcome]:
    fields = {f.name for f in dataclasses.fields(Options)} - {"judges"}
    run_options = Options(**{name: getattr(options, name) for name in fields}, judges=judges)
    if options.url:
        engine = OpenAIEngine(options.url, options.url_model, concurrency=options.concurrency, timeout=options.timeout)
        if options.reload is None:
            digest = f"{engine.model} at {engine.facts['root'] or options.url}"
            return run_tasks(
                tasks,
                Model(target.name, target.step, options.url, digest),
                target.out,
                run_options,
                lambda: engine,
            )
        check_model_dir(options.reload, options.trust_remote_code)
        model = Model(target.name, target.step, str(options.reload), model_digest(options.reload))

        def reloaded() -> OpenAIEngine:
            engine.reload(options.reload)
            return engine

        return run_tasks(tasks, model, target.out, run_options, reloaded)
    path = target.path or target.prepare()
    model = Model(target.name, target.step, str(path), model_digest(path) if (path / "config.json").exists() else None)

    def open_engine() -> VllmEngine:
        print(f"loading {path} into vLLM", flush=True)
        return VllmEngine(
            VllmSettings(
                path,
                target.out / "vllm.log",
                options.tp,
                options.dtype,
                options.max_model_len,
                options.gpu_memory,
                options.seed,
                options.trust_remote_code,
            )
        )

    return run_tasks(tasks, model, target.out, run_options, open_engine)


def _say(target: Target, outcome: Outcome) -> None:
    where = target.name if target.step is None else f"{target.name} step {target.step}"
    if outcome.error:
        print(f"error: {where}: {' '.join(str(outcome.error).split())}", file=sys.stderr, flush=True)
        return
    results = outcome.results
    score, response = results["score"], results["response"]
    scale, unit = (100, " %") if results["share"] else (1, "")
    interval = f" [{scale * score['ci95'][0]:.1f}, {scale * score['ci95'][1]:.1f}]" if score["ci95"] else ""
    earlier = " (done before)" if outcome.state == "kept" else ""
    print(
        f"{where}: {results['task']} {results['primary']} {scale * score['mean']:.1f}{unit}{interval}, "
        f"{results['problems']} problems x {results['samples_per_problem']}, "
        f"{response['tokens']['mean']:.0f} tokens, {100 * response['share_cut']:.0f} % cut{earlier} "
        f"-> {target.out / outcome.task}",
        flush=True,
    )


if __name__ == "__main__":
    run_command(start, CheckpointError)
