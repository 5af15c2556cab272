"""The compiled programs of a training step: gradients of a micro batch, the update, and the held-out loss.

A step is `start`, `add_gradients` for each micro batch (summed in `precision.gradients`), then `update`; with
mesh.gather=step and mesh.reduce=step also `gather` before the first micro batch and `reduce` after the last. They are
separate programs because the number of micro batches varies from step to step with what the packer could fit. The first
micro batch adds to zeros: a program of its own for it would have to be compiled as well, and XLA holds another tree of
gradients in it (Qwen3-4B, layers unrolled: 14 GiB).
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jsft.config import multiplies_float8
from jsft.data.batch import Batch
from jsft.data.mixture import source_names
from jsft.hardware.mesh import batch_sharding, replicated, shard_batch
from jsft.hardware.xla import prefetch_options
from jsft.kernels.attention import settle_backward
from jsft.kernels.linear_cross_entropy import LossSums, linear_cross_entropy, no_sums
from jsft.models.config import ModelConfig
from jsft.models.decoder import PackedRows
from jsft.models.families import abstract_parameters
from jsft.models.forward import StepArrays, accumulates_in_place, hidden_states, unembedding, unstack_matrices
from jsft.models.options import DecoderOptions
from jsft.objectives import Weighting, weighting_of
from jsft.step.gather_once import (
    gathered_weights,
    gathers_once,
    quantized_weights,
    reduced_gradients,
    reduces_once,
    unreduced_form,
    unstack_form,
    with_placeholders,
)
from jsft.step.optimizer import TrainState, apply_update, learning_rate_schedule, parameter_dtype, updates_in_place

Tree = Any


class Weights(NamedTuple):
    """The weights that a micro batch's gradient is computed from."""

    parameters: Tree
    gathered: dict[str, Any]  # from `gathered_weights` or `quantized_weights`; {}: each layer gathers its own


class StepResult(NamedTuple):
    """Result of a step. metrics: float32 scalars on the devices; gradients: None unless asked for."""

    state: TrainState
    metrics: dict[str, jax.Array]
    gradients: Tree | None


