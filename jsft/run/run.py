"""A run from its resolved config to its last step: checks everything, says what it will do, trains."""

import shlex
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jsft import config as schema
from jsft.cluster.exit import RESUME_HINT, ProcessExit
from jsft.cluster.peers import PeerLink
from jsft.cluster.processes import any_process
from jsft.cluster.signals import Stopped, StopRequest
from jsft.cluster.watchdog import Watchdog
from jsft.data.batch import Batch, document_mean_weights
from jsft.errors import CheckpointError, OutOfMemoryError, explained
from jsft.hardware import xla
from jsft.hardware.cards import peak_flops
from jsft.hf.digest import model_digest
from jsft.hf.load import load_parameters
from jsft.models.flops import matmul_parameters, step_flops
from jsft.planning.remat import advise_out_of_memory, choose_program
from jsft.run import checkpoint
from jsft.run.agreement import check_agreement, check_choices, check_workdir
from jsft.run.directory import RunDirectory, check_same_run
from jsft.run.loop import Loop
from jsft.run.manifest import check_base, list_steps, read_manifest
from jsft.run.metrics import MetricsWriter, has_heldout
from jsft.run.preflight import check_memory, check_start
from jsft.run.profile import Profiler
from jsft.run.provenance import code_version, first_batch_checksum
from jsft.run.run_log import COMMAND, RunLog, show
from jsft.run.run_readme import write_run_readme
from jsft.run.sampling import Generation, open_generation
from jsft.run.setup import build
from jsft.run.start_times import StartTimes
from jsft.run.summary import write_summary
from jsft.run.trackers import open_trackers
from jsft.step.components import Components, compile_gradients, programs
from jsft.step.flushed import make_flushed
from jsft.step.histograms import make_histograms
from jsft.step.optimizer import TrainState, initial_state, parameter_dtype
from jsft.step.precompile import precompile

Say = Callable[[str], None]


class RunOptions(NamedTuple):
    """What the command line says in addition to the config."""

    name: str
    workdir: Path
    allow_changed: frozenset[str] = frozenset()  # fields that may differ from the run in `workdir`
    ignore_plan: bool = False  # start even if the plan says that the run does not fit
    profile: tuple[int, int] | None = None  # first step under the profiler, and the one after the last
    began: float | None = None  # when the command did, by time.monotonic


class Supervision(NamedTuple):
    """What watches and records a process of a run while it trains."""

    directory: RunDirectory | None  # of process 0 alone
    log: RunLog
    stop: StopRequest
    watchdog: Watchdog
    link: PeerLink | None  # to the run's other processes, if any
    times: StartTimes

    def at(self, part: str, doing: str = "") -> None:
        """The next work begins; until the end of the first step it is a part of the start.

        doing: what the watchdog says of it, if it is more than the part's name.
        """
        self.times.at(part)
        self.watchdog.at(doing or part)

    def status(self, state: str, step: int, reason: str = "") -> None:
        """Writes status.json on process 0."""
        if self.directory:
            self.directory.status(state, step, reason)


def train(config: ConfigDict, options: RunOptions, link: PeerLink | None = None) -> int:
    """Starts or resumes the run in `options.workdir`. Returns 0; raises JsftError with its exit code.

    link: to the other processes of the run, if any (`jsft.cluster.processes.session`).
    """
    xla.configure()  # before JAX looks for devices
    times = StartTimes("imports and devices", options.began or time.monotonic())
    workdir, primary = options.workdir, jax.process_index() == 0
    times.at("model and data")
    process_exit = ProcessExit(link)
    stop = StopRequest(process_exit)
    directory = log = watchdog = None
    try:
        fresh = not list_steps(workdir, full=True)
        with _device_errors():
            components = build(config, weights=fresh)
            check_memory(components, show if primary else lambda line: None, options.ignore_plan)
        if link:
            check_agreement(link, components)
        if primary:
            check_start(components, workdir, fresh, show, options.ignore_plan)
            directory = RunDirectory(workdir)
            _enter(directory, components, options)
            process_exit.status = lambda state, reason: directory.status(state, directory.last_step, reason, final=True)
            directory.keep_base_files(components.model_dir)
            directory.point_latest()
        if link:
            check_workdir(link, workdir, directory.owner if directory else "")
        with explained(CheckpointError, f"--workdir {workdir} cannot be written", "choose another"):
            log = RunLog(workdir / "log.txt" if primary else None, not primary, times)
        watchdog = Watchdog(workdir, jax.process_index(), 60 * config.train.hang_minutes, process_exit)
        try:
            with _device_errors(), explained(CheckpointError, f"the run in {workdir} had to end", RESUME_HINT):
                _train(components, options, Supervision(directory, log, stop, watchdog, link, times))
        except Exception as error:
            if directory:
                directory.status("failed", directory.last_step, " ".join(str(error).split())[:500])
            raise
    except Stopped as request:
        reason = f"stopped by {request} before there was anything new to save; {RESUME_HINT}"
        if link:  # the others cannot be asked: they may be waiting for this one
            process_exit.now(0, "preempted", reason)
        if directory:
            directory.status("preempted", directory.last_step, reason)
        print(reason, flush=True)
    finally:
        stop.close()
        if watchdog:
            watchdog.close()
        if log:
            log.close()
        if directory:
            directory.release()
    return 0


