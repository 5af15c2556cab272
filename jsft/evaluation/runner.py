"""Runs tasks on one model: samples what is missing in one stream over all tasks, then grades, judges and summarises.

A task that cannot run (no data, no judge, prompts too long) fails with one line; the others continue.
"""

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from jsft.errors import ConfigError, DataError, JsftError, describe, explained
from jsft.evaluation import data, thinking
from jsft.evaluation.grading import GradingPool
from jsft.evaluation.progress import SampleProgress
from jsft.evaluation.results import per_problem, summarise
from jsft.evaluation.sampling import Completion, Request, sample_seed
from jsft.evaluation.shapes import BrokenAnswer, ServerError
from jsft.evaluation.store import TaskFolder
from jsft.evaluation.tasks.base import Grade, Problem, Task

JUDGE_THREADS = 8
HOPELESS = 16  # broken answers and no good one: the judge is at fault, not the responses


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line may change about every task."""

    data_dir: Path | None = None
    limit: int | None = None  # the first problems only
    samples: int | None = None  # per problem
    max_tokens: int | None = None
    temperature: float | None = None  # 0: greedy
    max_model_len: int | None = None
    seed: int = 0
    redo: bool = False
    judges: dict[str, Any] = dataclasses.field(default_factory=dict)  # role -> client


@dataclasses.dataclass(frozen=True)
class Model:
    """The model being evaluated, as results name it."""

    name: str
    step: int | None
    where: str  # directory, hub id or URL
    digest: str | None  # None: not known, because nothing but finished results was asked for


@dataclasses.dataclass
class Outcome:
    """How one task ended: 'done', 'kept' (finished by an earlier call) or 'failed' with its error."""

    task: str
    state: str
    results: dict[str, Any] | None = None
    error: JsftError | None = None


def run_tasks(
    tasks: list[Task], model: Model, out: Path, options: Options, open_engine: Callable[[], Any]
) -> list[Outcome]:
    """Runs `tasks` on `model` into `out`/<task>/. `open_engine` is called only if samples are missing.

    Raises what `open_engine` raises (the model is refused); errors of single tasks are in their outcomes.
    """
    outcomes: dict[str, Outcome] = {}
    runs: list[_TaskRun] = []
    for task in tasks:
        try:
            run = _TaskRun(task, model, out / task.name, options)
            if run.done:
                outcomes[task.name] = Outcome(task.name, "kept", run.folder.results)
            else:
                runs.append(run)
        except JsftError as error:
            outcomes[task.name] = Outcome(task.name, "failed", None, error)

    def finish(run: _TaskRun) -> None:
        try:
            outcomes[run.task.name] = Outcome(run.task.name, "done", run.finish(engine_facts))
        except JsftError as error:
            run.folder.fail(str(error))
            outcomes[run.task.name] = Outcome(run.task.name, "failed", None, error)
        except Exception as error:  # a fault in one task's grading ends that task alone
            fault = JsftError(f"{run.task.name}: its responses cannot be graded ({describe(error)})")
            run.folder.fail(str(fault))
            outcomes[run.task.name] = Outcome(run.task.name, "failed", None, fault)

    engine_facts: dict[str, Any] = {}
    requests = [request for run in runs for request in run.pending()]
    by_name = {run.task.name: run for run in runs}
    if requests:
        engine = open_engine()
        engine_facts.update(engine.facts)
        try:
            with SampleProgress(requests[0].task, len(requests)) as progress:
                for completion in engine.sample(requests, progress.add_tokens):
                    by_name[completion.task].take(completion)
                    progress.add_sample(completion.task)
                engine_facts["tokens_per_second"] = round(progress.tokens / max(progress.seconds, 1e-6), 1)
        finally:
            engine.close()  # frees the GPU for a reward model
    thinking.settle(sample for run in runs for sample in run.folder.samples.values())
    for run in runs:
        finish(run)
    return [outcomes[task.name] for task in tasks]


class _TaskRun:
    """One task on one model, from its rows to its results."""

    def __init__(self, task: Task, model: Model, path: Path, options: Options):
        self.task, self.model, self.options = task, model, options
        missing = task.requirement()
        if missing:
            raise ConfigError(f"{task.name}: {missing}")
        for role in task.judges:
            if role not in options.judges:
                raise ConfigError(f"{task.name}: needs a judge; name it with --judge {role}=URL#MODEL")
            options.judges[role].check()
        try:
            with explained(DataError, f"{task.name}: its data cannot be read"):
                rows = task.rows(options.data_dir)
                self.problems: list[Problem] = task.problems(rows)[: options.limit]
        except (TypeError, KeyError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            columns = ", ".join(task.source.columns)
            raise DataError(
                f"{task.name}: its rows cannot be used ({describe(error)}); wanted columns {columns}"
            ) from error
        names = [p.id for p in self.problems]
        if len(set(names)) < len(names):
            raise DataError(f"{task.name}: two rows have the same id; ids must be unique")
        self.samples = options.samples or task.samples
        sampling = task.sampling
        if options.max_tokens:
            sampling = dataclasses.replace(sampling, max_tokens=options.max_tokens)
        if options.temperature is not None:
            sampling = dataclasses.replace(sampling, temperature=options.temperature)
        self.sampling = sampling
        settings = {
            "task": task.name,
            "task_version": task.version,
            "sampling": sampling.to_json(),
            "samples_per_problem": self.samples,
            "limit": options.limit,
            "max_model_len": options.max_model_len,
            "seed": options.seed,
            "rows": data.digest(rows),
        }
        if task.judges:
            settings["judges"] = {role: options.judges[role].name for role in task.judges}
        if model.digest is not None:
            settings["model"] = model.digest
        self.errors: list[str] = []
        self.folder = TaskFolder(path, settings)
        self.done = self.folder.open(options.redo)

    def pending(self) -> list[Request]:
        """Requests for the missing samples."""
        return [
            Request(
                self.task.name,
                p.id,
                j,
                p.messages,
                self.sampling,
                sample_seed(self.options.seed, self.task.name, p.id, j),
            )
            for p in self.problems
            for j in range(self.samples)
            if not thinking.is_drawn(self.folder.samples.get((p.id, j), {}))
        ]

    def take(self, completion: Completion) -> None:
        if completion.error is not None:
            self.errors.append(completion.error)
            return
        entry = {
            "problem": completion.problem,
            "sample": completion.sample,
            "response": completion.text,
            "tokens": completion.tokens,
            "finish": completion.finish,
            "prompt_thinking": completion.prompt_thinking,
        }
        if "verdict" in self.folder.samples.get((completion.problem, completion.sample), {}):
            entry["verdict"] = None  # it was about another response
        self.folder.add(entry)

    def finish(self, engine: dict[str, Any]) -> dict[str, Any]:
        """Grades, asks the judges, writes samples and results; returns the results."""
        if self.errors:
            raise DataError(f"{self.task.name}: {len(self.errors)} samples could not be drawn: {self.errors[0]}")
        samples = self.folder.samples
        keys = [(p.id, j) for p in self.problems for j in range(self.samples)]
        gold = {p.id: p.gold for p in self.problems}
        if self.task.judges:
            grades = self._judged(keys, gold)
        else:
            with SampleProgress(f"{self.task.name}: grading", len(keys), "responses") as progress:
                with GradingPool(self.task) as pool:
                    items = [(gold[key[0]], thinking.as_graded(samples[key])) for key in keys]
                    grades = pool.grade(items, progress.add_sample)
        prompts = {p.id: p.messages for p in self.problems}
        for key, grade in zip(keys, grades, strict=True):
            entry = {
                "prompt": prompts[key[0]],
                "gold": self.task.shown_gold(gold[key[0]]),
                "scores": grade.scores,
                "answer": grade.answer,
            }
            if grade.note:
                entry["note"] = grade.note
            samples[key] = {**samples[key], **entry}
        results = {
            "task": self.task.name,
            "title": self.task.title,
            "group": self.task.group,
            "model": {"name": self.model.name, "step": self.model.step, "where": self.model.where},
            "engine": engine or (self.folder.results or {}).get("engine"),
            **summarise(self.task, self.problems, samples, self.samples),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        self.folder.finish(keys, results, per_problem(self.task, self.problems, samples, self.samples))
        return self.folder.results

    def _judged(self, keys: list[tuple[str, int]], gold: dict[str, Any]) -> list[Grade]:
        """Asks the judges, several at a time. Each verdict is saved, so that the next call asks only for the rest."""
        names = {role: self.options.judges[role].name for role in self.task.judges}

        def known(key: tuple[str, int]) -> dict[str, Any] | None:
            verdict = self.folder.samples[key].get("verdict")
            return verdict if verdict and verdict["judges"] == names else None

        def ask(key: tuple[str, int]) -> tuple[tuple[str, int], Grade]:
            response = thinking.as_graded(self.folder.samples[key])
            return key, self.task.judge(gold[key[0]], response, self.options.judges)

        missing = [key for key in keys if known(key) is None]
        broken: list[BrokenAnswer] = []
        with (
            SampleProgress(f"{self.task.name}: judging", len(missing), "responses") as progress,
            ThreadPoolExecutor(JUDGE_THREADS) as threads,
        ):
            futures = [threads.submit(ask, key) for key in missing]
            try:
                for future in as_completed(futures):
                    try:
                        key, grade = future.result()
                    except BrokenAnswer as error:  # the others may be whole
                        broken.append(error)
                        if len(broken) < HOPELESS or progress.done:
                            continue
                        raise
                    verdict = {
                        "judges": names,
                        "scores": grade.scores,
                        "answer": grade.answer,
                        "note": grade.note,
                    }
                    self.folder.add({"problem": key[0], "sample": key[1], "verdict": verdict})
                    progress.add_sample()
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise
        if broken:
            raise ServerError(
                f"{self.task.name}: {len(broken)} of {len(missing)} responses got no verdict: {broken[0]}"
            )
        verdicts = [known(key) for key in keys]
        return [Grade(v["scores"], v["answer"], v["note"]) for v in verdicts]
