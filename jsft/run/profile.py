"""A window of steps under JAX's profiler, and its result in words: the devices' time by part, and their gaps.

`--profile_steps 20:23` profiles steps 20, 21 and 22; creating a file `profile` in the run's directory profiles the next
three.
"""

import collections
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from jsft.errors import ConfigError

# Kernel names by part, first match wins. All other kernels are elementwise work that XLA fused.
PARTS = (
    (
        "collectives",
        ("nccl", "all-gather", "all_gather", "reduce-scatter", "reduce_scatter", "all-reduce", "all-to-all"),
    ),
    ("attention", ("attention", "flash")),
    ("matmul", ("gemm", "nvjet", "cutlass", "cublas", "xmma", "sm90", "sm80", "triton_gemm", "dot")),
    ("copies", ("memcpy", "memset", "copy")),
)
_HOST_NOISE = (
    "ThreadpoolListener",
    "ThunkExecutor",
    "end: ",
    "Rendezvous",
    "Wait",
    "while",
    "conditional",
    "call",
    "Slinky",
)  # some of these contain other events
ON_DEMAND_STEPS = 3
ASK = "profile"  # name of the file that requests a window
Say = Callable[[str], None]


class Profile(NamedTuple):
    """Device time of a window. seconds: from the first kernel's start to the last one's end, on one device."""

    device: str
    seconds: float
    parts: dict[str, float]  # seconds by part, largest first
    kernels: list[tuple[str, str, float, int]]  # (part, name, seconds, calls), largest first

    @property
    def busy(self) -> float:
        return sum(self.parts.values())

    def lines(self, steps: int, kernels: int = 5) -> list[str]:
        """The profile in words, per step of `steps`."""
        gpu = self.device.startswith("/device:")
        whole = self.seconds if gpu else self.busy
        head = f"{steps} steps in {self.seconds * 1e3:,.0f} ms on {self.device}, "
        head += f"kernels {self.busy * 1e3:,.0f} ms"
        found = [head if gpu else f"{head} over all threads; shares are of the kernels"]
        rows = list(self.parts.items())
        if gpu:
            rows.append(("gaps", max(0.0, self.seconds - self.busy)))
        found += [f"  {part:12} {time * 1e3 / steps:9,.1f} ms a step {time / whole:6.1%}" for part, time in rows]
        for part, name, time, calls in self.kernels[:kernels]:
            found.append(f"    {time * 1e3 / steps:9,.2f} ms  {calls / steps:5.0f} x {part:11} {name[:70]}")
        return found


def part_of(name: str) -> str:
    """The part of a step that a kernel of this name belongs to."""
    name = name.lower()
    return next((part for part, words in PARTS if any(word in name for word in words)), "elementwise")


def read_profile(folder: Path) -> Profile | None:
    """The profile in `folder`: of the first GPU, else of the CPU's XLA threads. None when it has no kernels."""
    files = sorted(Path(folder).rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        return None
    planes = list(jax.profiler.ProfileData.from_file(str(files[-1])).planes)
    gpu = [plane for plane in planes if plane.name.startswith("/device:GPU:0")]
    chosen = gpu or [plane for plane in planes if plane.name == "/host:CPU"]
    prefix = "Stream" if gpu else "tf_XLA"
    totals, calls = collections.Counter(), collections.Counter()
    first, last = float("inf"), 0.0
    for plane in chosen:
        for line in plane.lines:
            if not line.name.startswith(prefix):
                continue
            for event in line.events:
                if not gpu and event.name.startswith(_HOST_NOISE):
                    continue
                first, last = min(first, event.start_ns), max(last, event.start_ns + event.duration_ns)
                totals[event.name] += event.duration_ns / 1e9
                calls[event.name] += 1
    if not totals:
        return None
    parts = collections.Counter()
    for name, seconds in totals.items():
        parts[part_of(name)] += seconds
    kernels = [(part_of(name), name, seconds, calls[name]) for name, seconds in totals.most_common()]
    return Profile(chosen[0].name, (last - first) / 1e9, dict(parts.most_common()), kernels)


def parse_window(text: str) -> tuple[int, int]:
    """'20:23' as (20, 23): steps 20, 21 and 22, counted from 1 as they are printed. Raises ConfigError."""
    first, colon, end = text.partition(":")
    if not (colon and first.isdigit() and end.isdigit() and 1 <= int(first) < int(end)):
        raise ConfigError(f"--profile_steps {text}: want FIRST:END, as in 20:23 for steps 20, 21 and 22")
    return int(first), int(end)


class Profiler:
    """Starts and ends windows of steps for the loop. Traces go to `<workdir>/profiles/step_<N>`."""

    def __init__(self, workdir: Path, window: tuple[int, int] | None, say: Say):
        self._workdir, self._window, self._say = workdir, window, say
        self._running: tuple[int, int] | None = None
        self._ask = workdir / ASK

    def due(self, step: int) -> bool:
        """Whether a window begins with `step`; removes the file that requested it."""
        if self._running:
            return False
        if self._ask.exists():
            self._ask.unlink(missing_ok=True)
            self._window = step, step + ON_DEMAND_STEPS
        return bool(self._window and self._window[0] <= step < self._window[1])

    def start(self, step: int) -> None:
        """Starts the trace; the devices must be idle."""
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        try:
            jax.profiler.start_trace(str(self._folder(step)), profiler_options=options)
        except (OSError, RuntimeError) as error:  # a profiler error must not end the run
            self._say(f"warning: no profile of step {step}: {' '.join(str(error).split())[:200]}")
            self._window = None
            return
        self._running = step, self._window[1]

    def ends(self, step: int) -> bool:
        """Whether `step` is the last one of the open window."""
        return bool(self._running and step >= self._running[1] - 1)

    def stop(self, step: int) -> None:
        """Ends an open window with `step` and prints its profile."""
        if not self._running:
            return
        first, self._running, self._window = self._running[0], None, None
        try:
            jax.profiler.stop_trace()
            profile = read_profile(self._folder(first))
        except (OSError, RuntimeError, ValueError) as error:
            self._say(f"warning: the profile of step {first} was lost: {' '.join(str(error).split())[:200]}")
            return
        where = f"steps {first} to {step}, in {self._folder(first)}"
        where += " (TensorBoard's profile plugin or xprof shows it)"
        self._say(f"profile:   {where}")
        for line in profile.lines(step - first + 1) if profile else ["no kernels were recorded"]:
            self._say(f"{'':11}{line}")

    def _folder(self, step: int) -> Path:
        return self._workdir / "profiles" / f"step_{step}"
