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
from jax.sharding import Mesh, NamedSharding
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
        float8_forward=config.precision.float8_forward,
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


class LossTerms(NamedTuple):
    """What the loss takes beyond -log p and the weight of each token."""

    weighting: Weighting | None = None
    sources: tuple[str, ...] = ()  # those in `Batch.sources`, whose losses are also summed apart


def loss_sums(
    parameters: Tree,
    batch: Batch,
    model: ModelConfig,
    options: DecoderOptions,
    step: StepArrays = StepArrays(),
    terms: LossTerms = LossTerms(),
) -> LossSums:
    """Sums over the supervised tokens of `batch`; `.loss` = sum(loss_weights * -log p(target)), float32, each token
    also times the factor of the weighting.
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
        weighting=terms.weighting,
        sources=batch.sources if terms.sources else None,
        source_count=len(terms.sources),
    )


class _Job(NamedTuple):
    """What the programs of a run are compiled for."""

    model: ModelConfig
    config: ConfigDict
    mesh: Mesh
    options: DecoderOptions  # of the training programs
    terms: LossTerms
    parameters: Tree  # shapes, dtypes and shardings; the moments are sharded alike
    gradients: Tree  # the same of the gradients that the update takes
    sums: Tree  # the same of the gradients while they are summed over micro batches; in `sum_dtype`

    @property
    def sum_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.config.precision.gradients)

    @property
    def replicated(self) -> NamedSharding:
        return replicated(self.mesh)

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        """Of the programs that run the decoder."""
        prefetches = self.options.unroll and self.mesh.size > 1
        return prefetch_options(self.mesh.devices.flat[0].platform) if prefetches else None


def make_programs(
    model: ModelConfig,
    config: ConfigDict,
    mesh: Mesh,
    total_steps: int,
    remat,
    typical_length: float | None = None,
) -> StepPrograms:
    """Builds the programs of a run of `total_steps` updates. `typical_length`: as in `settle_backward`."""
    options = decoder_options(config, mesh, remat, typical_length)
    terms = LossTerms(
        weighting_of(config.objective.weighting, config.objective.weighting_parameter), source_names(config.data)
    )
    parameters = abstract_parameters(model, mesh, parameter_dtype(config))
    # As the parameters, the matrices of the layers unstacked where the layers are unrolled (`jsft.models.stack`).
    gradients = unstack_matrices(parameters, model, unstack_form) if options.unroll else parameters
    sums = unreduced_form(gradients, model, mesh, options.unroll) if options.defer_reduce else gradients
    job = _Job(model, config, mesh, options, terms, parameters, gradients, sums)
    return StepPrograms(
        mesh=mesh,
        start=_start(job),
        gather=_gather(job) if gathers_once(config, mesh) else None,
        add_gradients=_add_gradients(job),
        reduce=_reduce(job) if options.defer_reduce else None,
        update=_update(job, total_steps),
        evaluate=_evaluate(job),
    )


def _start(job: _Job):
    """() -> (gradients, sums) of nothing."""

    def start():
        gradients = jax.tree.map(lambda p: jnp.zeros(p.shape, job.sum_dtype), job.sums)
        return gradients, no_sums(job.terms.weighting, len(job.terms.sources))

    return jax.jit(start, out_shardings=(_shardings(job.sums), job.replicated))


def _gather(job: _Job):
    """parameters -> `Weights.gathered`."""

    def gather_all(parameters):
        if job.options.float8:
            return quantized_weights(parameters, job.model, job.mesh, job.options.unroll)
        return gathered_weights(parameters, job.model, job.options.compute_dtype, job.mesh)

    return jax.jit(gather_all, in_shardings=(_shardings(job.parameters),), out_shardings=job.replicated)


def _add_gradients(job: _Job):
    """(Weights, batch, gradients, sums) -> (gradients, sums), to which those of the batch are added in place."""
    in_place = _added_by_the_backward_pass(job)

    def add_gradients(weights, batch, gradients, sums):
        parameters, gathered = weights
        step = StepArrays(
            resident=parameters if job.options.unroll else None,
            gathered=gathered,
            accumulated=gradients if any(jax.tree.leaves(in_place)) else None,
        )
        if job.options.unroll:
            parameters = unstack_matrices(parameters, job.model)
        if job.options.defer_reduce:
            parameters = with_placeholders(parameters, gathered, job.sums, job.sum_dtype)

        def objective(p):
            more = loss_sums(p, batch, job.model, job.options, step, job.terms)
            return more.loss, more

        (_, more), new = jax.value_and_grad(objective, has_aux=True)(parameters)
        new = jax.tree.map(lambda g: g.astype(job.sum_dtype), new)
        new = jax.lax.with_sharding_constraint(new, _shardings(job.sums))

        def add(done, old, new):
            return new if done else jax.tree.map(jnp.add, old, new)

        added = jax.tree.map(add, in_place, gradients, new)
        return added, jax.tree.map(jnp.add, sums, more)

    gathered = job.replicated if gathers_once(job.config, job.mesh) else {}
    totals = _shardings(job.sums), job.replicated
    return jax.jit(
        add_gradients,
        in_shardings=(Weights(_shardings(job.parameters), gathered), batch_sharding(job.mesh), *totals),
        out_shardings=totals,
        donate_argnums=(2, 3),
        keep_unused=True,  # unused with mesh.reduce=step, but resident: memory_analysis counts them
        compiler_options=job.compiler_options,
    )


def _added_by_the_backward_pass(job: _Job) -> Tree:
    """Tree of bool, as the parameters: `accumulates_in_place`, where the gradients have the dtype of the sum.

    They have the parameters' dtype, which may differ from it, but those of placeholders have the sum's.
    """
    in_place = accumulates_in_place(job.model, job.mesh, job.options.defer_reduce)
    same = job.options.defer_reduce or job.sum_dtype == parameter_dtype(job.config)
    return in_place if same else jax.tree.map(lambda _: False, in_place)


def _reduce(job: _Job):
    """gradients as they are summed -> gradients as the update takes them."""

    def reduce_all(gradients):
        return reduced_gradients(gradients, job.model, job.options.reduce_dtype, job.mesh)

    return jax.jit(reduce_all, in_shardings=(_shardings(job.sums),), out_shardings=_shardings(job.gradients))


def _update(job: _Job, total_steps: int):
    """(state, gradients, sums, float32 sum of the step's loss weights) -> (state, metrics)."""
    schedule = learning_rate_schedule(job.config, total_steps)
    kernel = updates_in_place(job.config, job.mesh)

    def update(state, gradients, sums, weight_sum):
        rate = jnp.asarray(schedule(state.step), jnp.float32)  # a constant schedule gives a Python float
        state, metrics = apply_update(state, gradients, rate, job.config, kernel)
        return state, metrics | _loss_metrics(sums, weight_sum, job) | {"lr": rate}

    parameters, full = _shardings(job.parameters), job.replicated
    state = TrainState(parameters, parameters, parameters, full, full)
    return jax.jit(
        update,
        in_shardings=(state, _shardings(job.gradients), full, full),
        out_shardings=(state, full),
        donate_argnums=0,
    )


def _loss_metrics(sums: LossSums, weight_sum: jax.Array, job: _Job) -> dict[str, jax.Array]:
    """Means over a step's tokens, float32 scalars."""
    count = jnp.maximum(sums.count, 1)
    weighed = not job.config.objective.use_advantage  # as the loss is, unless advantages make the weights no mean
    metrics = {
        "loss": sums.loss / weight_sum,
        "nll": sums.nll / count,
        "entropy": sums.weighted_entropy / weight_sum if weighed else sums.entropy / count,
        "accuracy": sums.correct / count,
    }
    if sums.factor is not None:
        metrics["weighting"] = sums.factor / count
    for name, nll, tokens in zip(job.terms.sources, *(sums.by_source if job.terms.sources else ())):
        metrics[f"nll/{name}"] = nll / tokens  # NaN, written as null, where a step has no token of the source
    return metrics


def _evaluate(job: _Job):
    """(parameters, batch) -> (sums, sum of the batch's loss weights)."""
    # Held-out losses are of the model that is exported, whose products are not float8.
    options = decoder_options(job.config, job.mesh, job.options.remat)
    options = dataclasses.replace(options, defer_reduce=False, matmul="bfloat16")

    def evaluate(parameters, batch):
        return loss_sums(parameters, batch, job.model, options), jnp.sum(batch.loss_weights)

    return jax.jit(
        evaluate,
        in_shardings=(_shardings(job.parameters), batch_sharding(job.mesh)),
        out_shardings=job.replicated,
        compiler_options=job.compiler_options,
    )


def _shardings(form: Tree) -> Tree:
    return jax.tree.map(lambda p: p.sharding, form)


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