def _enter(directory: RunDirectory, components: Components, options: RunOptions) -> None:
    digest = model_digest(components.model_dir)
    directory.enter(components.config, options.name, options.allow_changed, components.data.fingerprint, digest)


def _train(components: Components, options: RunOptions, process: Supervision) -> None:
    """The run while its directory is open: restore, choose remat, compile, loop, report."""
    workdir, total = options.workdir, components.data.total_steps
    say, at = process.log.line, process.at
    at("checking checkpoints")
    found = checkpoint.find_step(workdir, say)
    step = found or 0
    eval_data = _eval_data(components)
    evaluated = any_process(process.directory is not None and has_heldout(workdir, step))
    if step >= total and (evaluated or not eval_data):
        process.status("done", step)
        say(f"{workdir} is done: {step} of {total} steps")
        return
    process.status("running", step)
    at("compiling", "choosing remat, which compiles")
    asked = components
    # The state is read while the programs compile. A signal that comes meanwhile waits a few seconds for the thread, as
    # for a compilation, then ends the process.
    with ThreadPoolExecutor(1, "state") as background:
        reading = background.submit(_read_state, asked, workdir, found)
        components, remat, gradients = choose_program(asked, say)
        if process.link:
            check_choices(process.link, remat, components.config.mesh.gather)
        write_summary(components, options.name, workdir, remat, step, say)
        if process.directory:
            write_run_readme(components, options.name, workdir)
        facts = _manifest_facts(asked, options, process, step)
        with (
            _outputs(components, options, process, step, facts) as outputs,
            _out_of_memory_advice(components, remat, at),
        ):
            loop = _make_loop(components, remat, eval_data, outputs, process)
            at("compiling")
            loop.programs, loop.histograms = precompile(
                loop.programs, loop.histograms, components, bool(eval_data), say, gradients
            )
            at("waiting for the state", "reading the state")
            state = reading.result()
            at("evaluating")
            state, step, stopped = loop.run(state, components.data, step, evaluated)
            at("waiting for the last save")
            outputs.saver.wait()
            if outputs.sampling and not stopped:
                outputs.sampling.finish(lambda: at("waiting for the last steps to be sampled"))
    if outputs.saver.failed:
        raise CheckpointError(f"{outputs.saver.failed}; see to it, then run the same command again")
    if stopped:
        asked = process.stop.signal or "a signal to another process"
        process.status("preempted", step, f"{asked} after step {step}")
        say(f"stopped by {asked} after step {step} of {total}, saved; the same command resumes from there")
    else:
        process.status("done", step)
        place = shlex.quote(str(workdir))
        say(f"done: {step} steps; export with:")
        say(f"{COMMAND}python -m jsft.export --workdir {place} --step {step}")


def _read_state(components: Components, workdir: Path, step: int | None) -> TrainState:
    """The state of the checkpoint of `step`; None: that of step 0, from the base model's weights."""
    if step is not None:
        return checkpoint.restore(workdir, step, components.abstract)
    dtype = parameter_dtype(components.config)
    parameters = load_parameters(components.model_dir, components.model, components.mesh, dtype)
    return initial_state(parameters, components.config)


class _Outputs(NamedTuple):
    """What a run writes while it trains; all but `saver` on process 0 alone."""

    saver: checkpoint.Saver
    writer: MetricsWriter | None = None
    sampling: Generation | None = None
    profiler: Profiler | None = None


@contextmanager
def _outputs(
    components: Components, options: RunOptions, process: Supervision, step: int, facts: dict[str, Any]
) -> Iterator[_Outputs]:
    """The open outputs of a run that starts after `step`; closed after the last save. facts: for the manifests."""
    config, workdir, say = components.config, options.workdir, process.log.line
    writer = sampling = profiler = None
    if process.directory:
        writer = MetricsWriter(workdir, step, say, open_trackers(config, options.name, workdir, say))
    settings = config.checkpoint
    policy = checkpoint.Policy(settings.every, settings.minutes, settings.keep, tuple(settings.milestones))
    saver = checkpoint.Saver(workdir, policy, facts, say, writer.sync if writer else lambda: None)
    if writer:
        writer.write_histogram("data/tokens", components.data.lengths)
        sampling = open_generation(config, workdir, writer, say)
        profiler = Profiler(workdir, options.profile, say)
    try:
        yield _Outputs(saver, writer, sampling, profiler)
    finally:
        if sampling:
            sampling.stop()
        saver.wait()
        process.log.stop_progress()
        if writer:
            writer.close()


