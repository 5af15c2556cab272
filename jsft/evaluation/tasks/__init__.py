"""The registry of benchmarks: a module each, listed here in the order of the paper's tables."""

import difflib

from jsft.errors import ConfigError
from jsft.evaluation.tasks.aime24 import Aime24
from jsft.evaluation.tasks.aime25 import Aime25
from jsft.evaluation.tasks.alpacaeval import AlpacaEval
from jsft.evaluation.tasks.base import Task
from jsft.evaluation.tasks.countdown import Countdown
from jsft.evaluation.tasks.gpqa_diamond import GpqaDiamond
from jsft.evaluation.tasks.gsm8k import Gsm8k
from jsft.evaluation.tasks.halueval import HaluEval
from jsft.evaluation.tasks.hexphi import HexPhi
from jsft.evaluation.tasks.ifeval import IfEval
from jsft.evaluation.tasks.livecodebench_v2 import LiveCodeBenchV2
from jsft.evaluation.tasks.math500 import Math500
from jsft.evaluation.tasks.mmlu_pro import MmluPro
from jsft.evaluation.tasks.truthfulqa import TruthfulQa

_ALL = (
    Math500,
    Aime24,
    Aime25,
    Gsm8k,
    Countdown,
    LiveCodeBenchV2,
    GpqaDiamond,
    MmluPro,
    IfEval,
    AlpacaEval,
    HaluEval,
    TruthfulQa,
    HexPhi,
)
TASKS: dict[str, type[Task]] = {task.name: task for task in _ALL}


def get_task(name: str) -> Task:
    """The task of that name. Raises ConfigError naming the nearest ones."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=2, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"--tasks: unknown task '{name}'{hint} (known: {', '.join(TASKS)})")
    return TASKS[name]()
