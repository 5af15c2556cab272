"""The plan of a run with float8 products: its seconds compared with measured ones, its bytes by hand."""

import pytest

from jsft import config as schema
from jsft.hardware.cards import RATES, find_device
from jsft.models.options import WIDE_FORWARD
from jsft.models.published import PUBLISHED
from jsft.models.remat import LADDER, saved_position
from jsft.planning.memory import estimate, planned_mesh, saved_bytes
from jsft.planning.quantising import quantising_bytes
from jsft.planning.work import Lengths, plan_work
from jsft.step.gather_once import with_gather
from tests.test_planning import BFLOAT16, make_config

# One H200, jax 0.11.2, driver 580.159.04, 2026-12-01: steps of two rows of 16,384 in one call, in float8 and in bfloat16
# (scripts/bench_step.py): what was saved, precision.float8_forward, mesh.gather in float8, seconds of both, and the
# largest number of GiB in use in float8.
MEASURED_FLOAT8 = [
    ("qwen3_4b", "none", "all", "step", 1.264, 1.671, 96.4),
    ("qwen3_4b", "none", "mlp", "step", 1.285, 1.633, 95.4),
    ("qwen3_8b", LADDER[1], "all", "step", 1.968, 2.792, 127.6),
    ("qwen3_8b", LADDER[1], "mlp", "step", 2.029, 2.792, 127.6),
    ("qwen3_14b", LADDER[6], "all", "layer", 4.119, 5.538, 127.2),
    ("qwen3_14b", LADDER[6], "mlp", "layer", 4.196, 5.538, 127.3),
]


@pytest.mark.parametrize("base, remat, forward, gather, float8, bfloat16, gib", MEASURED_FLOAT8)
def test_time_and_memory_agree_with_measured_steps_in_float8(base, remat, forward, gather, float8, bfloat16, gib):
    """Six documents of 4,372 to 6,954 tokens."""
    lengths = Lengths(1000, 32768 / 6, 5634, "recorded", micro_batches=2, padding=0.0)
    for matmul, measured in (("float8", float8), ("bfloat16", bfloat16)):
        fields = dict(precision__matmul=matmul, precision__float8_forward=forward, mesh__gather=gather, fidelity="best")
        fields |= dict(train__global_batch=6, **BFLOAT16)
        config = make_config(data__pack_length=16384, data__max_length=16384, **fields)
        work = plan_work(PUBLISHED[base], config, planned_mesh(config, 1), remat, lengths, find_device("h200"))
        assert work.seconds == pytest.approx(measured, rel=0.05)
        assert (work.quantising_seconds > 0) == (matmul == "float8")
        memory = estimate(PUBLISHED[base], config, planned_mesh(config, 1), remat)
        assert matmul == "bfloat16" or memory.total / 2**30 == pytest.approx(gib, rel=0.05)


def test_a_card_without_float8_multiplies_at_the_rate_of_bfloat16():
    lengths, seconds = Lengths(1000, 5461, 5634, "recorded", micro_batches=2, padding=0.0), {}
    for card in ("a100", "h100"):
        for matmul in ("bfloat16", "float8"):
            config = make_config(fidelity="best", precision__matmul=matmul, attention__implementation="xla")
            work = plan_work(PUBLISHED["qwen3_4b"], config, planned_mesh(config, 1), "none", lengths, find_device(card))
            seconds[card, matmul] = work.compute_seconds - work.quantising_seconds
    assert seconds["a100", "float8"] == pytest.approx(seconds["a100", "bfloat16"])
    assert seconds["h100", "float8"] < seconds["h100", "bfloat16"]


def test_bytes_that_quantising_moves():
    """By hand for Qwen3-8B in bfloat16 weights: D = Q = 4,096, KV 1,024, F 12,288. A value read twice and written once is
    5 bytes, twice 6.
    """
    model = PUBLISHED["qwen3_8b"]
    fields = dict(precision__matmul="float8", precision__float8_forward="all", mesh__gather="layer", fidelity="best")
    config = make_config(**fields, **BFLOAT16)
    step = with_gather(config, "step")
    weights = 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288)

    def moved(config, remat, tokens, devices=1):
        return quantising_bytes(model, config, planned_mesh(config, devices), remat, tokens, micro_batches=3)

    assert moved(step, "none", 0) == weights * (5 + 2)
    assert moved(config, "none", 0) == 3 * weights * (2 * 5 + 2)
    assert moved(step, "none", 0, devices=8) == weights * (5 / 8 + 2)
    gradients = 6 * (4096 + 2 * 1024 + 2 * 12288 + 2 * 4096)
    inputs = {
        "none": 6 * (3 * 4096 + 12288),
        "full": (5 + 5 + 2) * 3 * 4096 + (5 + 6) * 12288,
        "attention_input,mlp_hidden": (5 + 2) * (4096 + 12288) + (5 + 5 + 2) * 2 * 4096,
    }
    for remat, size in inputs.items():
        assert moved(step, remat, 100) - moved(step, remat, 0) == 36 * 100 * (gradients + size)
    assert quantising_bytes(model, make_config(), planned_mesh(config, 1), "none", 100, 3) == 0


