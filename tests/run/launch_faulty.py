"""python launch_faulty.py FLAGS: jsft.train, with the faults that JSFT_FAULTS names (comma-separated).

slow:SECONDS       every step takes so much longer
kill-step:K        kill -9 of itself when step K is under way
kill-write:K       ... when the arrays of step K are being written
kill-seal:K        ... when they are, and the manifest is not
kill-prune:K       ... when checkpoint K is half removed
kill-cache         ... when the token cache is half built
signal-step:K      SIGTERM to itself in step K;  signal-eval:K, signal-save:K, signal-cache alike
signal-loader:K    ... and the loader fails at step K
signal-compile     SIGTERM to itself while a program is compiled that takes very long
signal-weights     SIGTERM to itself while the weights are read, which takes very long
twice-step:K       two SIGTERM in a step K that never ends
hang-step:K        step K never ends
loader:K           the loader fails at step K
least:SECONDS      the watchdog's least limit of a step
oom:K              the device runs out of memory in step K
remat:NAMES        remat=auto chooses these
memory:GIB         the device has so much, and each program that is compiled, or read from the cache, is printed
"""

import os
import signal
import threading
import time

from jsft import errors, train

FAULTS = dict(f.split(":", 1) if ":" in f else (f, "") for f in os.environ.get("JSFT_FAULTS", "").split(",") if f)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def at(name: str, step: int) -> bool:
    return FAULTS.get(name) == str(step)


def keep_all_programs() -> None:
    """The compilation cache keeps programs that compile in a moment, too: tests start many processes."""
    import jax

    from jsft.hardware import xla

    configure = xla.configure

    def configure_and_keep():
        configure()
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    xla.configure = configure_and_keep


def say_compiled(event: str, seconds: float, fun_name: str = "", **more) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        print(f"compiled {fun_name}", flush=True)


def install() -> None:
    import jax
    import jax.numpy as jnp

    from jsft.cluster import watchdog
    from jsft.data import cache, loader
    from jsft.planning import remat
    from jsft.run import checkpoint, loop, run

    if "remat" in FAULTS:
        choose = run.choose_program
        run.choose_program = lambda components, say: choose(components, say)._replace(remat=FAULTS["remat"])
    if "memory" in FAULTS:
        remat.device_memory = lambda: int(float(FAULTS["memory"]) * 2**30)
        jax.monitoring.register_event_duration_secs_listener(say_compiled)
    if "signal-weights" in FAULTS:

        def read_slowly(*unused):
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(120)

        run.load_parameters = read_slowly
    if "least" in FAULTS:
        watchdog.Watchdog.__init__.__kwdefaults__["least_seconds"] = float(FAULTS["least"])

    update, write_manifest, write_part = loop.Loop._update, checkpoint.write_manifest, cache.write_part
    save_async, rmtree, iterate = (
        checkpoint.ocp.save_checkpointables_async,
        checkpoint.shutil.rmtree,
        loader.TrainingData.iterate,
    )
    evaluate = loop.Loop.evaluate
    count = {"step": None}

    def faulty_update(self, state, data, step):
        first = count["step"] is None
        count["step"] = step
        if first and "signal-compile" in FAULTS:
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
            jax.config.update("jax_enable_compilation_cache", False)
            x = jnp.ones((4, 4))
            for n in range(1, 1000):  # ever other programs, each long to compile
                jax.jit(lambda x: jax.lax.fori_loop(0, n, lambda i, y: _deep(y, 4000), x)).lower(x).compile()
        if at("oom", step):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes (made by a test)")
        result = update(self, state, data, step)
        time.sleep(float(FAULTS.get("slow", 0)))
        if at("kill-step", step):
            kill()
        if at("signal-step", step):
            terminate()
        if at("twice-step", step):
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            threading.Timer(1.4, os.kill, (os.getpid(), signal.SIGTERM)).start()
        if at("hang-step", step) or at("twice-step", step):
            time.sleep(10_000)
        return result

    def _deep(y, depth):
        for i in range(depth):
            y = jnp.sin(y @ y + i)
        return y

    def faulty_evaluate(self, state, step):
        if at("signal-eval", step):
            terminate()
        return evaluate(self, state, step)

    def faulty_manifest(path, facts):
        if at("kill-seal", facts["step"]):
            kill()
        return write_manifest(path, facts)

    def faulty_save(path, state, **options):
        response = save_async(path, state, **options)
        if at("kill-write", os.path.basename(path)):
            kill()
        if at("signal-save", os.path.basename(path)):
            terminate()
        return response

    def faulty_rmtree(path, *args, **options):
        if at("kill-prune", os.path.basename(path)):
            kill()
        return rmtree(path, *args, **options)

    def faulty_part(*args):
        name = write_part(*args)
        if "kill-cache" in FAULTS:
            kill()
        if "signal-cache" in FAULTS:
            terminate()
        return name

    def faulty_iterate(self, first_step=0):
        for step, data in enumerate(iterate(self, first_step), first_step + 1):
            if at("signal-loader", step):
                terminate()
                raise OSError("the worker died of it too")
            if at("loader", step):
                raise OSError(5, "Input/output error", "/data/part-0.arrow")
            yield data

    loop.Loop._update, loop.Loop.evaluate, checkpoint.write_manifest = (
        faulty_update,
        faulty_evaluate,
        faulty_manifest,
    )
    checkpoint.ocp.save_checkpointables_async, checkpoint.shutil.rmtree = faulty_save, faulty_rmtree
    cache.write_part, loader.TrainingData.iterate = faulty_part, faulty_iterate


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    keep_all_programs()
    if FAULTS:
        install()
    errors.run_command(train.main)
