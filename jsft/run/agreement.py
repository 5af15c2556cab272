"""What all processes of a run must have in common, compared over their link before training starts.

Another learning rate or data file on one process would not stop the run: each computes its own part, and the weights
would be wrong. Files are compared by content, so their paths may differ.
"""

import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jsft import config as schema
from jsft.cluster.peers import PeerLink
from jsft.data.loader import eval_fingerprints
from jsft.hf.digest import weights_digest
from jsft.run.provenance import code_version
from jsft.step.components import Components

# Fields that say where a process finds its files.
_PLACES = ("model.path", "model.revision", "data.train", "data.eval", "data.cache_dir")
_SHARED_DISK_SECONDS = 30.0  # a network file system may show a new file late


def start_facts(config: ConfigDict) -> dict[str, Any]:
    """The facts known before the processes connect: the resolved config without paths, the code, JAX's version."""
    flat = {name: value for name, value in schema.flatten(config).items() if name not in _PLACES}
    return flat | {"the version of jsft": code_version(), "the version of jax": jax.__version__}


def check_agreement(link: PeerLink, components: Components) -> None:
    """Raises ConfigError, on every process, where data, model or devices differ between the processes.

    Weights are compared by sizes, headers and a sample of their bytes (`weights_digest`).
    """
    config = components.config
    facts = {
        "the content of data.train": components.data.fingerprint,
        "the updates of the run": components.data.total_steps,
        "the content of data.eval": eval_fingerprints(config, components.model_dir) if components.held_out else {},
        "the config of model.path": repr(components.model),
        "the weights of model.path": weights_digest(components.model_dir),
        "the kind of device": jax.local_devices()[0].device_kind,
        "the devices of a process": jax.local_device_count(),
    }
    link.agree(facts, waiting_for="it may still be preparing its data")


def check_choices(link: PeerLink, remat: str, gather: str) -> None:
    """Raises ConfigError, on every process, where remat=auto or mesh.gather=auto chose otherwise on one of them.

    They follow from the memory of a process's devices and host. Other programs would wait for each other for ever.
    """
    facts = {"remat (chosen from the memory of devices and host; set remat)": remat}
    facts["mesh.gather (chosen from the memory of the devices; set mesh.gather)"] = gather
    link.agree(facts, waiting_for="it may still be compiling")


def check_workdir(link: PeerLink, workdir: Path, owner: str) -> None:
    """Raises ConfigError, on every process, where `workdir` is not the folder that process 0 has locked.

    owner: what process 0 wrote into the folder's lock; the others give "".
    """
    owner = link.exchange(owner)[0]
    lock, end = Path(workdir) / "lock", time.monotonic() + _SHARED_DISK_SECONDS
    while not (same := _read(lock) == owner) and time.monotonic() < end:
        time.sleep(0.2)
    link.agree({"the folder of --workdir": owner if same else f"no such lock in {workdir}"})


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        return ""
