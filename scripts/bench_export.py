#!/usr/bin/env python
"""Seconds to write a model directory from sharded weights and to load one, on this machine's disk and devices.

    .venv/bin/python scripts/bench_export.py --model qwen3_14b --folder /disk/of/the/run

makes random weights of a published shape in bfloat16, sharded over all devices, writes them as an export does, has the
disk forget what it holds in memory, loads them as a run does, compares every bit, and removes the directory. Printed:
seconds, bytes a second, and what the process holds of the host's memory beyond what it held before.
"""

import argparse
import dataclasses
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from jsft.errors import JsftError
from jsft.hardware.mesh import describe, make_mesh
from jsft.hf.load import load_parameters
from jsft.hf.random_model import write_random_model
from jsft.hf.verify import compare_weights
from jsft.hf.write import write_model
from jsft.models.families import initial_parameters
from jsft.models.parameters import get_leaf
from jsft.models.published import PUBLISHED


class Watch:
    """`seconds`, and what this process holds of the host's memory, in bytes: `before`, and the `most` meanwhile.

    Pages of files, which the system takes back when it must, are not counted.
    """

    def __enter__(self):
        self.before = self.most = _held()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        self._began = time.perf_counter()
        return self

    def _look(self) -> None:
        while not self._stop.wait(0.005):
            self.most = max(self.most, _held())

    def __exit__(self, *_) -> None:
        self.seconds = time.perf_counter() - self._began
        self._stop.set()
        self._thread.join()

    def told(self, size: int) -> str:
        more = (self.most - self.before) / 2**30
        return f"{self.seconds:.1f} s, {size / self.seconds / 1e9:.2f} GB/s, {more:.2f} GiB of the host's memory"


def _held() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def _forget(folder: Path) -> float:
    """Seconds until all files are on the disk; then the system drops its copies of them in memory."""
    began = time.perf_counter()
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3_14b", choices=PUBLISHED, help="a shape of jsft/models/published.py")
    parser.add_argument("--layers", type=int, help="keep only this many layers")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary one")
    arguments = parser.parse_args()
    if arguments.folder and not arguments.folder.is_dir():
        parser.error(f"--folder: {arguments.folder} is no directory; name one on the disk to measure")
    model = PUBLISHED[arguments.model]
    if arguments.layers:
        model = dataclasses.replace(model, num_layers=arguments.layers)
    mesh = make_mesh()
    parameters = jax.block_until_ready(initial_parameters(model, mesh, jnp.bfloat16, 0))
    size = sum(x.nbytes for x in jax.tree.leaves(parameters))
    print(f"{arguments.model} ({model.num_layers} layers), {size / 1e9:.1f} GB in bfloat16, on {describe(mesh)}")
    folder = Path(tempfile.mkdtemp(prefix="bench_export-", dir=arguments.folder))
    try:
        base = write_random_model(folder / "base", model.family)  # stands in for config and tokenizer
        with Watch() as written:
            out = write_model(parameters, model, base, folder / "out", jnp.bfloat16)
        print(f"write: {written.told(size)}; on the disk {_forget(out):.1f} s later", flush=True)
        with Watch() as loaded:
            again = jax.block_until_ready(load_parameters(out, model, mesh, jnp.bfloat16))
        print(f"load:  {loaded.told(size)}, read from the disk", flush=True)
        del again
        wrong = compare_weights(lambda path: get_leaf(parameters, path), out, model, mesh, jnp.bfloat16)
        print(f"differing values: {wrong}")
        sys.exit(bool(wrong))
    except JsftError as error:
        sys.exit(f"error: {error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
