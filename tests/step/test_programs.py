"""The step programs: every rung of the remat ladder, every mesh and the in-place sum give the plain path's gradients;
the compiled eight-device program communicates what it should and nothing else."""

import collections
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsft import config as schema
from jsft.data.batch import Batch
from jsft.hardware.mesh import make_mesh, shard_batch
from jsft.hardware.xla import prefetch_options
from jsft.hf.random_model import write_random_model
from jsft.models.families import abstract_parameters, initial_parameters, read_config
from jsft.models.remat import LADDER
from jsft.models.stack import stack_tree
from jsft.step import programs as step
from jsft.step.components import Components, arguments, compile_gradients, programs
from jsft.step.histograms import make_histograms
from jsft.step.optimizer import initial_state, parameter_dtype
from jsft.step.precompile import precompile


class NoData(NamedTuple):
    total_steps: int = 10
    lengths: tuple[int, ...] = ()
    row_lengths: tuple[int, ...] = (64, 128)


def make_components(model, mesh, length, **fields):
    config = schema.default_config()
    config.model.path, config.data.train = "model", "data"
    config.data.max_length = config.data.pack_length = length
    config.precision.compute = "float32"
    for name, value in fields.items():
        schema.put(config, name.replace("__", "."), value)
    config = schema.resolve(config)
    abstract = initial_state(abstract_parameters(model, mesh, parameter_dtype(config)), config)
    return Components(
        config,
        None,
        model,
        mesh,
        abstract,
        jax.tree.map(lambda p: p.sharding, abstract.parameters),
        NoData(),
        mesh.size,
    )


def make_batch(rows, length, vocabulary, seed):
    """Two documents and some padding in each row; half of the tokens trained."""
    rng = np.random.default_rng(seed)
    start = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    end = start + 1
    cut, last = length // 3, length - 5
    for a, b in ((0, cut), (cut, last)):
        start[:, a:b], end[:, a:b] = a, b
    tokens = rng.integers(0, vocabulary, (rows, length), dtype=np.int32)
    weights = rng.choice([0.0, 0.01], (rows, length)).astype(np.float32)
    weights[:, last - 1 :] = weights[:, cut - 1] = 0
    return Batch(tokens, np.roll(tokens, -1, 1), weights, np.arange(length, dtype=np.int32) - start, start, end)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_random_model(
        tmp_path_factory.mktemp("model") / "m", hidden_size=64, heads=4, kv_heads=2, intermediate_size=128, std=0.1
    )
    return read_config(folder)


def gradients_of(components, remat, batches):
    """Loss and gradients, as numpy, of `batches` [8 rows each] cut into micro batches of the mesh's rows."""
    jitted = programs(components, remat)
    parameters = initial_parameters(components.model, components.mesh, jnp.float32, 0)
    micro_batches = (
        Batch(*(x[first : first + components.rows] for x in batch[:6]))
        for batch in batches
        for first in range(0, 8, components.rows)
    )
    total, sums = jitted.accumulate(parameters, micro_batches)
    return float(sums.loss), jax.tree.map(np.asarray, stack_tree(total))


def assert_close(one, two):
    assert one[0] == pytest.approx(two[0], rel=1e-5)
    for (path, a), b in zip(jax.tree.leaves_with_path(one[1]), jax.tree.leaves(two[1])):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def plain(model):
    """Two micro batches on one device, all activations saved."""
    batches = [make_batch(8, 128, model.vocab_size, seed) for seed in (0, 1)]
    components = make_components(model, make_mesh(devices=jax.devices()[:1]), 128)
    return batches, gradients_of(components, "none", batches)


QUICK = {LADDER[1], LADDER[3]}  # the others compile for minutes


@pytest.mark.parametrize("rung", [r if r in QUICK else pytest.param(r, marks=pytest.mark.slow) for r in LADDER])
def test_every_rung_of_the_ladder_gives_the_plain_gradients(model, plain, rung):
    batches, expected = plain
    assert_close(gradients_of(make_components(model, make_mesh(), 128), rung, batches), expected)


@pytest.mark.parametrize(
    "rung", ["attention_out@host,residual,gate@host", pytest.param("none", marks=pytest.mark.slow)]
)
def test_unrolled_layers_give_the_plain_gradients(model, plain, rung):
    """Also with values sent to the host's memory, which unrolled layers wait for."""
    batches, expected = plain
    components = make_components(model, make_mesh(), 128)
    components.config.train.unroll_layers = True
    assert_close(gradients_of(components, rung, batches), expected)


def test_unrolled_layers_gathered_within_a_replica_give_the_plain_gradients(model, plain):
    batches, expected = plain
    components = make_components(model, make_mesh(2), 128)
    components.config.train.unroll_layers = True
    assert_close(gradients_of(components, "full", batches), expected)