def small_plan(matmul: str, gather: str):
    """(memory, collectives) of Qwen3-8B on eight devices."""
    config = schema.default_config()
    config.model.path, config.data.train = "model", "data"
    config.precision.matmul, config.mesh.gather = matmul, gather
    config, model = schema.resolve(config), PUBLISHED["qwen3_8b"]
    mesh = planned_mesh(config, 8)
    lengths = Lengths(20480, 6600, 8500, "assumed")
    return estimate(model, config, mesh, "none"), plan_work(
        model, config, mesh, "none", lengths, find_device("H200")
    ).collectives


def test_a_wide_forward_pass_is_planned_at_the_rate_and_with_the_bytes_of_bfloat16():
    """By hand for Qwen3-8B on eight devices: attention has 41.9 of a layer's 192.9 million weights."""
    model, lengths = PUBLISHED["qwen3_8b"], Lengths(20480, 6600, 8500, "assumed")
    attention, matrices = 36 * 4096 * (2 * 4096 + 2 * 1024), 36 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 12288)
    found = {}
    for gather in ("layer", "step"):
        for forward in ("all", "mlp", "none"):
            fields = dict(precision__matmul="float8", precision__float8_forward=forward, mesh__gather=gather)
            config = make_config(fidelity="best", **fields)
            mesh = planned_mesh(config, 8)
            found[gather, forward] = plan_work(model, config, mesh, "none", lengths, find_device("h200"))
    everything = found["layer", "all"]
    for forward, weights in (("mlp", attention), ("none", matrices)):
        work = found["layer", forward]
        positions = work.tokens / 8 / (1 - work.padding)
        later = 2 * positions * weights * (1 / RATES.matmul - 1 / RATES.matmul_float8)
        assert work.compute_seconds - everything.compute_seconds == pytest.approx(later)
        for gather, more in (("layer", 1), ("step", 2)):  # bytes of a weight, in each micro batch
            moved = [found[gather, f].collectives["all-gather"][1] for f in (forward, "all")]
            assert moved[0] - moved[1] == pytest.approx(work.micro_batches * 7 / 8 * more * weights)


def test_float8_halves_what_is_saved_of_the_linears_inputs_and_what_is_gathered():
    """By hand for Qwen3-8B: D 4,096, F 12,288."""
    model = PUBLISHED["qwen3_8b"]
    names = ("attention_input", "mlp_input", "mlp_hidden", "gate")
    assert saved_position(model, names, 2) == 2 * (2 * 4096 + 2 * 12288)
    assert saved_position(model, names, 2, float8=True) == 2 * 4096 + 12288 + 2 * 12288
    wide, narrow = (small_plan(matmul, "layer") for matmul in ("bfloat16", "float8"))
    moved = [found[1]["all-gather"][1] for found in (wide, narrow)]
    assert narrow[0].whole == wide[0].whole == 0 and moved[1] < 0.6 * moved[0]
    saved = [saved_bytes(model, ",".join(names), 1000, 2, True, float8) for float8 in (False, True)]
    assert saved[0] - saved[1] == 1000 * (2 * 4096 + 12288)
    once = small_plan("float8", "step")
    matrices = 36 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 12288)
    assert once[0].whole == 2 * matrices  # two forms of a byte


@pytest.mark.parametrize("forward", WIDE_FORWARD)
def test_what_float8_saves_where_nothing_is_recomputed(forward):
    """By hand for Qwen3-4B: D 2,560, Q 4,096, KV 1,024, F 9,728, 32 heads. A byte for each value of an input, transposed,
    of a float8 forward product; two for the input of a wide one, but for attention's output, which is saved anyway.
    """
    others = 2 * (2 * 2560 + 3 * 4096 + 3 * 1024 + 2 * 9728) + 4 * 32
    inputs = {"all": 2560 + 4096 + 2560 + 9728, "mlp": 2 * 2560 + 2560 + 9728, "none": 2 * (2560 + 2560 + 9728)}
    found = saved_bytes(PUBLISHED["qwen3_4b"], "none", 1000, 2, True, True, WIDE_FORWARD[forward])
    assert found == 1000 * (others + inputs[forward])


@pytest.mark.parametrize(
    "forward, remat, repeated",
    [
        ("mlp", LADDER[3], 4096 * (4096 + 2 * 1024)),  # query, key and value
        ("mlp", "full", 4096 * (2 * 4096 + 2 * 1024)),
        ("none", "full", 4096 * (2 * 4096 + 2 * 1024 + 2 * 12288)),  # all but down
        ("none", "none", 0),
        ("all", "full", 0),
    ],
)
def test_gathered_weights_of_repeated_wide_products_are_held(forward, remat, repeated):
    """By hand for Qwen3-8B: beyond what `all` holds, 2 bytes a weight of 36 unrolled layers, where they are sharded."""
    model = PUBLISHED["qwen3_8b"]

    def held(forward, devices, unrolled):
        fields = dict(precision__matmul="float8", precision__float8_forward=forward, train__unroll_layers=unrolled)
        config = make_config(fidelity="best", **fields)
        tokens, wide = config.data.pack_length, WIDE_FORWARD[forward]
        kept = estimate(model, config, planned_mesh(config, devices), remat).kept
        return kept - 36 * saved_bytes(model, remat, tokens, 2, True, True, wide)

    assert held(forward, 8, None) == held(forward, 8, True) == 2 * 36 * repeated
    assert held(forward, 1, True) == held(forward, 8, False) == 0
