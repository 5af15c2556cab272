"""Programs compiled for GPUs that are not here. Compiling needs JAX's CUDA plugin: without it only the refusals run."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jsft import config as schema
from jsft import plan
from jsft.errors import ConfigError
from jsft.hardware import deviceless
from jsft.hardware.mesh import make_mesh
from jsft.models.families import abstract_parameters
from jsft.models.float8 import linear_float8, quantized_input
from jsft.models.layers import linear
from jsft.models.published import PUBLISHED
from jsft.models.remat import LADDER
from jsft.planning import program_memory
from jsft.planning.memory import estimate, planned_mesh
from jsft.step.components import Components, arguments, programs
from jsft.step.flushed import make_flushed
from jsft.step.optimizer import initial_state

needs_plugin = pytest.mark.skipif(not deviceless.available(), reason="needs JAX's CUDA plugin: pip install jax[cuda13]")
PLAN = ["--config", "configs/qwen3_4b.py:math_cot_ep8", "--compile"]


def small_config(**fields):
    config = schema.default_config()
    config.model.path, config.data.train = "model", "data"
    config.data.pack_length = config.data.max_length = 2048
    for name, value in fields.items():
        schema.put(config, name.replace("__", "."), value)
    return schema.resolve(config)


@needs_plugin
@pytest.mark.parametrize("unroll", [False, True])
def test_the_step_compiles_with_its_pallas_kernels(unroll):
    """Arguments and outputs are what the tables say. The kernel is asked for by name, so it is the one compiled."""
    sizes = dict(hidden_size=512, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=1024, vocab_size=4096)
    model = dataclasses.replace(PUBLISHED["qwen3_14b"], **sizes)
    config = small_config(attention__implementation="pallas", train__unroll_layers=unroll)
    found = program_memory.program_memory(config, model, deviceless.gpus("h200", 8), "full")
    memory = estimate(model, config, planned_mesh(config, 8), "full")
    step = found["add_gradients"]
    assert step.arguments == pytest.approx(memory.parameters + memory.gradients + memory.batch, rel=0.01)
    assert step.aliased == pytest.approx(memory.gradients, rel=0.01) and step.beside == pytest.approx(
        memory.moments, rel=0.01
    )
    assert step.temporaries > 0
    state = memory.parameters + memory.moments
    assert found["update"].aliased == pytest.approx(state, rel=0.01)


@needs_plugin
@pytest.mark.parametrize("when", ["layer", "gather", "both"])
@pytest.mark.parametrize("params", ["float32", "bfloat16"])
def test_the_backward_pass_saves_no_copy_of_the_sharded_weights(params, when):
    """A layer adds to the temporaries only the activations that it saves. Its shards of the weights, and full weights
    or gradients under gather=step and reduce=step, are arguments, which the plan counts.
    """
    same = {f"precision__{name}": params for name in ("params", "moments", "gradients")}
    once = dict(mesh__gather="layer" if when == "layer" else "step", mesh__reduce="step" if when == "both" else "layer")
    config = small_config(data__max_length=8192, data__pack_length=8192, **same, **once)
    remat = "attention_out,attention_lse,query_projection,key_projection,value,residual"

    def needed(layers):
        sizes = dict(hidden_size=2048, num_layers=layers, num_heads=16, num_kv_heads=8, intermediate_size=8192)
        model = dataclasses.replace(PUBLISHED["qwen3_14b"], vocab_size=4096, **sizes)
        found = program_memory.program_memory(config, model, deviceless.gpus("h200", 2), remat, ("add_gradients",))
        step, memory = found["add_gradients"], estimate(model, config, planned_mesh(config, 2), remat)
        given = memory.parameters + memory.whole + memory.gradients + memory.batch
        assert step.arguments == pytest.approx(given, rel=0.01) and step.aliased == pytest.approx(
            memory.gradients, rel=0.01
        )
        return step.temporaries - memory.kept

    layer = 2048 * (2 * 2048 + 2 * 1024) + 3 * 2048 * 8192  # bytes of a device's half in bfloat16
    assert (needed(8) - needed(4)) / 4 < 0.3 * layer


@needs_plugin
@pytest.mark.parametrize("remat", [rung for rung in LADDER if "@host" in rung])
def test_what_unrolled_layers_send_to_the_host_is_not_on_the_device(remat):
    """A layer adds to the temporaries only what it saves on the device, and no operands of gradients that wait."""
    same = dict.fromkeys(("precision__params", "precision__moments", "precision__gradients"), "bfloat16")
    config = small_config(data__max_length=16384, data__pack_length=16384, train__unroll_layers=True, **same)

    def needed(layers):
        model = dataclasses.replace(PUBLISHED["qwen3_8b"], vocab_size=4096, num_layers=layers)
        devices = deviceless.gpus("h200", 1)
        found = program_memory.program_memory(config, model, devices, remat, ("add_gradients",))["add_gradients"]
        return found.temporaries, estimate(model, config, planned_mesh(config, 1), remat).kept

    (few, few_kept), (many, many_kept) = needed(8), needed(16)
    assert many - few < 1.5 * (many_kept - few_kept)


@needs_plugin
@pytest.mark.parametrize("devices", [1, 2])
def test_one_array_like_the_embedding_at_a_time(devices):
    """The loss sums the unembedding's gradient in float32; on several devices the embedding's is summed too, much
    later. On one device only the rows of an untied embedding's gradient are summed.
    """
    same = dict.fromkeys(("precision__params", "precision__moments", "precision__gradients"), "bfloat16")
    config = small_config(data__max_length=4096, data__pack_length=4096, **same)

    def needed(vocabulary):
        sizes = dict(hidden_size=1024, num_layers=2, num_heads=8, num_kv_heads=8, intermediate_size=4096)
        model = dataclasses.replace(PUBLISHED["qwen3_14b"], vocab_size=vocabulary, **sizes)
        found = program_memory.program_memory(
            config, model, deviceless.gpus("h200", devices), "none", ("add_gradients",)
        )
        return found["add_gradients"].temporaries

    assert needed(2**18) - needed(2**17) < 1.3 * 2**17 * 1024 * 4 / devices


@needs_plugin
def test_short_products_with_slices_of_weights_are_autotuned():
    """The compiler does not autotune a product that reads a slice in place."""
    whole = NamedSharding(Mesh(np.array(deviceless.gpus("h200", 1)), ("all",)), PartitionSpec())

    def reads_in_place(rows):
        def gradient(x, stacked, g):
            return jax.vjp(lambda x: linear(x, stacked[1], None, False, jnp.bfloat16), x)[1](g)[0]

        shapes = ((4096, 2560), (4, rows, 2560), (4096, rows))
        arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=whole) for shape in shapes]
        lowered = jax.jit(gradient).trace(*arguments).lower(lowering_platforms=("cuda",))
        return "dynamic-slice-fusion" in lowered.compile(compiler_options=deviceless.COMPILER_OPTIONS).as_text()

    assert reads_in_place(4096) and not reads_in_place(1024)


@needs_plugin
@pytest.mark.parametrize("devices", [1, 2])
def test_linears_in_float8_are_three_cublas_products_of_float8(devices):
    """It gets the scales too. A kernel makes the transposed copies; sharded weights travel as bytes, their largest value
    before them.
    """
    mesh = Mesh(np.array(deviceless.gpus("h200", devices)), ("fsdp",))
    sharded = devices > 1

    def products(x, weight, g):
        def linear(x, weight):
            return linear_float8(x, quantized_input(x), weight, None, sharded, jnp.bfloat16)

        y, vjp = jax.vjp(linear, x, weight)
        return y, *vjp(g)

    spec = PartitionSpec("fsdp")
    run = jax.shard_map(products, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    shapes = ((8192, 2048), (4096, 2048), (8192, 4096))
    arguments = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=NamedSharding(mesh, spec)) for s in shapes]
    lowered = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",))
    text = lowered.compile(compiler_options=deviceless.COMPILER_OPTIONS).as_text()
    assert text.count('custom_call_target="__cublas$lt$matmul$f8"') == 3
    assert text.count('custom_call_target="mosaic_gpu') == 3  # dy both ways, x and W transposed
    gathers = [line for line in text.splitlines() if " all-gather-start(" in line or " all-gather(" in line]
    assert len(gathers) == (1 if sharded else 0)  # of values alone
    assert all("u8[4096,2048]" in line and "f32" not in line and "bf16" not in line for line in gathers)
    maxima = [line for line in text.splitlines() if " all-reduce-start(" in line or " all-reduce(" in line]
    assert len(maxima) == len(gathers) and all("f32[1,1,1]" in line for line in maxima)


@needs_plugin
@pytest.mark.slow
@pytest.mark.parametrize("program, forward", [("add_gradients", "all"), ("add_gradients", "mlp"), ("flushed", "mlp")])
def test_unrolled_layers_hold_no_float8_weights_but_their_own(program, forward):
    """A layer adds to the temporaries its saved input alone: the compiler would quantise several layers at once."""
    same = dict.fromkeys(("precision__params", "precision__moments", "precision__gradients"), "bfloat16")
    same |= dict(precision__matmul="float8", precision__float8_forward=forward, fidelity="best")
    config = small_config(train__unroll_layers=True, **same)
    mesh = make_mesh(devices=deviceless.gpus("h200", 1))

    def needed(layers):
        sizes = dict(hidden_size=2048, num_layers=layers, num_heads=16, num_kv_heads=8, intermediate_size=8192)
        model = dataclasses.replace(PUBLISHED["qwen3_14b"], vocab_size=4096, **sizes)
        state = initial_state(abstract_parameters(model, mesh, jnp.bfloat16), config)
        shardings = jax.tree.map(lambda p: p.sharding, state.parameters)
        data = SimpleNamespace(total_steps=1, lengths=())
        parts = Components(config, None, model, mesh, state, shardings, data, 1)
        jitted = programs(parts, "full")
        given = arguments(parts, jitted)["add_gradients"]
        if program == "flushed":
            traced = make_flushed(parts, "full").trace(state.parameters, given[1])
        else:
            traced = jitted.add_gradients.trace(*given)
        compiled = traced.lower(lowering_platforms=("cuda",)).compile(compiler_options=deviceless.COMPILER_OPTIONS)
        kept = estimate(model, config, mesh, "full").kept
        return compiled.memory_analysis().temp_size_in_bytes - kept

    layer = 2048 * (2 * 2048 + 2 * 1024) + 3 * 2048 * 8192  # bytes in float8
    assert (needed(8) - needed(4)) / 4 < 0.3 * layer


def test_without_the_plugin_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(deviceless, "available", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install 'jax\[cuda13\]'"):
        deviceless.gpus("h200", 8)
    assert program_memory.compile_kind("h200") is None


def test_only_hopper(monkeypatch):
    with pytest.raises(ConfigError, match="h200 and h100 only"):
        deviceless.gpus("a100", 8)
    monkeypatch.setattr(deviceless, "available", lambda: True)
    monkeypatch.setattr(program_memory, "_gpus", lambda: 0)
    with pytest.raises(ConfigError, match="h200 and h100 only"):
        plan.main([*PLAN, "--device", "b200"])
