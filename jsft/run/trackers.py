"""Trackers beside TensorBoard: Weights & Biases (`log.wandb=PROJECT`) and Trackio (`log.trackio=PROJECT`).

WANDB_MODE=offline and the like are respected; Trackio stays on this machine unless TRACKIO_SPACE_ID names a Space.
"""

import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jsft import config as schema
from jsft.errors import ConfigError

Log = Callable[[str, int, dict[str, Any]], None]  # (prefix, step, metrics)
Say = Callable[[str], None]


class _Tracker(NamedTuple):
    """init: keywords of the package's `init`, from (name, identity, workdir); log: one record through its run."""

    init: Callable[[str, str, Path], dict[str, Any]]
    log: Callable[[Any, dict[str, Any], int], None]
    offline: str  # how to use it without a login


_TRACKERS = {
    "wandb": _Tracker(
        lambda name, identity, workdir: {"name": name, "id": identity, "dir": str(workdir)},
        lambda run, record, step: run.log(record | {"step": step}),
        "log in, set WANDB_MODE=offline",
    ),
    # Trackio knows a run by its name alone.
    "trackio": _Tracker(
        lambda name, identity, workdir: {"name": f"{name} {identity[:8]}", "embed": False},
        lambda run, record, step: run.log(record, step=step),
        "log in, unset TRACKIO_SPACE_ID",
    ),
}


def open_trackers(config, name: str, workdir: Path, say: Say) -> tuple[Log, Callable[[], None]] | None:
    """(function that logs, function that ends) of all trackers that the config names, or None where it names none.

    Raises ConfigError when a package is not installed or refuses. A later error is reported once and does not end the
    run.
    """
    opened = [_open(kind, config, name, workdir, say) for kind in _TRACKERS if config.log[kind]]
    if not opened:
        return None

    def log(prefix: str, step: int, metrics: dict[str, Any]) -> None:
        for one, _ in opened:
            one(prefix, step, metrics)

    def end() -> None:
        for _, one in opened:
            one()

    return log, end


def check_trackers(config) -> None:
    """Raises ConfigError where the config names a tracker that is not installed."""
    for kind in _TRACKERS:
        if config.log[kind]:
            _package(kind)


def _package(kind: str):
    try:
        return importlib.import_module(kind)
    except ImportError as error:
        raise ConfigError(
            f"log.{kind} is set, but {kind} is not installed: pip install 'jsft[{kind}]', or leave it unset"
        ) from error


def _open(kind: str, config, name: str, workdir: Path, say: Say) -> tuple[Log, Callable[[], None]]:
    """One tracker. A restarted run has the same identity."""
    project, tracker, package = config.log[kind], _TRACKERS[kind], _package(kind)
    identity = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:16]
    try:
        settings = tracker.init(name, identity, workdir)
        run = package.init(project=project, resume="allow", config=schema.flatten(config), **settings)
    except Exception as error:  # network and login raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"log.{kind}={project}: {reason}; {tracker.offline}, or leave it unset") from error
    failed = []

    def guarded(function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:
            if not failed:
                say(f"warning: {kind}: {' '.join(str(error).split())[:200]}; the run continues without it")
            failed.append(error)

    def log(prefix: str, step: int, metrics: dict[str, Any]) -> None:
        guarded(tracker.log, run, {f"{prefix}/{key}": value for key, value in metrics.items()}, step)

    return log, lambda: guarded(run.finish)