def _make_loop(
    components: Components, remat: str, eval_data: dict[str, list[Batch]], outputs: _Outputs, process: Supervision
) -> Loop:
    model, sampling = components.model, outputs.sampling
    count = matmul_parameters(model)

    def on_step(step: int) -> None:
        if process.directory:
            process.directory.set_step(step)
        if sampling:
            sampling.poll()

    return Loop(
        components.config,
        components.mesh,
        programs(components, remat),
        outputs.saver,
        process.log,
        outputs.writer,
        process.stop,
        process.watchdog,
        components.data.total_steps,
        flops=lambda data: step_flops(model, count, data.tokens, data.sum_squared_lengths),
        peak_flops=peak_flops(jax.devices()),
        eval_data=eval_data,
        profiler=outputs.profiler,
        histograms=make_histograms(components.config, components.mesh, components.shardings),
        flushed=make_flushed(components, remat),
        on_step=on_step,
        on_save=sampling.saved if sampling else lambda step: None,
    )


def _manifest_facts(components: Components, options: RunOptions, process: Supervision, step: int) -> dict[str, Any]:
    """What the manifests of this run's checkpoints say, checked against the manifest of `step` where it resumes."""
    facts = {
        "name": options.name,
        "config": schema.flatten(components.config),
        "data": components.data.fingerprint,
        "plan": first_batch_checksum(components.data),
        "code": code_version(),
        "jax": jax.__version__,
        "devices": components.mesh.size,
        "processes": jax.process_count(),
        "device_kind": jax.devices()[0].device_kind,
    }
    if not process.directory:
        return facts
    facts["model"] = model_digest(options.workdir / "base")  # what an export of these checkpoints must match
    if step:
        there = read_manifest(options.workdir, step)
        check_base(options.workdir, there, facts["model"])
        _say_what_changed(there, facts, process.log.line)
    return facts


def _say_what_changed(there: dict[str, Any], here: dict[str, Any], say: Say) -> None:
    """Prints a line where the run resumes, but not bit for bit. `plan`: this process's rows of the first batch."""
    names = ["devices", "processes", "device_kind", "jax", "code"]
    if all(there.get(n) == here[n] for n in names[:2]):
        names.append("plan")
    changed = [f"{n} {there.get(n)} -> {here[n]}" for n in names if there.get(n) != here[n]]
    if changed:
        say(f"note: resuming with the same documents and objective, perhaps not bit for bit: {', '.join(changed)}")


def dry_run(config: ConfigDict, options: RunOptions) -> int:
    """Checks all that a start checks, builds everything on shapes alone, compiles one abstract step, prints the
    summary, and writes nothing.
    """
    xla.configure()
    workdir = options.workdir
    steps = list_steps(workdir, full=True)
    with _device_errors():
        components = build(config, weights=not steps)
        check_memory(components, show, options.ignore_plan)
        check_start(components, workdir, not steps, show, options.ignore_plan)
        digest = model_digest(components.model_dir)
        check_same_run(workdir, components.config, options.allow_changed, components.data.fingerprint, digest)
        components, remat, gradients = choose_program(components, show)
        write_summary(components, options.name, workdir, remat, steps[-1] if steps else 0, show)
        memory = (gradients or compile_gradients(components, remat)).memory_analysis()
        show(
            f"step:      compiled; per device {memory.argument_size_in_bytes / 2**30:.2f} GiB of arguments, "
            f"{memory.temp_size_in_bytes / 2**30:.2f} GiB of temporaries"
        )
        first = next(iter(components.data.iterate(0)))
        show(
            f"plan:      first step has {first.documents} documents, {first.tokens:,} tokens "
            f"({first.supervised_tokens:,} trained), {len(first.micro_batches)} micro batches, "
            f"padding {first.padding_share:.1%}"
        )
    show("dry run:   the run would start; no run was made")
    return 0


def _eval_data(components: Components) -> dict[str, list[Batch]]:
    """The held-out batches of every set, weighted for the mean over documents."""
    return {
        name: [batch._replace(loss_weights=document_mean_weights(batch)) for batch in batches]
        for name, batches in components.held_out.items()
    }


@contextmanager
def _out_of_memory_advice(components: Components, remat: str, at: Callable[[str], None]) -> Iterator[None]:
    """Turns the runtime's out-of-memory error into ours, with the settings that would fit."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        at("planning what would fit")
        raise OutOfMemoryError(f"the device ran out of memory: {advise_out_of_memory(components, remat)}") from error


@contextmanager
def _device_errors() -> Iterator[None]:
    """Turns the runtime's out-of-memory error into ours."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise OutOfMemoryError(
                f"the device ran out of memory ({str(error).splitlines()[0][:200]}); set remat=full, lower "
                f"data.rows_per_device or data.pack_length, or use more devices"
            ) from error
        raise
