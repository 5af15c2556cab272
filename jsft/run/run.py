"""From a resolved config to a finished run: builds every part, says what it built, and hands over to the loop."""

import shlex
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jsft import config as schema
from jsft.cluster.exit import RESUME_HINT, ProcessExit
from jsft.cluster.peers import PeerLink
from jsft.cluster.processes import any_process
from jsft.cluster.signals import Stopped, StopRequest
from jsft.cluster.watchdog import Watchdog
from jsft.data.objective import document_mean_weights
from jsft.errors import CheckpointError, OutOfMemoryError, explained
from jsft.hardware import xla
from jsft.hardware.cards import peak_flops
from jsft.hf.digest import model_digest
from jsft.hf.load import load_parameters
from jsft.models.flops import matmul_parameters, step_flops
from jsft.planning.remat import advise_out_of_memory, choose_remat
from jsft.run import checkpoint
from jsft.run.agreement import check_agreement, check_workdir
from jsft.run.directory import RunDirectory
from jsft.run.loop import Loop
from jsft.run.manifest import check_base, list_steps
from jsft.run.metrics import MetricsWriter, RunLog, has_heldout
from jsft.run.preflight import check_disk, check_memory
from jsft.run.profile import Profiler
from jsft.run.provenance import code_version, first_batch_checksum
from jsft.run.run_readme import write_run_readme
from jsft.run.sampling import open_generation
from jsft.run.setup import build
from jsft.run.summary import write_summary
from jsft.run.trackers import open_wandb
from jsft.step.components import Components, compile_gradients, programs
from jsft.step.histograms import make_histograms
from jsft.step.optimizer import initial_state, parameter_dtype
from jsft.step.precompile import precompile

Say = Callable[[str], None]


def train(
    config: ConfigDict,
    name: str,
    workdir: Path,
    allow_changed: frozenset[str],
    link: PeerLink | None = None,
    ignore_plan: bool = False,
    profile: tuple[int, int] | None = None,
) -> int:
    """Starts or resumes the run in `workdir`. Returns 0; raises JsftError with its exit code.

    link: to the other processes of the run, if any (`jsft.cluster.processes.session`). ignore_plan: start even if the
    plan says that the run does not fit. profile: first step under the profiler, and the one after the last.
    """
    xla.configure()  # before JAX looks for devices
    primary = jax.process_index() == 0
    process_exit = ProcessExit(link)
    stop = StopRequest(process_exit)
    directory = log = watchdog = None
    try:
        fresh = not list_steps(workdir, full=True)
        with _device_errors():
            components = build(config, weights=fresh)
        if link:
            check_agreement(link, components)
        if primary and fresh:
            check_disk(components, workdir, print, ignore_plan)
        directory = RunDirectory(workdir) if primary else None
        if directory:
            directory.enter(
                config, name, allow_changed, components.data.fingerprint, model_digest(components.model_dir)
            )
            process_exit.status = lambda state, reason: directory.status(state, directory.last_step, reason, final=True)
            directory.keep_base_files(components.model_dir)
            directory.point_latest()
        if link:
            check_workdir(link, workdir, directory.owner if directory else "")
        with explained(CheckpointError, f"--workdir {workdir} cannot be written", "choose another"):
            log = RunLog(workdir / "log.txt" if primary else None, quiet=not primary)
        watchdog = Watchdog(workdir, jax.process_index(), 60 * config.train.hang_minutes, process_exit)
        try:
            with _device_errors(), explained(CheckpointError, f"the run in {workdir} had to end", RESUME_HINT):
                check_memory(components, log.line, ignore_plan)
                _train(components, name, workdir, directory, log, stop, watchdog, profile)
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


