"""The losses of a run's last weights, with float8 products and with bfloat16 ones.

    python scripts/proof/both_products.py RUN... [--updates 100]

The training loss of a float8 run is computed with float8 products, and so has their rounding beside what the weights
lack. This tells the two apart: the loss of the rows of the run's last updates, in the micro batches in which they were
trained, and of its held-out rows, with either product. Writes both_products.json into each RUN.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import jax

from jsft import config as schema
from jsft.data.batch import Batch
from jsft.errors import CheckpointError, ConfigError, run_command
from jsft.hardware import xla
from jsft.hardware.mesh import shard_batch
from jsft.run.saved import find_checkpoint
from jsft.run.setup import build
from jsft.step.optimizer import parameter_dtype
from jsft.step.programs import decoder_options, loss_sums

PRODUCTS = ("bfloat16", "float8")  # values of `DecoderOptions.matmul`


def losses(workdir: Path, updates: int) -> dict[str, dict[str, float]]:
    """{data: {products: nats per trained token}}. Raises ConfigError, CheckpointError."""
    run = find_checkpoint(workdir, None)
    if run is None:
        raise ConfigError(f"{workdir} is no run with a checkpoint")
    components = build(schema.unflatten(run.config))
    parameters = run.parameters(components.mesh, parameter_dtype(components.config))
    rows = {"training rows": _last_batches(components.data, updates)}
    rows |= {f"{name} rows": batches for name, batches in components.held_out.items()}
    return {
        name: {products: _loss(components, parameters, batches, products) for products in PRODUCTS}
        for name, batches in rows.items()
    }


def _last_batches(data, updates: int) -> list[Batch]:
    first = max(0, data.total_steps - updates)
    steps = itertools.islice(data.iterate(first), data.total_steps - first)
    return [batch for step in steps for batch in step.micro_batches]


def program(components, products: str):
    """The jitted function of (parameters, batch): summed nats of the trained tokens, and their number."""
    config, mesh = components.config, components.mesh
    options = decoder_options(config, mesh, "none")
    # A short program: nothing is differentiated, so that layers in a loop cost no memory.
    options = dataclasses.replace(options, matmul=products, unroll=False, defer_reduce=False)

    def sums(parameters, batch):
        found = loss_sums(parameters, batch, components.model, options)
        return found.nll, found.count

    return jax.jit(sums)


def _loss(components, parameters, batches: Iterable[Batch], products: str) -> float:
    sums = program(components, products)
    found = [sums(parameters, shard_batch(batch, components.mesh)) for batch in batches]
    nll, count = (sum(map(float, values)) for values in zip(*jax.device_get(found)))
    return nll / count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--updates", type=int, default=100)
    args = parser.parse_args()
    xla.configure()
    print(f"| last weights of | loss of | {' | '.join(f'{products} products' for products in PRODUCTS)} |")
    print("|---|---|" + "---|" * len(PRODUCTS))
    for run in args.runs:
        found = losses(run, args.updates)
        (run / "both_products.json").write_text(json.dumps(found, indent=1) + "\n")
        for name, values in found.items():
            print(f"| {run.name} | {name} | {' | '.join(f'{value:.4f}' for value in values.values())} |", flush=True)
    return 0


if __name__ == "__main__":
    run_command(main, CheckpointError)
