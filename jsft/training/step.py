"""The compiled programs of a run: gradient of one micro batch, the update, and the held-out loss.

A step is `start`, `add_gradients` for each micro batch (added up in `precision.gradients`), then `update`; before the
first micro batch `gather` and after the last `reduce`, where mesh.gather and mesh.reduce say so. They are separate
programs because the number of micro batches varies from step to step with what the packer could fit. The first micro
batch, too, adds to what is there, zeros: a program of its own for it would have to be compiled as well, and the compiler
holds another tree of gradients in it (Qwen3-4B, layers unrolled: 14 GiB).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jsft.data.batch import Batch
from jsft.kernels.attention import settle_backward
from jsft.kernels.linear_cross_entropy import LossSums, linear_cross_entropy
from jsft.mesh import batch_sharding, replicated
from jsft.models.config import ModelConfig
from jsft.models.decoder import (
    accumulates_in_place,
    divided_matrices,
    gathered_weights,
    hidden_states,
    lie_apart,
    reduced_gradients,
    unembedding,
)
from jsft.models.module import abstract_parameters
from jsft.planning.memory import gathers_once, reduces_once
from jsft.training.optimizer import (
    TrainState,
    apply_update,
    learning_rate_schedule,
    parameter_dtype,
    updates_in_place,
)
from jsft.training.platform import gather_ahead_options

Tree = Any


class Weights(NamedTuple):
    """What the gradient of a micro batch is made from."""

    parameters: Tree
    gathered: dict[str, jax.Array]  # as `gathered_weights` makes them; {}: each layer gathers its own


class StepPrograms(NamedTuple):
    """The jitted functions of a run. Gradients and sums are donated when they are added to."""

    start: Callable[[], tuple[Tree, LossSums]]  # zeros
    gather: Callable[[Tree], dict[str, jax.Array]] | None  # `gathered_weights`, where they are made once a step
    add_gradients: Callable[[Weights, Batch, Tree, LossSums], tuple[Tree, LossSums]]
    reduce: Callable[[Tree], Tree] | None  # `reduced_gradients`, where they are summed over devices once a step
    update: Callable[[TrainState, Tree, LossSums, jax.Array], tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[[Tree, Batch], tuple[LossSums, jax.Array]]  # sums, and the sum of the weights

    def weights(self, parameters: Tree) -> Weights:
        """For a step's micro batches. To be let go of before the update, which wants their memory and the parameters'."""
        return Weights(parameters, self.gather(parameters) if self.gather else {})

    def reduced(self, gradients: Tree) -> Tree:
        """What the update takes, of the sum over a step's micro batches."""
        return self.reduce(gradients) if self.reduce else gradients


def loss_sums(
    parameters: Tree, batch: Batch, model: ModelConfig, config: ConfigDict, mesh: Mesh, remat, stacked=None,
    gathered=None, accumulated=None, typical_length: float | None = None,
) -> LossSums:
    """Sums over the supervised tokens of `batch`; `.loss` = sum(loss_weights * -log p(target)), float32.

    `stacked`, `gathered`, `accumulated`: as in `hidden_states`; `typical_length`: as in `settle_backward`.
    """
    backward = "deterministic" if config.train.deterministic else config.attention.backward
    hidden = hidden_states(
        parameters, model, batch.tokens, batch.positions, batch.doc_start, batch.doc_end, mesh=mesh, remat=remat,
        compute_dtype=jnp.dtype(config.precision.compute), attention=config.attention.implementation,
        backward=settle_backward(backward, typical_length), ordered=backward == "deterministic",
        norms=config.norm.implementation, reduce_dtype=jnp.dtype(config.precision.reduce), stacked=stacked,
        gathered=gathered, reduce_later=bool(gathered) and reduces_once(config, mesh), accumulated=accumulated,
        unroll=_unrolls(config, mesh),
    )
    return linear_cross_entropy(
        hidden, unembedding(parameters, model), batch.targets, batch.loss_weights, mesh=mesh
    )


def _unrolls(config: ConfigDict, mesh: Mesh) -> bool:
    """train.unroll_layers, or its default: on GPUs (docs/performance.md), not where compiling is the larger part."""
    asked = config.train.unroll_layers
    return mesh.devices.flat[0].platform == "gpu" if asked is None else asked


def gradient_form(model: ModelConfig, config: ConfigDict, mesh: Mesh) -> Tree:
    """Shapes, in the parameters' dtype, and shardings of the gradients: as the parameters, the matrices of the layers
    apart where the layers are written out (see `jsft.models.stack`)."""
    parameters = abstract_parameters(model, mesh, parameter_dtype(config))
    if not _unrolls(config, mesh):
        return parameters
    return lie_apart(parameters, model, _split_form)


def _split_form(p: jax.ShapeDtypeStruct) -> tuple[jax.ShapeDtypeStruct, ...]:
    """`apart` of a shape."""
    sharding = NamedSharding(p.sharding.mesh, PartitionSpec(*p.sharding.spec[1:]))
    return (jax.ShapeDtypeStruct(p.shape[1:], p.dtype, sharding=sharding),) * p.shape[0]


def _own_form(form: Tree, model: ModelConfig, mesh: Mesh, unrolled: bool) -> Tree:
    """`gradient_form` of sums that each device has for itself (`reduce_later` of `hidden_states`)."""
    whole = abstract_parameters(model, mesh, jnp.float32)["layers"]

    def own(p):
        shape = (p.shape[0], mesh.size * p.shape[1], p.shape[2])
        sharding = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))
        return jax.ShapeDtypeStruct(shape, p.dtype, sharding=sharding)

    found = {name: own(whole[name]) for name in divided_matrices(model, mesh)}
    found = {name: _split_form(p) if unrolled else p for name, p in found.items()}
    return form | {"layers": form["layers"] | found}