def _train(
    components: Components,
    name: str,
    workdir: Path,
    directory: RunDirectory | None,
    log: RunLog,
    stop: StopRequest,
    watchdog: Watchdog,
    profile: tuple[int, int] | None,
) -> None:
    """The run between its directory's opening and closing."""
    config, total = components.config, components.data.total_steps
    status = directory.status if directory else lambda *_: None
    watchdog.at("reading the checkpoint")
    state = checkpoint.restore(workdir, components.abstract, log.line)
    step = int(state.step) if state is not None else 0
    eval_data = _eval_data(components)
    evaluated = any_process(directory is not None and has_heldout(workdir, step))
    if step >= total and (evaluated or not eval_data):
        status("done", step)
        log.line(f"{workdir} is done: {step} of {total} steps")
        return
    status("running", step)
    watchdog.at("choosing remat, which compiles")
    remat = choose_remat(components, log.line)
    write_summary(components, name, workdir, remat, step, log.line)
    if directory:
        write_run_readme(components, name, workdir)
    if state is None:
        watchdog.at("reading the base model's weights")
        dtype = parameter_dtype(config)
        state = initial_state(load_parameters(components.model_dir, components.model, components.mesh, dtype), config)
    facts = _facts(components, name)
    if directory:
        facts["model"] = model_digest(workdir / "base")  # what an export of these checkpoints must say
    if step and directory:
        there = checkpoint.read_manifest(workdir, step)
        check_base(workdir, there, facts["model"])
        _say_what_changed(there, facts, log.line)
    policy = checkpoint.Policy(
        config.checkpoint.every, config.checkpoint.minutes, config.checkpoint.keep, tuple(config.checkpoint.milestones)
    )
    writer = MetricsWriter(workdir, step, log.line, open_wandb(config, name, workdir, log.line)) if directory else None
    saver = checkpoint.Saver(workdir, policy, facts, log.line, writer.sync if writer else lambda: None)
    if writer:
        writer.write_histogram("data/tokens", components.data.lengths)
    generation = open_generation(config, workdir, writer, log.line) if directory else None

    def on_step(step: int) -> None:
        if directory:
            directory.set_step(step)
        if generation:
            generation.poll()

    profiler = Profiler(workdir, profile, log.line) if directory else None
    count = matmul_parameters(components.model)
    loop = Loop(
        config,
        components.mesh,
        programs(components, remat),
        saver,
        log,
        writer,
        stop,
        watchdog,
        total,
        flops=lambda data: step_flops(components.model, count, data.tokens, data.sum_squared_lengths),
        peak_flops=peak_flops(jax.devices()),
        eval_data=eval_data,
        profiler=profiler,
        histograms=make_histograms(config, components.mesh, components.shardings),
        on_step=on_step,
        on_save=generation.saved if generation else lambda step: None,
    )
    try:
        watchdog.at("compiling")
        loop.programs, loop.histograms = precompile(
            loop.programs, loop.histograms, components, bool(eval_data), log.line
        )
        state, step, stopped = loop.run(state, components.data, step, evaluated)
        watchdog.at("waiting for the last save")
        saver.wait()
        if generation and not stopped:
            generation.finish(lambda: watchdog.at("waiting for the last steps to be sampled"))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        watchdog.at("planning what would fit")
        raise OutOfMemoryError(f"the device ran out of memory: {advise_out_of_memory(components, remat)}") from error
    finally:
        if generation:
            generation.stop()
        saver.wait()
        log.stop_progress()
        if writer:
            writer.close()
    if saver.failed:
        raise CheckpointError(f"{saver.failed}; see to it, then run the same command again")
    if stopped:
        asked = stop.signal or "a signal to another process"
        status("preempted", step, f"{asked} after step {step}")
        log.line(f"stopped by {asked} after step {step} of {total}, saved; the same command resumes from there")
    else:
        status("done", step)
        place = shlex.quote(str(workdir))
        log.line(f"done: {step} steps; export with: python -m jsft.export --workdir {place} --step {step}")


def _facts(components: Components, name: str) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run that wrote it."""
    return {
        "name": name,
        "config": schema.flatten(components.config),
        "data": components.data.fingerprint,
        "plan": first_batch_checksum(components.data),
        "code": code_version(),
        "jax": jax.__version__,
        "devices": components.mesh.size,
        "processes": jax.process_count(),
        "device_kind": jax.devices()[0].device_kind,
    }


def _say_what_changed(there: dict[str, Any], here: dict[str, Any], say: Say) -> None:
    """Prints a line where the run resumes, but not bit for bit. `plan`: this process's rows of the first batch."""
    names = ["devices", "processes", "device_kind", "jax", "code"]
    if all(there.get(n) == here[n] for n in names[:2]):
        names.append("plan")
    changed = [f"{n} {there.get(n)} -> {here[n]}" for n in names if there.get(n) != here[n]]
    if changed:
        say(f"note: resuming with the same documents and objective, perhaps not bit for bit: {', '.join(changed)}")


def dry_run(config: ConfigDict, name: str, ignore_plan: bool = False) -> int:
    """Builds everything on shapes alone, compiles one abstract step, prints the summary, and trains nothing."""
    xla.configure()
    with _device_errors():
        components = build(config)
        check_memory(components, print, ignore_plan)
        remat = choose_remat(components, print)
        write_summary(components, name, None, remat, 0, print)
        compiled = compile_gradients(components, remat)
        memory = compiled.memory_analysis()
        print(
            f"step:      compiled; per device {memory.argument_size_in_bytes / 2**30:.2f} GiB of arguments, "
            f"{memory.temp_size_in_bytes / 2**30:.2f} GiB of temporaries"
        )
        first = next(iter(components.data.iterate(0)))
        print(
            f"plan:      first step has {first.documents} documents, {first.tokens:,} tokens "
            f"({first.supervised_tokens:,} trained), {len(first.micro_batches)} micro batches, "
            f"padding {first.padding_share:.1%}"
        )
    return 0


def _eval_data(components: Components):
    return {
        name: [batch._replace(loss_weights=document_mean_weights(batch)) for batch in batches]
        for name, batches in components.held_out.items()
    }


@contextmanager
def _device_errors():
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
