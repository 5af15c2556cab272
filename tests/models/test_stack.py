"""How the layers' backward pass is ordered. tests/step/test_programs.py holds its gradients to the plain ones."""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from jsft.models.remat import checkpoint_policy
from jsft.models.stack import LayerArrays, Prefetch, StackOptions, run_layers


@pytest.mark.parametrize("names", [["attention_out@host"], ["attention_out@host", "gate@host"]])
def test_one_value_is_fetched_from_the_host_after_the_gradients_two_layers_above(names):
    """Otherwise XLA would delay these gradients to hide the fetches, and hold what they read. Several values need more
    time: they are fetched as early as the compiler likes.
    """

    def layer(x, weights, gathered, constants):
        hidden = jnp.tanh(checkpoint_name(x @ weights["down"], "attention_out"))
        return jnp.tanh(checkpoint_name(hidden @ weights["up"], "gate"))

    layer = jax.checkpoint(layer, policy=checkpoint_policy(names))
    options = StackOptions(unroll=True, recompute=True, prefetch=Prefetch(lambda weights: {}, lambda shards: {}))

    def loss(weights, x):
        return run_layers(layer, options, x, LayerArrays(weights, {}, {}, {}), {}).sum()

    down, up = jnp.ones((4, 8, 3)), jnp.ones((4, 3, 8))
    jaxpr = jax.make_jaxpr(jax.grad(loss))({"down": down, "up": up}, jnp.ones((5, 8)))
    barriers = [
        [variable.aval for variable in equation.invars]
        for equation in jaxpr.eqns
        if equation.primitive.name == "optimization_barrier"
    ]
    fetching = [
        {value.shape for value in values if value.memory_space == jax.memory.Space.Device}
        for values in barriers
        if any(value.memory_space == jax.memory.Space.Host for value in values)
    ]
    # The forward pass waits for the copies of three layers. The backward pass starts three fetches, and above the first
    # of them there is no layer with gradients.
    one = len(names) == 1
    assert [shapes >= {(8, 3), (3, 8)} for shapes in fetching] == [False] * 3 + [False, one, one]
