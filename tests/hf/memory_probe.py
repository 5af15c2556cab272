"""Run by test_memory.py: peak anonymous memory of loading and exporting a model of Qwen2.5-1.5B's width, as JSON.

    python memory_probe.py FOLDER DTYPE LAYERS VOCABULARY

Files are not counted (they are read by pread and written by pwrite): only memory this process asked for.
"""

import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from bench_export import Watch

from jsft.hardware.mesh import make_mesh, parameter_sharding
from jsft.hf.load import load_parameters
from jsft.hf.random_model import write_random_model
from jsft.hf.write import write_model
from jsft.models import parameter_table, read_config
from jsft.models.parameters import get_leaf


def make_directory(folder: Path, mesh, layers: int, vocabulary: int) -> Path:
    """Filled with one random megabyte over and over."""
    base = write_random_model(folder / "small", "qwen2", heads=12, kv_heads=2, head_dim=128, hidden_size=1536, layers=1)
    config = json.loads((base / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "intermediate_size": 8960, "vocab_size": vocabulary}
    (base / "config.json").write_text(json.dumps(config))
    config = read_config(base)
    table = parameter_table(config)
    block = (np.random.default_rng(0).standard_normal(2**20) * 0.02).astype(jnp.bfloat16)

    def leaf(path):
        spec = get_leaf(table, path)
        sharding = parameter_sharding(spec.axes, spec.shape, mesh)
        return jax.make_array_from_callback(
            spec.shape, sharding, lambda index: np.resize(block, sharding.shard_shape(spec.shape))
        )

    return write_model(leaf, config, base, folder / "model", "bfloat16", max_shard_bytes=10**9)


def main() -> None:
    folder, dtype = Path(sys.argv[1]), jnp.dtype(sys.argv[2])
    mesh = make_mesh()
    if not (folder / "model").exists():
        make_directory(folder, mesh, int(sys.argv[3]), int(sys.argv[4]))
    config = read_config(folder / "model")
    with Watch() as load:
        parameters = jax.block_until_ready(load_parameters(folder / "model", config, mesh, dtype))
    with Watch() as export:
        write_model(parameters, config, folder / "model", folder / "out", "bfloat16", max_shard_bytes=10**9)
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(parameters))
    print(
        json.dumps(
            {
                "arrays": arrays,
                "before": load.before,
                "load": load.most,
                "export": export.most,
                "load_seconds": load.seconds,
                "export_seconds": export.seconds,
            }
        )
    )


main()