def make_programs(
    model: ModelConfig, config: ConfigDict, mesh: Mesh, shardings: Tree, total_steps: int, remat,
    typical_length: float | None = None,
) -> StepPrograms:
    """Builds the programs. `shardings`: tree of NamedSharding of the parameters; gradients and moments follow it.
    `typical_length`: as in `settle_backward`.
    """
    dtype = jnp.dtype(config.precision.gradients)
    schedule = learning_rate_schedule(config, total_steps)
    whole = replicated(mesh)
    rows = batch_sharding(mesh)
    state_sharding = TrainState(shardings, shardings, shardings, whole, whole)

    gathers, reduces = gathers_once(config, mesh), reduces_once(config, mesh)
    # Adding in the backward pass itself gives the sum in the parameters' dtype, so only where that is the one wanted; a
    # stand-in's has the wanted one.
    in_place = accumulates_in_place(model, mesh, reduces)
    if dtype != parameter_dtype(config) and not reduces:
        in_place = jax.tree.map(lambda _: False, in_place)
    form = gradient_form(model, config, mesh)
    kernel = updates_in_place(config, mesh)
    gradient_shardings = jax.tree.map(lambda p: p.sharding, form)
    sum_form = _own_form(form, model, mesh, _unrolls(config, mesh)) if reduces else form
    sum_shardings = jax.tree.map(lambda p: p.sharding, sum_form)
    gathers_ahead = _unrolls(config, mesh) and mesh.size > 1
    ahead = gather_ahead_options(mesh.devices.flat[0].platform) if gathers_ahead else None

    def start():
        gradients = jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), sum_form)
        return gradients, LossSums(*[jnp.float32(0)] * len(LossSums._fields))

    def add_gradients(weights, batch, gradients, sums):
        parameters, gathered = weights
        accumulated = gradients if any(jax.tree.leaves(in_place)) else None
        stacked = parameters if _unrolls(config, mesh) else None
        if stacked:
            parameters = lie_apart(parameters, model)
        if reduces:
            own = {name: sum_form["layers"][name] for name in gathered}
            own = jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), own)
            parameters = parameters | {"layers": parameters["layers"] | own}

        def objective(p):
            more = loss_sums(p, batch, model, config, mesh, remat, stacked, gathered, accumulated, typical_length)
            return more.loss, more

        (_, more), new = jax.value_and_grad(objective, has_aux=True)(parameters)
        new = jax.lax.with_sharding_constraint(jax.tree.map(lambda g: g.astype(dtype), new), sum_shardings)

        def add(done, old, new):
            return new if done else jax.tree.map(jnp.add, old, new)

        added = jax.tree.map(add, in_place, gradients, new)
        return added, jax.tree.map(jnp.add, sums, more)

    def update(state, gradients, sums, weight_sum):
        rate = schedule(state.step).astype(jnp.float32)
        state, metrics = apply_update(state, gradients, rate, config, kernel)
        count = jnp.maximum(sums.count, 1)
        weighed = not config.objective.use_advantage  # as the loss is, unless advantages make the weights no mean
        metrics |= {
            "loss": sums.loss / weight_sum,
            "nll": sums.nll / count,
            "entropy": sums.weighted_entropy / weight_sum if weighed else sums.entropy / count,
            "accuracy": sums.correct / count,
            "lr": rate,
        }
        return state, metrics

    def evaluate(parameters, batch):
        return loss_sums(parameters, batch, model, config, mesh, remat), jnp.sum(batch.loss_weights)

    def gather_all(parameters):
        return gathered_weights(parameters, model, jnp.dtype(config.precision.compute), mesh)

    def reduce_all(gradients):
        return reduced_gradients(gradients, model, jnp.dtype(config.precision.reduce), mesh)

    return StepPrograms(
        jax.jit(start, out_shardings=(sum_shardings, whole)),
        jax.jit(gather_all, in_shardings=(shardings,), out_shardings=whole) if gathers else None,
        jax.jit(
            add_gradients,
            in_shardings=(Weights(shardings, whole if gathers else {}), rows, sum_shardings, whole),
            out_shardings=(sum_shardings, whole),
            donate_argnums=(2, 3),
            keep_unused=True,  # weights that stand-ins stand for: there all the same, and counted by its memory analysis
            compiler_options=ahead,
        ),
        jax.jit(reduce_all, in_shardings=(sum_shardings,), out_shardings=gradient_shardings) if reduces else None,
        jax.jit(
            update,
            in_shardings=(state_sharding, gradient_shardings, whole, whole),
            out_shardings=(state_sharding, whole),
            donate_argnums=0,
        ),
        jax.jit(evaluate, in_shardings=(shardings, rows), out_shardings=whole, compiler_options=ahead),
    )


def abstract_batch(rows: int, length: int, mesh: Mesh) -> Batch:
    """Shapes of a micro batch of `rows` packed rows over all devices, for compiling without data."""
    sharding = batch_sharding(mesh)

    def array(dtype):
        return jax.ShapeDtypeStruct((rows, length), dtype, sharding=sharding)

    i32 = jnp.int32
    return Batch(array(i32), array(i32), array(jnp.float32), array(i32), array(i32), array(i32))