class StepPrograms(NamedTuple):
    """The jitted functions of a run. Gradients and sums are donated when they are added to, the state to the update."""

    mesh: Mesh
    start: Callable[[], tuple[Tree, LossSums]]  # zeros
    gather: Callable[[Tree], dict[str, Any]] | None  # makes `Weights.gathered`, where it is made once a step
    add_gradients: Callable[[Weights, Batch, Tree, LossSums], tuple[Tree, LossSums]]
    reduce: Callable[[Tree], Tree] | None  # `reduced_gradients`, where they are summed over devices once a step
    update: Callable[[TrainState, Tree, LossSums, jax.Array], tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[[Tree, Batch], tuple[LossSums, jax.Array]]  # sums, and the sum of the weights

    def step(
        self, state: TrainState, micro_batches: Iterable[Batch], weight_sum: float, *, gradients: bool = False
    ) -> StepResult:
        """Dispatches one update; nothing here waits for the devices.

        micro_batches: this process's rows of each, as numpy arrays; weight_sum: of the loss weights of the whole batch;
        gradients: return them too.
        """
        total, sums = self.accumulate(state.parameters, micro_batches)
        state, metrics = self.update(state, total, sums, jnp.float32(weight_sum))
        return StepResult(state, metrics, total if gradients else None)

    def accumulate(self, parameters: Tree, micro_batches: Iterable[Batch]) -> tuple[Tree, LossSums]:
        """Gradients and loss sums over `micro_batches`, as the update takes them.

        Gathered weights are freed on return, before the update needs their memory.
        """
        total, sums = self.start()
        weights = Weights(parameters, self.gather(parameters) if self.gather else {})
        for micro_batch in micro_batches:
            total, sums = self.add_gradients(weights, shard_batch(micro_batch, self.mesh), total, sums)
        return self.reduce(total) if self.reduce else total, sums


def decoder_options(config: ConfigDict, mesh: Mesh, remat, typical_length: float | None = None) -> DecoderOptions:
    """The options of a run's decoder. typical_length: as in `settle_backward`."""
    backward = "deterministic" if config.train.deterministic else config.attention.backward
    return DecoderOptions(
        mesh=mesh,
        compute_dtype=config.precision.compute,
        reduce_dtype=config.precision.reduce,
        matmul="float8" if multiplies_float8(config) else "bfloat16",
        attention=config.attention.implementation,
        attention_backward=settle_backward(backward, typical_length),
        norms=config.norm.implementation,
        remat=remat,
        unroll=_unrolls(config, mesh),
        deterministic=backward == "deterministic",
        defer_reduce=reduces_once(config, mesh),
    )


def _unrolls(config: ConfigDict, mesh: Mesh) -> bool:
    """train.unroll_layers, or its default: on GPUs, not where compiling is the larger part.

    Measured in docs/lab/2026-11-29-step-changes.md.
    """
    asked = config.train.unroll_layers
    return mesh.devices.flat[0].platform == "gpu" if asked is None else asked


def loss_sums(
    parameters: Tree,
    batch: Batch,
    model: ModelConfig,
    options: DecoderOptions,
    step: StepArrays = StepArrays(),
    weighting: Weighting | None = None,
    source_count: int = 0,
) -> LossSums:
    """Sums over the supervised tokens of `batch`; `.loss` = sum(loss_weights * -log p(target)), float32, each token
    also times the factor of `weighting`. source_count: of the sources in `batch.sources`.
    """
    rows = PackedRows(batch.tokens, batch.positions, batch.doc_start, batch.doc_end)
    hidden = hidden_states(parameters, model, rows, options, step)
    matrix = unembedding(parameters, model)
    return linear_cross_entropy(
        hidden,
        matrix,
        batch.targets,
        batch.loss_weights,
        mesh=options.mesh,
        weighting=weighting,
        sources=batch.sources if source_count else None,
        source_count=source_count,
    )


def gradient_form(model: ModelConfig, config: ConfigDict, mesh: Mesh) -> Tree:
    """Shapes, in the parameters' dtype, and shardings of the gradients: as the parameters, the matrices of the layers
    unstacked where the layers are unrolled (`jsft.models.stack`).
    """
    parameters = abstract_parameters(model, mesh, parameter_dtype(config))
    return unstack_matrices(parameters, model, unstack_form) if _unrolls(config, mesh) else parameters


def make_programs(
    model: ModelConfig,
    config: ConfigDict,
    mesh: Mesh,
    shardings: Tree,
    total_steps: int,
    remat,
    typical_length: float | None = None,
) -> StepPrograms:
    """Builds the programs. `shardings`: tree of NamedSharding of the parameters; gradients and moments follow it.
    `typical_length`: as in `settle_backward`.
    """
    dtype = jnp.dtype(config.precision.gradients)
    options = decoder_options(config, mesh, remat, typical_length)
    # Held-out losses are of the model that is exported, whose products are not float8.
    evaluation = dataclasses.replace(decoder_options(config, mesh, remat), defer_reduce=False, matmul="bfloat16")
    weighting = weighting_of(config.objective.weighting, config.objective.weighting_parameter)
    names = source_names(config.data)
    full = replicated(mesh)
    rows = batch_sharding(mesh)
    state_sharding = TrainState(shardings, shardings, shardings, full, full)
    gathers, reduces = gathers_once(config, mesh), reduces_once(config, mesh)
    # The backward pass adds gradients in the parameters' dtype: only where that is the dtype of the sum. Placeholders
    # have the dtype of the sum.
    in_place = accumulates_in_place(model, mesh, reduces)
    if dtype != parameter_dtype(config) and not reduces:
        in_place = jax.tree.map(lambda _: False, in_place)
    form = gradient_form(model, config, mesh)
    sum_form = unreduced_form(form, model, mesh, options.unroll) if reduces else form
    form_shardings, sum_shardings = (jax.tree.map(lambda p: p.sharding, tree) for tree in (form, sum_form))
    platform = mesh.devices.flat[0].platform
    compiler_options = prefetch_options(platform) if options.unroll and mesh.size > 1 else None

    def start():
        gradients = jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), sum_form)
        return gradients, no_sums(weighting, len(names))

    def add_gradients(weights, batch, gradients, sums):
        parameters, gathered = weights
        step = StepArrays(
            resident=parameters if options.unroll else None,
            gathered=gathered,
            accumulated=gradients if any(jax.tree.leaves(in_place)) else None,
        )
        if options.unroll:
            parameters = unstack_matrices(parameters, model)
        if reduces:
            parameters = with_placeholders(parameters, gathered, sum_form, dtype)

        def objective(p):
            more = loss_sums(p, batch, model, options, step, weighting, len(names))
            return more.loss, more

        (_, more), new = jax.value_and_grad(objective, has_aux=True)(parameters)
        new = jax.lax.with_sharding_constraint(jax.tree.map(lambda g: g.astype(dtype), new), sum_shardings)

        def add(done, old, new):
            return new if done else jax.tree.map(jnp.add, old, new)

        added = jax.tree.map(add, in_place, gradients, new)
        return added, jax.tree.map(jnp.add, sums, more)

    schedule = learning_rate_schedule(config, total_steps)
    kernel = updates_in_place(config, mesh)

    def update(state, gradients, sums, weight_sum):
        rate = jnp.asarray(schedule(state.step), jnp.float32)  # a constant schedule gives a Python float
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
        if weighting is not None:
            metrics["weighting"] = sums.factor / count
        for name, nll, tokens in zip(names, *(sums.by_source if names else ())):
            metrics[f"nll/{name}"] = nll / tokens  # NaN, written as null, where a step has no token of the source
        return state, metrics

    def evaluate(parameters, batch):
        return loss_sums(parameters, batch, model, evaluation), jnp.sum(batch.loss_weights)

    def gather_all(parameters):
        if options.float8:
            return quantized_weights(parameters, model, mesh)
        return gathered_weights(parameters, model, options.compute_dtype, mesh)

    def reduce_all(gradients):
        return reduced_gradients(gradients, model, options.reduce_dtype, mesh)

    return StepPrograms(
        mesh=mesh,
        start=jax.jit(start, out_shardings=(sum_shardings, full)),
        gather=jax.jit(gather_all, in_shardings=(shardings,), out_shardings=full) if gathers else None,
        add_gradients=jax.jit(
            add_gradients,
            in_shardings=(Weights(shardings, full if gathers else {}), rows, sum_shardings, full),
            out_shardings=(sum_shardings, full),
            donate_argnums=(2, 3),
            keep_unused=True,  # unused with mesh.reduce=step, but resident: memory_analysis counts them
            compiler_options=compiler_options,
        ),
        reduce=jax.jit(reduce_all, in_shardings=(sum_shardings,), out_shardings=form_shardings) if reduces else None,
        update=jax.jit(
            update,
            in_shardings=(state_sharding, form_shardings, full, full),
            out_shardings=(state_sharding, full),
            donate_argnums=0,
        ),
        evaluate=jax.jit(
            evaluate, in_shardings=(shardings, rows), out_shardings=full, compiler_options=compiler_options
        ),
    )


def abstract_batch(rows: int, length: int, mesh: Mesh, sources: bool = False) -> Batch:
    """Shapes of a micro batch of `rows` packed rows over all devices, for compiling without data. sources: whether its
    tokens have one.
    """
    sharding = batch_sharding(mesh)

    def array(dtype):
        return jax.ShapeDtypeStruct((rows, length), dtype, sharding=sharding)

    i32 = jnp.int32
    given = array(i32), array(i32), array(jnp.float32), array(i32), array(i32), array(i32)
    return Batch(*given, array(i32) if sources else None)
