"""The registry of benchmarks: a module each, listed here in the order of the paper's tables."""

import difflib

from jsft.errors import ConfigError
from jsft.evaluation.tasks.base import Task
from jsft.evaluation.tasks.countdown import Countdown

TASKS: dict[str, type[Task]] = {task.name: task for task in (Countdown,)}


def get_task(name: str) -> Task:
    """The task of that name. Raises ConfigError naming the nearest ones."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=2, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"--tasks: unknown task '{name}'{hint} (known: {', '.join(TASKS)})")
    return TASKS[name]()
