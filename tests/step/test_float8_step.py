"""The programs of a step with precision.matmul=float8: the same gradients however layers are run, saved and sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsft.hardware.mesh import make_mesh, replicated, shard_batch
from jsft.hf.random_model import write_random_model
from jsft.kernels.quantize import FLOAT8
from jsft.models.families import initial_parameters, read_config
from jsft.models.float8 import linear_float8, quantized_input
from jsft.models.remat import LADDER
from jsft.step.components import programs
from jsft.step.flushed import make_flushed, shares
from jsft.step.gather_once import quantized_weights
from jsft.step.optimizer import initial_state
from tests.step.test_programs import gradients_of, make_batch, make_components

FLOAT8_FIELDS = dict(precision__matmul="float8", precision__float8_forward="all")
# By devices. A scale of inputs and gradients is that of a device's tokens: other small values round another way.
TOLERANCE = {1: 1e-5, 8: 0.02}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_random_model(
        tmp_path_factory.mktemp("model") / "m", hidden_size=64, heads=4, kv_heads=2, intermediate_size=128, std=0.1
    )
    return read_config(folder)


@pytest.fixture(scope="module")
def batches(model):
    return [make_batch(8, 128, model.vocab_size, seed) for seed in (0, 1)]


def one_device():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def plain(model, batches):
    """One device, all activations saved, weights quantised where they are used."""
    return gradients_of(make_components(model, one_device(), 128, **FLOAT8_FIELDS), "none", batches)


def distance(found, expected) -> float:
    """The largest distance of a gradient from the expected one, as a share of its norm."""
    pairs = zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]))
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs)


def test_weights_quantised_once_a_step_are_the_same_on_every_mesh(model):
    def quantised(mesh):
        parameters = initial_parameters(model, mesh, jnp.float32, 0)
        made = jax.jit(lambda p: quantized_weights(p, model, mesh, unstacked=False), out_shardings=replicated(mesh))(
            parameters
        )
        return jax.tree.map(lambda part: np.asarray(part.astype(jnp.float32)), made), made

    (one, arrays), (other, _) = quantised(one_device()), quantised(make_mesh(2))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    gate = arrays["gate"]
    assert len(arrays) == 7 and gate.values.dtype == FLOAT8 and gate.scale.shape == (2, 1, 1)
    assert gate.values.shape == (2, 128, 64) and gate.transposed.shape == (2, 64, 128)


def test_one_device_quantises_once_a_step_where_it_is_asked_to(model):
    asked = make_components(model, one_device(), 128, mesh__gather="step", mesh__reduce="step", **FLOAT8_FIELDS)
    assert programs(asked, "full").gather and not programs(asked, "full").reduce
    wide = make_components(model, one_device(), 128, mesh__gather="step")
    assert programs(wide, "full").gather is None


def test_values_that_become_zero_are_counted_by_layer():
    weight = np.ones((3, 4), np.float32)
    weight[1] = (448, 2.0**-9, 2.0**-10, 0)  # a half of the smallest value rounds to zero, a zero is none that was lost
    x = np.ones((5, 4), np.float32)
    x[2] = (448, 2.0**-11, 0, 0)

    def output(probe):
        return linear_float8(x, quantized_input(x), weight, None, False, jnp.float32, False, probe)

    counts = jax.vjp(output, jnp.zeros(6))[1](jnp.ones((5, 3)).at[0, 0].set(1e-9))[0]
    assert np.array_equal(counts, [1, 18, 1, 11, 1, 15])
    found = shares({"gate": np.stack([counts, 0 * counts]), "up": np.stack([counts, counts])})
    assert found["inputs/layer_0"] == 2 / 36 and found["weights/layer_1"] == 1 / 11 and len(found) == 6


@pytest.mark.slow
@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("rung", ["full", "none"])
def test_a_micro_batch_is_counted_on_every_mesh(model, batches, unroll, rung):
    def counted(mesh):
        components = make_components(model, mesh, 128, train__unroll_layers=unroll, **FLOAT8_FIELDS)
        parameters = initial_parameters(model, mesh, jnp.float32, 0)
        counts = make_flushed(components, rung)(parameters, shard_batch(batches[0], mesh))
        return shares(jax.device_get(counts)), {name: value.shape for name, value in counts.items()}

    (one, shapes), (other, _) = counted(one_device()), counted(make_mesh(2))
    assert set(shapes.values()) == {(2, 6)} and len(shapes) == 7 and len(one) == 6
    assert 0 < one["inputs/layer_0"] < 0.1 and 0 < one["gradients/layer_1"] < 0.3
    for name, share in one.items():
        if name.startswith("weights"):
            assert share == pytest.approx(other[name], rel=1e-6)
        else:  # the scale is that of a device's tokens, at most that of all
            assert 0.2 * share <= other[name] <= 1.02 * share + 1e-5


@pytest.mark.slow
def test_gradients_are_those_of_wide_products_but_for_the_rounding(model, batches, plain):
    wide = gradients_of(make_components(model, one_device(), 128), "none", batches)
    assert plain[0] == pytest.approx(wide[0], rel=2e-3) and 0.01 < distance(plain, wide) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("rung", LADDER)
def test_every_rung_of_the_ladder_gives_the_plain_gradients(model, batches, plain, rung):
    found = gradients_of(make_components(model, make_mesh(), 128, **FLOAT8_FIELDS), rung, batches)
    assert found[0] == pytest.approx(plain[0], rel=1e-3) and distance(found, plain) < TOLERANCE[8]


NAMES = "attention_input,mlp_input,mlp_hidden,attention_out"


@pytest.mark.slow
@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize(
    "devices, replica, gather, reduce, rung",
    [
        (1, 1, "layer", "layer", NAMES),
        (1, 1, "step", "layer", "full"),
        (8, 1, "layer", "layer", "attention_input@host,residual,gate@host"),
        (8, 2, "step", "layer", "none"),
        (8, 2, "step", "step", NAMES),
    ],
)
def test_every_way_to_run_the_layers_gives_the_plain_gradients(
    model, batches, plain, unroll, devices, replica, gather, reduce, rung
):
    mesh = make_mesh(replica, devices=jax.devices()[:devices])
    fields = dict(mesh__gather=gather, mesh__reduce=reduce, train__unroll_layers=unroll, **FLOAT8_FIELDS)
    found = gradients_of(make_components(model, mesh, 128, **fields), rung, batches)
    assert found[0] == pytest.approx(plain[0], rel=1e-3) and distance(found, plain) < TOLERANCE[devices]


@pytest.mark.slow
@pytest.mark.parametrize("forward", ["mlp", "none"])
def test_a_wide_forward_pass_leaves_the_rounding_of_gradients(model, batches, forward):
    """The loss comes near to that of wide products, or equals it; the gradients' products remain float8."""
    fields = FLOAT8_FIELDS | {"precision__float8_forward": forward}
    plain, found = (
        gradients_of(make_components(model, one_device(), 128, **f), "none", batches) for f in (FLOAT8_FIELDS, fields)
    )
    exact = gradients_of(make_components(model, one_device(), 128), "none", batches)
    assert abs(found[0] - exact[0]) < (1e-6 if forward == "none" else abs(plain[0] - exact[0]))
    assert 0.01 < distance(found, exact) < distance(plain, exact)