@pytest.mark.parametrize("reduce", [pytest.param("layer", marks=pytest.mark.slow), "step"])
@pytest.mark.parametrize(
    "unroll, replica, rung",
    [
        (True, 1, "attention_out,attention_lse,residual,gate"),
        (False, 1, "attention_out,attention_lse,residual,gate"),
        pytest.param(True, 2, "none", marks=pytest.mark.slow),
        pytest.param(False, 2, "full", marks=pytest.mark.slow),
    ],
)
def test_weights_gathered_once_a_step_give_the_plain_gradients(model, plain, unroll, replica, rung, reduce):
    batches, expected = plain
    fields = dict(mesh__gather="step", mesh__reduce=reduce, train__unroll_layers=unroll)
    components = make_components(model, make_mesh(replica), 128, **fields)
    assert_close(gradients_of(components, rung, batches), expected)


@pytest.mark.parametrize("replica", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_every_mesh_gives_the_plain_gradients(model, plain, replica):
    batches, expected = plain
    assert_close(gradients_of(make_components(model, make_mesh(replica), 128), "full", batches), expected)


def test_after_precompile_a_run_compiles_only_lengths_that_were_not_foreseen(model):
    components, said = make_components(model, make_mesh(), 128, log__histograms_every=10), []
    jitted = programs(components, "full")
    counting = make_histograms(components.config, components.mesh, components.shardings)
    compiled_programs, histograms = precompile(jitted, counting, components, True, said.append)
    state = initial_state(initial_parameters(model, components.mesh, jnp.float32, 0), components.config)
    batches = [make_batch(8, length, model.vocab_size, 0) for length in (128, 64, 96)]
    compiled_programs.accumulate(state.parameters, batches[:2])
    compiled_programs.evaluate(state.parameters, shard_batch(batches[0], components.mesh))
    assert jitted.add_gradients._cache_size() == jitted.evaluate._cache_size() == 0
    gradients, sums = compiled_programs.accumulate(state.parameters, batches)
    assert jitted.add_gradients._cache_size() == 1
    expected = gradients_of(components, "full", batches)
    assert_close((float(sums.loss), jax.tree.map(np.asarray, gradients)), expected)
    state, metrics = compiled_programs.update(state, gradients, sums, jnp.float32(1))
    counts = histograms(state, gradients, metrics["lr"])
    assert jitted.update._cache_size() == counting._cache_size() == 0 and int(state.step) == 1
    assert np.isfinite(float(metrics["loss"])) and set(counts) == {"parameters", "gradients", "updates"}
    assert len(said) == 1 and "5 programs" in said[0] and "64, 128 tokens" in said[0]


def test_adding_gradients_needs_no_second_tree_of_them(tmp_path):
    """Temporaries of the adding program stay far below the weights' bytes."""
    folder = write_random_model(tmp_path / "m", hidden_size=256, layers=12, heads=8, kv_heads=8, intermediate_size=1024)
    components = make_components(read_config(folder), make_mesh(devices=jax.devices()[:1]), 128)
    compiled = compile_gradients(components, "full")
    weights = sum(x.size * 4 for x in jax.tree.leaves(components.abstract.parameters))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= weights
    assert memory.temp_size_in_bytes < 0.4 * weights


@pytest.mark.parametrize(
    ("lengths", "deterministic", "expected"),
    [
        ((500, 1500), False, ("deterministic", False)),
        ((500, 9000), False, ("auto", False)),  # most tokens lie in the long one
        ((), False, ("auto", False)),
        ((9000,), True, ("deterministic", True)),
    ],
)
def test_the_documents_lengths_settle_the_backward_kernel(model, monkeypatch, lengths, deterministic, expected):
    class Asked(Exception):
        pass

    def asked(parameters, model, rows, options, step):
        raise Asked(options.attention_backward, options.deterministic)

    monkeypatch.setattr(step, "hidden_states", asked)
    components = make_components(model, make_mesh(), 128, train__deterministic=deterministic)
    components = components._replace(data=NoData(lengths=lengths))
    with pytest.raises(Asked) as found:
        compile_gradients(components, "full")
    assert found.value.args == expected


def test_a_weighting_changes_the_objective_of_training_alone(model):
    """The held-out loss stays the negative log-likelihood; the mean factor is a metric."""

    def programs_and_shapes(**fields):
        components = make_components(model, make_mesh(devices=jax.devices()[:1]), 128, **fields)
        jitted = programs(components, "full")
        given = arguments(components, jitted)
        names = ("evaluate", "update", "add_gradients")
        return [jitted._asdict()[name].trace(*given[name]) for name in names]

    plain, weighted = programs_and_shapes(), programs_and_shapes(objective__weighting="dft")
    assert str(weighted[0].jaxpr) == str(plain[0].jaxpr) and str(weighted[2].jaxpr) != str(plain[2].jaxpr)
    metrics = [set(traced[1].out_info[1]) for traced in (plain, weighted)]
    assert metrics[1] - metrics[0] == {"weighting"} and metrics[0] < metrics[1]


def test_a_mixture_adds_the_losses_of_its_sources_and_changes_no_held_out_loss(model):
    def shapes(train):
        components = make_components(model, make_mesh(devices=jax.devices()[:1]), 128, data__train=train)
        jitted, given = programs(components, "full"), arguments(components, programs(components, "full"))
        return [jitted._asdict()[name].trace(*given[name]) for name in ("evaluate", "update", "add_gradients")]

    plain, mixed = shapes("a"), shapes({"math": "a", "code": "b"})
    assert str(mixed[0].jaxpr) == str(plain[0].jaxpr)
    assert set(mixed[1].out_info[1]) - set(plain[1].out_info[1]) == {"nll/code", "nll/math"}
    assert plain[2].out_info[1].by_source is None and mixed[2].out_info[1].by_source.shape == (2, 2)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_every_schedule_runs_without_warm_up(model, schedule):
    fields = dict(optimizer__schedule=schedule, optimizer__warmup_ratio=0.0)
    components = make_components(model, make_mesh(devices=jax.devices()[:1]), 128, **fields)
    jitted = programs(components, "full")
    assert jitted.update.trace(*arguments(components, jitted)["update"]).out_info[1]["lr"].dtype == jnp.float32


def collectives(text):
    """(kind, element type, elements) -> how often, from a compiled program's text."""
    found = collections.Counter()
    for line in text.splitlines():
        match = re.search(
            r"= \(?(\w+)\[([\d,]*)\]\S* (all-gather|reduce-scatter|all-reduce|all-to-all)(?:-start)?\(", line
        )
        if match:
            dtype, dims, kind = match.groups()
            found[kind, dtype, int(np.prod([int(d) for d in dims.split(",") if d]))] += 1
    return found


def test_this_jaxlib_knows_the_options_of_prefetching_weights():
    options = prefetch_options("gpu")
    assert options and not prefetch_options("cpu")
    assert float(jax.jit(lambda x: x + 1, compiler_options=options)(1.0)) == 2


@pytest.mark.parametrize("unroll", [False, True])
def test_eight_devices_gather_each_matrix_twice_and_scatter_its_gradient_once(model, unroll):
    components = make_components(model, make_mesh(), 128)
    components.config.train.unroll_layers = unroll
    found = collectives(compile_gradients(components, "full").as_text())
    # Scans: a matrix is gathered once in the forward loop and once in the backward loop. Unrolled: once a layer in each
    # pass, but the last layer's is still there when the backward pass begins, so it is not gathered again.
    gathers, scatters = (2 * model.num_layers - 1, model.num_layers) if unroll else (2, 1)
    D, F, Q, K = model.hidden_size, model.intermediate_size, model.query_size, model.kv_size
    sizes = collections.Counter([D * Q, D * K, D * K, Q * D, D * F, D * F, F * D])  # of the matrices of a layer
    for size, matrices in sizes.items():
        assert found["all-gather", "f32", size] == gathers * matrices, found
        assert found["reduce-scatter", "f32", size // 8] == scatters * matrices, found
    # Nothing else of a matrix's size moves: all-reduces sum only norms, biases and scalars.
    assert all(elements < D * K for (kind, _, elements) in found if kind == "all-reduce"), found


@pytest.mark.parametrize("reduce", [pytest.param("layer", marks=pytest.mark.slow), "step"])
@pytest.mark.parametrize("unroll", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gathered_once_a_step_eight_devices_gather_no_matrix_in_a_micro_batch(model, unroll, reduce):
    """And with mesh.reduce=step they scatter no gradient in it either."""
    fields = dict(mesh__gather="step", mesh__reduce=reduce, train__unroll_layers=unroll)
    components = make_components(model, make_mesh(), 128, **fields)
    jitted = programs(components, "full")
    given = arguments(components, jitted)
    names = ("add_gradients", "gather", *(["reduce"] if reduce == "step" else []))
    micro_batch, once, *last = (
        collectives(getattr(jitted, name).lower(*given[name]).compile().as_text()) for name in names
    )
    in_layers = 0 if last else model.num_layers if unroll else 1
    D, F, Q, K = model.hidden_size, model.intermediate_size, model.query_size, model.kv_size
    sizes = collections.Counter([D * Q, D * K, D * K, Q * D, D * F, D * F, F * D])
    for size, matrices in sizes.items():
        assert micro_batch["all-gather", "f32", size] == 0, micro_batch
        assert micro_batch["reduce-scatter", "f32", size // 8] == in_layers * matrices
        if last:
            scattered = last[0]["reduce-scatter", "f32", size // 8 * (1 if unroll else model.num_layers)]
            assert scattered == matrices * (model.num_layers if unroll else 1), last
        assert once["all-gather", "f32", model.num_layers * size] == matrices, once
    assert sum(once.values()) == 7
