"""Weights & Biases, where `log.wandb=PROJECT` asks for it. WANDB_MODE=offline and the like are respected."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsft import config as schema
from jsft.errors import ConfigError

Log = Callable[[str, int, dict[str, Any]], None]  # (prefix, step, metrics)


def open_wandb(config, name: str, workdir: Path, say: Callable[[str], None]) -> tuple[Log, Callable[[], None]] | None:
    """(function that logs, function that ends), or None where log.wandb is not set.

    A restarted run has the same id. Raises ConfigError when wandb is not installed or refuses. A later error is
    reported once and does not end the run.
    """
    if not config.log.wandb:
        return None
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "log.wandb is set, but wandb is not installed: pip install 'jsft[wandb]', or leave it unset"
        ) from error
    identity = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:16]
    try:
        run = wandb.init(
            project=config.log.wandb,
            name=name,
            id=identity,
            resume="allow",
            dir=str(workdir),
            config=schema.flatten(config),
        )
    except Exception as error:  # network and login raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"log.wandb={config.log.wandb}: {reason}; log in, set WANDB_MODE=offline, or leave it unset"
        ) from error
    failed = []

    def log(prefix: str, step: int, metrics: dict[str, Any]) -> None:
        try:
            run.log({f"{prefix}/{key}": value for key, value in metrics.items()} | {"step": step})
        except Exception as error:
            if not failed:
                say(f"warning: wandb: {' '.join(str(error).split())[:200]}; the run continues without it")
            failed.append(step)

    return log, run.finish