@pytest.mark.slow
@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("gather, rung", [("layer", NAMES), ("step", "none"), ("layer", "full")])
def test_a_wide_forward_pass_is_the_same_on_eight_devices(model, batches, unroll, gather, rung):
    fields = FLOAT8_FIELDS | dict(precision__float8_forward="mlp", mesh__gather=gather, train__unroll_layers=unroll)
    one = gradients_of(make_components(model, one_device(), 128, **fields), "none", batches)
    found = gradients_of(make_components(model, make_mesh(), 128, **fields), rung, batches)
    assert found[0] == pytest.approx(one[0], rel=1e-3) and distance(found, one) < TOLERANCE[8]


@pytest.mark.slow
def test_a_step_has_the_same_bits_twice(model, batches):
    components = make_components(model, make_mesh(2), 128, train__deterministic=True, **FLOAT8_FIELDS)
    one, two = (gradients_of(components, "full", batches) for _ in range(2))
    assert one[0] == two[0]
    jax.tree.map(np.testing.assert_array_equal, one[1], two[1])


@pytest.mark.slow
def test_a_model_learns_in_float8_as_with_wide_products(model, batches):
    """80 updates on two fixed batches of random tokens: both learn them by heart, float8 not much later."""
    mesh, curves = one_device(), []
    for matmul in ("bfloat16", "float8"):
        fields = dict(optimizer__learning_rate=3e-3, optimizer__schedule="constant", optimizer__warmup_ratio=0.0)
        components = make_components(model, mesh, 128, precision__matmul=matmul, **fields)
        jitted = programs(components._replace(rows=8), "none")
        state = initial_state(initial_parameters(model, mesh, jnp.float32, 0), components.config)
        weights = sum(float(batch.loss_weights.sum()) for batch in batches)
        losses = []
        for _ in range(80):
            state, metrics, _ = jitted.step(state, batches, weights)
            losses.append(float(metrics["loss"]))
        curves.append(np.asarray(losses))
    wide, float8 = curves
    assert wide[-1] < wide[0] / 100 and float8[-1] < float8[0] / 100
    assert np.all(float8[8:] <= wide[:-8] + 0.02)  # it lags by about five updates on the way
    assert abs((wide - float8)[-20:].mean()) < 0.05
