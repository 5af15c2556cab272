"""Histograms by layer: counts against numpy's on every mesh, updates as AdamW made them, and what TensorBoard reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jsft import config as schema
from jsft.hardware.mesh import make_mesh
from jsft.hf.random_model import write_random_model
from jsft.models.families import initial_parameters, read_config
from jsft.run.metrics import MetricsWriter
from jsft.step.histograms import EDGES, make_histograms, named
from jsft.step.optimizer import apply_update, initial_state

RATE = 1e-3


def numpy_counts(values) -> np.ndarray:
    """The definition: octaves of the magnitude, zeros at the low end, no values that are not finite."""
    values = np.abs(np.asarray(values, np.float64).ravel())
    values = values[np.isfinite(values)]
    logs = np.full(values.shape, float(EDGES[0]))
    logs[values > 0] = np.clip(np.floor(np.log2(values[values > 0])), EDGES[0], EDGES[-1] - 1)
    return np.histogram(logs, EDGES)[0]


def one_update(tmp_path, replica, fsdp):
    """(state before, state after, gradients with a zero and a NaN, counts) of a model of three layers on a mesh."""
    config = schema.default_config()
    config.model.path, config.data.train = "model", "data"
    config = schema.resolve(config)
    write_random_model(tmp_path / "model", hidden_size=64, heads=2, kv_heads=1, intermediate_size=128, layers=3)
    mesh = make_mesh(replica, fsdp, jax.devices()[: replica * fsdp])
    state = initial_state(initial_parameters(read_config(tmp_path / "model"), mesh, jnp.float32, seed=0), config)
    shardings = jax.tree.map(lambda p: p.sharding, state.parameters)
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(shardings)))
    gradients = jax.tree.map(
        lambda key, p: jax.device_put(1e-3 * jax.random.normal(key, p.shape), p.sharding),
        jax.tree.unflatten(jax.tree.structure(shardings), list(keys)),
        state.parameters,
    )
    after, _ = jax.jit(lambda s, g: apply_update(s, g, jnp.float32(RATE), config))(state, gradients)
    odd = gradients["layers"]["gate"].at[1, 0, :3].set(jnp.array([0.0, jnp.nan, -jnp.inf]))
    gradients["layers"]["gate"] = jax.device_put(odd, shardings["layers"]["gate"])
    program = make_histograms(config, mesh, shardings)
    return state, after, gradients, jax.device_get(program(after, gradients, jnp.float32(RATE)))


@pytest.mark.parametrize("replica, fsdp", [(1, 1), (1, 8), (2, 4)])
def test_counts_are_numpys_layer_by_layer(tmp_path, replica, fsdp):
    before, after, gradients, counts = one_update(tmp_path, replica, fsdp)
    for kind, tree in (("parameters", after.parameters), ("gradients", gradients)):
        tree = jax.device_get(tree)
        for index in range(3):
            values = np.concatenate([leaf[index].ravel() for leaf in jax.tree.leaves(tree["layers"])])
            np.testing.assert_array_equal(counts[kind]["layers"][index], numpy_counts(values))
        for name in set(tree) - {"layers"}:
            np.testing.assert_array_equal(counts[kind][name], numpy_counts(tree[name]))
    lost = jax.tree.leaves(gradients["layers"])
    assert counts["gradients"]["layers"].sum() == sum(leaf.size for leaf in lost) - 2

    moved = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), before, after).parameters
    expected = numpy_counts(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(moved["layers"])]))
    # A difference of float32 weights is a little rounded, which moves values over an edge, but not many.
    assert np.abs(counts["updates"]["layers"].sum(0) - expected).sum() < 0.01 * expected.sum()


def test_names_sort_by_layer():
    counts = {"gradients": {"layers": np.ones((12, 4), int), "embedding": np.ones(4, int)}}
    assert list(named(counts)) == [*(f"gradients/layer_{i:02}" for i in range(12)), "gradients/embedding"]


def test_what_tensorboard_reads(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    row = np.zeros(len(EDGES) - 1, int)
    row[[5, 7]] = 3, 1
    writer.write_layers(4, {"gradients/layer_0": row, "gradients/layer_1": np.zeros_like(row)})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["histograms"] == ["gradients/layer_0"]
    (event,) = events.Histograms("gradients/layer_0")
    value = event.histogram_value
    assert (event.step, value.min, value.max, value.num) == (4, EDGES[5], EDGES[8], 4)
    assert value.bucket_limit == [EDGES[6], EDGES[7], EDGES[8]] and value.bucket == [3, 0, 1]
