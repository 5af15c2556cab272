"""Grading in worker processes, each response under a hard time limit.

Signals cannot stop a computer-algebra library that hangs in C code, so a slow worker is killed and replaced.
"""

import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jsft.environments import import_path
from jsft.evaluation.tasks.base import Grade, Task

START_SECONDS = 120.0  # for imports, which do not count against the first response


class GradingPool:
    """Worker processes that grade. Use as a context manager."""

    def __init__(self, task: Task, workers: int | None = None):
        self.task = task
        self.workers = workers or max(1, min(16, (os.cpu_count() or 1)))
        self._local = threading.local()
        self._children: list[subprocess.Popen] = []
        self._threads = ThreadPoolExecutor(self.workers)

    def __enter__(self) -> "GradingPool":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for child in self._children:
            child.kill()
            child.wait()

    def grade(
        self, items: Iterable[tuple[dict[str, Any], str]], done: Callable[[], None] = lambda: None
    ) -> list[Grade]:
        """Grades (gold, response) pairs in order. Too slow, or a failing grader: scores 0 and a note."""

        def one(item):
            grade = self._one(*item)
            done()
            return grade

        return list(self._threads.map(one, items))

    def _one(self, gold: dict[str, Any], response: str) -> Grade:
        child = getattr(self._local, "child", None)
        if child is None:
            child = self._local.child = self._start()
        payload = json.dumps({"gold": gold, "response": response}) + "\n"
        # No writer thread is needed: the worker reads the whole line before it computes.
        try:
            child.stdin.write(payload.encode())
            child.stdin.flush()
            line = _read_line(child, self.task.grade_seconds)
        except BrokenPipeError:
            line = b""
        if line:
            said = json.loads(line)
            return Grade(said["scores"], said["answer"], said["note"])
        note = "grading took too long" if line is None else "the grader died"
        child.kill()
        child.wait()
        self._local.child = None
        return Grade(dict.fromkeys(self.task.metrics, 0.0), None, note)

    def _start(self) -> subprocess.Popen:
        path = os.pathsep.join(p for p in (str(import_path()), os.environ.get("PYTHONPATH")) if p)
        child = subprocess.Popen(
            [sys.executable, "-m", "jsft.evaluation.grading", self.task.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        self._children.append(child)
        if _read_line(child, START_SECONDS) != b"ready\n":
            child.kill()
            raise RuntimeError(f"the grading process of {self.task.name} does not start")
        return child


def _read_line(child: subprocess.Popen, seconds: float) -> bytes | None:
    """A line of the child's output; None when none comes in time, b'' when the child is gone."""
    import time

    end, line = time.monotonic() + seconds, b""
    while not line.endswith(b"\n"):
        left = end - time.monotonic()
        if left <= 0 or not select.select([child.stdout], [], [], left)[0]:
            return None
        piece = os.read(child.stdout.fileno(), 1 << 16)
        if not piece:
            return b""
        line += piece
    return line


def _serve(task_name: str) -> None:
    """The worker: a JSON line in, a JSON line out."""
    from jsft.evaluation.tasks import get_task

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # graders' libraries may print
    task = get_task(task_name)
    task.warm_up()
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        item = json.loads(line)
        try:
            grade = task.grade(item["gold"], item["response"])
            said = {"scores": grade.scores, "answer": grade.answer, "note": grade.note}
        except Exception as error:  # one strange response must not end an evaluation
            note = f"the grader failed: {type(error).__name__}: {str(error)[:200]}"
            said = {"scores": dict.fromkeys(task.metrics, 0.0), "answer": None, "note": note}
        print(json.dumps(said), file=out, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
