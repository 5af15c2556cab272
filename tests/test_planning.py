"""The plan: memory against compiled programs, time against recorded steps, and the messages for bad input."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from jsft import cli, plan
from jsft import config as schema
from jsft.errors import CheckpointError, ConfigError, DataError, OutOfMemoryError
from jsft.hardware.cards import RATES, find_device, peak_flops
from jsft.hardware.mesh import MESH_AXES, make_mesh, shard_bytes
from jsft.models.families import abstract_parameters
from jsft.models.published import PUBLISHED
from jsft.models.remat import LADDER, REMAT_NAMES, repeated_weights, saved_position
from jsft.planning import fitting
from jsft.planning.inputs import find_model
from jsft.planning.memory import HEADROOM, estimate, parameter_sizes, planned_mesh, sharded_layer_elements
from jsft.planning.program_memory import compare
from jsft.planning.work import Lengths, checkpoint_bytes, plan_work, recomputed
from jsft.run import preflight
from scripts.record_memory import KEY, arguments

GIB = 2**30
RECIPES = Path(__file__).parents[1] / "configs"
BASES = [name for name in PUBLISHED if (RECIPES / f"{name}.py").is_file()]
SMALL = dict(
    hidden_size=1024,
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    intermediate_size=3072,
    vocab_size=16384,
    num_layers=4,
)
TINY = dict(
    hidden_size=128,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=384,
    vocab_size=300,
)


def make_config(**fields):
    config = schema.default_config()
    config.model.path, config.data.train = "Qwen/Qwen3-14B-Base", "jasonrqh/Math-CoT-20k"
    config.train.unroll_layers = False
    for name, value in fields.items():
        schema.put(config, name.replace("__", "."), value)
    return schema.resolve(config)


@pytest.mark.parametrize(
    "base, sizes, length, rung, fields",
    [
        ("qwen3_14b", SMALL, 2048, LADDER[0], {}),
        ("qwen3_14b", SMALL, 2048, "full", {"precision__compute": "float32"}),
        (
            "qwen2_5_7b",
            SMALL | {"vocab_size": 32000},
            2048,
            LADDER[2],
            {"precision__params": "bfloat16", "precision__gradients": "bfloat16"},
        ),
        ("internlm2_5_20b", SMALL, 2048, LADDER[5], {"data__rows_per_device": 2}),
        ("qwen3_14b", SMALL, 2048, LADDER[7], {"mesh__replica": 2}),
        ("qwen3_14b", TINY, 768, LADDER[0], {"precision__compute": "float32"}),  # configs/quickstart.py
    ],
)
def test_memory_is_within_a_tenth_of_the_compiled_program(monkeypatch, base, sizes, length, rung, fields):
    model = dataclasses.replace(PUBLISHED[base], **sizes)
    monkeypatch.setattr("jsft.planning.program_memory.find_model", lambda path: (model, "the test"))
    found = compare(make_config(data__pack_length=length, data__max_length=length, **fields), 8, rung)
    assert 0.9 < found["ratio"] < 1.1, found


def test_saved_activations_agree_with_the_recorded_gpu_programs():
    """Recorded for 14B, 8 x H200, 16,384 tokens: 30.7 GiB of temporaries with full, 45.6 with attention, q, k, v saved,
    87.6 with gate and up too. The program was of another trainer, so only the differences must agree.
    """
    model, config = PUBLISHED["qwen3_14b"], make_config(data__pack_length=16384, data__max_length=16384)
    mesh = planned_mesh(config, 8)
    kept = {}
    for names in ("full", "attention_out,query,key,value", "attention_out,query,key,value,gate,up"):
        kept[names] = estimate(model, config, mesh, names).kept / GIB
    full, some, most = kept.values()
    assert some - full == pytest.approx(45.6 - 30.7, rel=0.03)
    assert most - full == pytest.approx(87.6 - 30.7, rel=0.03)
    memory = estimate(model, config, mesh, "full")
    assert (memory.parameters + memory.moments) / GIB == pytest.approx(20.6, rel=0.01)


BFLOAT16 = {f"precision__{n}": "bfloat16" for n in ("params", "moments", "gradients", "reduce")}


# On one H200, rows of 16,384: what was saved, tokens a second (docs/lab/2026-11-29-training-step.md),
# GiB of temporaries.
MEASURED = [
    ("qwen3_1_7b", "none", 46134, 36.7),
    ("qwen3_4b", "none", 19916, 66.9),
    ("qwen3_8b", LADDER[1], 11777, 56.0),
    ("qwen3_14b", LADDER[6], 5686, 20.3),
]


def step_of_two_rows(base, remat):
    """The work of a step of one H200 with two rows, each of three documents."""
    config = make_config(data__pack_length=16384, data__max_length=16384, train__global_batch=6, **BFLOAT16)
    lengths = Lengths(1000, 16384 / 3, 5636, "recorded", micro_batches=2, padding=0.0)
    return plan_work(PUBLISHED[base], config, planned_mesh(config, 1), remat, lengths, find_device("h200"))


@pytest.mark.parametrize("base, remat, measured, _", MEASURED)
def test_time_agrees_with_measured_steps(base, remat, measured, _):
    work = step_of_two_rows(base, remat)
    assert work.tokens / work.seconds == pytest.approx(measured, rel=0.03)
    assert work.collectives == {} and work.waiting_seconds == 0


def test_what_is_saved_on_the_host_is_not_recomputed():
    model = PUBLISHED["qwen3_14b"]
    for rung in (LADDER[6], LADDER[8]):
        assert "@host" in rung and recomputed(model, rung) == recomputed(model, rung.replace("@host", ""))


# Measured as above: what was saved, tokens a second, seconds of a step in no kernel. 14B sends 72 GB to the host, 8B 29.
ON_HOST = [
    ("qwen3_8b", ",".join(n + "@host" * (n == "gate") for n in REMAT_NAMES if n != "mlp_hidden"), 11637, 0.01),
    ("qwen3_14b", LADDER[6], 5686, 0.49),
]


@pytest.mark.parametrize("base, remat, measured, waits", ON_HOST)
def test_a_step_waits_for_the_host_where_its_transfers_last_longer_than_a_pass(base, remat, measured, waits):
    work = step_of_two_rows(base, remat)
    assert work.tokens / work.seconds == pytest.approx(measured, rel=0.03)
    assert work.host_seconds == pytest.approx(waits, abs=0.1)


# The same for H200s of one host: GPUs, tokens of a row, dtype of all state, mean length of a token's document, seconds.
MEASURED_TOGETHER = [
    ("qwen3_8b", LADDER[2], 2, 16384, "float32", 6986, 3.262),
    ("qwen3_8b", LADDER[3], 2, 32768, "float32", 6924, 3.329),
    ("qwen3_14b", LADDER[2], 2, 16384, "bfloat16", 7096, 5.453),
    ("qwen3_14b", LADDER[4], 2, 32768, "bfloat16", 6922, 5.860),
    ("internlm2_5_20b", LADDER[4], 2, 16384, "bfloat16", 6977, 8.355),
    ("qwen3_8b", LADDER[2], 4, 16384, "float32", 7572, 3.405),
    ("qwen3_14b", LADDER[2], 4, 16384, "float32", 7574, 5.898),
    ("qwen3_14b", LADDER[4], 4, 32768, "float32", 9717, 6.558),
    ("internlm2_5_20b", LADDER[4], 4, 16384, "float32", 7574, 8.921),
]


@pytest.mark.parametrize("base, remat, devices, row, dtype, weighted, seconds", MEASURED_TOGETHER)
def test_time_agrees_with_measured_steps_of_several_gpus(base, remat, devices, row, dtype, weighted, seconds):
    """Steps of two rows of 16,384 or one of 32,768 a GPU."""
    precision = dict.fromkeys(BFLOAT16, dtype)
    config = make_config(data__pack_length=row, data__max_length=row, train__global_batch=6 * devices, **precision)
    micro_batches = 32768 // row
    lengths = Lengths(1000, 32768 / 6, weighted, "recorded", micro_batches=micro_batches, padding=0.0)
    work = plan_work(PUBLISHED[base], config, planned_mesh(config, devices), remat, lengths, find_device("h200"))
    assert work.seconds == pytest.approx(seconds, rel=0.05)
    assert seconds > 1.04 * work.compute_seconds


def test_weights_gathered_and_gradients_reduced_once_a_step():
    """gather: 2 bytes for each weight of the layers; 1 gather of each in a step instead of 2 in each micro batch.
    reduce: 4 bytes for its gradient, which had 1/8 of that; 1 reduction in a step instead of 1 in each micro batch.
    """
    plans = {}
    for name, gather, reduce in (("layer", "layer", "layer"), ("step", "step", "layer"), ("both", "step", "step")):
        fields = dict(train__global_batch=240, mesh__gather=gather, mesh__reduce=reduce)
        config = make_config(data__pack_length=16384, data__max_length=16384, **fields)
        lengths = Lengths(1000, 16384 / 3, 5636, "recorded", micro_batches=10, padding=0.0)
        mesh, model = planned_mesh(config, 8), PUBLISHED["qwen3_8b"]
        work = plan_work(model, config, mesh, LADDER[1], lengths, find_device("h200"))
        plans[name] = work, estimate(model, config, mesh, LADDER[1])
    (by_layer, spread), (once, whole), (both, summed) = plans["layer"], plans["step"], plans["both"]
    matrices = 6_946_816_000  # of the layers: 8.19 B parameters without embedding, unembedding and norms
    assert (spread.whole, whole.whole) == (0, pytest.approx(2 * matrices, rel=1e-3))
    assert 0.8 * whole.whole < whole.total - spread.total < whole.whole
    gathers = [work.collectives["all-gather"] for work in (by_layer, once)]
    assert [calls for calls, _ in gathers] == [2 * 10 * 7 * 36, 7 * 36]
    assert gathers[0][1] - gathers[1][1] == pytest.approx(19 * 2 * matrices * 7 / 8, rel=1e-3)
    assert by_layer.collectives["reduce-scatter"] == once.collectives["reduce-scatter"]
    assert both.collectives["all-gather"] == once.collectives["all-gather"]
    (many, more), (few, less) = (work.collectives["reduce-scatter"] for work in (once, both))
    assert (many, few) == (10 * 7 * 36, 7 * 36) and more - less == pytest.approx(9 * 4 * matrices * 7 / 8, rel=1e-3)
    assert summed.total - whole.total == pytest.approx(4 * matrices * 7 / 8, rel=1e-3)
    assert both.seconds < once.seconds < by_layer.seconds


@pytest.mark.parametrize("base, remat, _, temporaries", MEASURED)
def test_memory_agrees_with_measured_gpu_programs(base, remat, _, temporaries):
    fields = BFLOAT16 | {"train__unroll_layers": True}
    config = make_config(data__pack_length=16384, data__max_length=16384, **fields)
    memory = estimate(PUBLISHED[base], config, planned_mesh(config, 1), remat)
    assert memory.temporaries / GIB == pytest.approx(temporaries, rel=0.03)


RECORDED = json.loads((Path(__file__).parent / "recorded_memory.json").read_text())


def planned(record):
    """(estimate, bytes that may be used) of the config that `record` was compiled from."""
    config = schema.resolve(cli.parse(arguments(record), lambda values: None, "")[0])
    mesh, model = planned_mesh(config, RECORDED["devices"]), find_model(config.model.path)[0]
    return estimate(model, config, mesh, record["remat"]), HEADROOM * find_device(RECORDED["device"]).usable


@pytest.mark.parametrize(
    "record",
    [record for record in RECORDED["programs"] if record["program"] == "add_gradients"],
    ids=lambda r: "-".join(str(value)[:60] for name, value in r.items() if name in KEY),
)
def test_memory_agrees_with_the_recorded_programs(record):
    """Every base model's default recipe on 8 x H200, and runs in float8 (scripts/record_memory.py)."""
    memory, _ = planned(record)
    assert 0.95 < memory.total / record["total"] < 1.08, (memory.total / GIB, record["total"] / GIB)
    assert memory.moments == pytest.approx(record["beside"], rel=0.01)


def test_every_base_model_is_on_record_and_fits():
    """A run takes the first rung whose program fits: each base model has one, and its update needs less."""
    for model in BASES:
        programs = [r for r in RECORDED["programs"] if r["model"] == model and r["fidelity"] == "reference"]
        fitting = [
            r for r in programs if r["program"] == "add_gradients" and r["unrolled"] and r["total"] <= planned(r)[1]
        ]
        assert fitting, model
        assert all(r["total"] < fitting[0]["total"] for r in programs if r["program"] == "update")


@pytest.mark.parametrize(
    "base, changes, devices, elements",
    [
        ("qwen3_8b", {}, 8, 6_945_767_424),
        ("qwen3_8b", {"vocab_size": 151_669}, 2, 6_945_767_424),  # its embedding is not sharded
        ("qwen3_8b", {"vocab_size": 151_669}, 8, 6_945_767_424),
        ("qwen3_1_7b", {}, 6, 704_643_072),  # gate and up alone
        ("qwen3_1_7b", {}, 1, 0),
    ],
)
def test_what_is_gathered_are_the_layers_sharded_matrices(base, changes, devices, elements):
    model = dataclasses.replace(PUBLISHED[base], **changes)
    assert sharded_layer_elements(model, AbstractMesh((1, devices), MESH_AXES)) == elements


def test_sizes_of_the_plan_are_those_of_the_run():
    """Against the shardings that the run's parameters get, of a model some of whose parameters are sharded."""
    model = dataclasses.replace(PUBLISHED["qwen3_1_7b"], **TINY | {"intermediate_size": 384, "vocab_size": 301})
    for mesh in (make_mesh(), make_mesh(replica=2), make_mesh(replica=4)):
        arrays = jax.tree.leaves(abstract_parameters(model, mesh, jnp.float32))
        local = sum(shard_bytes(array) // 4 for array in arrays)
        matrices = [a for a in jax.tree.leaves(abstract_parameters(model, mesh, jnp.float32)["layers"]) if a.ndim > 2]
        sharded = sum(a.size for a in matrices if shard_bytes(a) < 4 * a.size)
        assert sum(size.local for size in parameter_sizes(model, mesh)) == local
        assert 0 < sharded_layer_elements(model, mesh) == sharded


def test_what_a_saved_value_spares():
    """By hand for Qwen3-8B: D 4,096, Q 4,096, KV 1,024, F 12,288."""
    model = PUBLISHED["qwen3_8b"]
    everything = repeated_weights(model, ())
    assert everything == 4096 * (2 * 4096 + 2 * 1024 + 2 * 12288)  # all products of a layer but the last, `down`
    spared = {name: everything - repeated_weights(model, (name,)) for name in REMAT_NAMES}
    products = dict.fromkeys(("query", "query_projection", "residual"), 4096 * 4096)
    products |= dict.fromkeys(("key", "key_projection", "value"), 4096 * 1024)
    products |= dict.fromkeys(("gate", "up"), 4096 * 12288)
    assert {name: size for name, size in spared.items() if size} == products
    assert repeated_weights(model, ("query", "query_projection")) == everything - 4096 * 4096
    assert saved_position(model, ("attention_lse", "value", "gate"), 2) == 2 * (1024 + 12288)


def test_the_peak_of_devices_is_that_of_their_cards():
    def devices(*kinds):
        return [SimpleNamespace(device_kind=kind) for kind in kinds]

    assert peak_flops(devices("NVIDIA H200", "NVIDIA H100 80GB HBM3")) == 2 * 989e12
    assert peak_flops(devices("NVIDIA H200", "cpu")) is None and peak_flops(jax.devices()) is None


def test_collectives_of_a_step():
    model, config = PUBLISHED["qwen3_8b"], make_config()
    lengths = Lengths(1000, 6400, 8000, "given", micro_batches=10, padding=0.0)
    work = plan_work(model, config, planned_mesh(config, 8), "full", lengths, find_device("h200"))
    layers = (
        model.num_layers * model.hidden_size * (2 * model.query_size + 2 * model.kv_size + 3 * model.intermediate_size)
    )
    calls, size = work.collectives["all-gather"]
    hidden = work.tokens / 8 * model.hidden_size
    assert calls == 2 * 7 * 36 * 10
    assert size == pytest.approx(2 * layers * 7 / 8 * 2 * 10 + hidden * 7 * 2)
    assert work.collectives["reduce-scatter"][1] == pytest.approx(layers * 7 / 8 * 4 * 10 + hidden * 7 * 4)
    assert "all-reduce" not in work.collectives
    config.mesh.replica = 2
    assert (
        "all-reduce"
        in plan_work(model, config, planned_mesh(config, 8), "full", lengths, find_device("h200")).collectives
    )


def test_what_does_not_fit_says_what_would():
    model, config = PUBLISHED["qwen3_14b"], make_config()
    found = fitting.fit(model, config, 2, find_device("h100").usable)
    assert not found.fits and found.changes
    limit = find_device("h100").usable
    for change in found.changes:
        if change.endswith(" devices"):
            assert fitting.fit(model, config, int(change.split()[0]), limit).fits
            continue
        changed = config.copy_and_resolve_references()
        for part in change.split():
            name, value = part.split("=")
            schema.put(changed, name, int(value) if value.isdigit() else value)
        assert fitting.fit(model, changed, 2, limit).fits, change


def test_a_rung_that_does_not_fit_names_the_next():
    config = make_config(remat="none")
    found = fitting.fit(PUBLISHED["qwen3_14b"], config, 8, find_device("h200").usable)
    assert not found.fits and found.changes[0].startswith("remat=attention_out")


def run(capsys, *argv):
    code = plan.main(list(argv))
    return code, capsys.readouterr().out


def test_the_command_in_words_and_as_json(capsys):
    code, text = run(
        capsys,
        "--config",
        "configs/qwen3_14b.py:math_cot_ep8",
        "--devices",
        "8",
        "--device",
        "h200",
        "--price",
        "4",
        "--verbose",
    )
    assert code == 0
    for part in ("8 x H200", "fits", "all-gather", "640 steps", "GB", RATES.source):
        assert part in text
    code, text = run(capsys, "--config=configs/internlm2_5_20b.py:math_cot_ep8", "--devices=1", "--json")
    found = json.loads(text)
    assert code == OutOfMemoryError.exit_code and not found["fits"] and found["changes"]
    parts = ("parameters", "whole", "moments", "gradients", "beside", "batch", "temporaries")
    assert found["memory"]["total_bytes"] == sum(found["memory"][f"{part}_bytes"] for part in parts)


@pytest.mark.parametrize("name", BASES)
def test_every_base_model_has_a_plan(name, capsys):
    code, text = run(capsys, "--config", f"configs/{name}.py:math_cot_ep8", "--json")
    assert code == 0 and json.loads(text)["time"]["steps"] == 640


def test_lengths_from_a_file(tmp_path, capsys):
    file = tmp_path / "lengths.txt"
    file.write_text("100\n300\n50000\n")
    config = [
        "--config",
        "configs/qwen3_4b.py:math_cot_ep8",
        "--config.train.global_batch=3",
        "--config.objective.name=token_mean",
        "--config.train.expect_steps=-1",
    ]
    code, text = run(capsys, *config, "--lengths", str(file), "--json")
    assert json.loads(text)["data"]["mean_tokens"] == pytest.approx((100 + 300 + 20000) / 3)
    file.write_text("[3, -1]")
    with pytest.raises(DataError, match="positive"):
        run(capsys, *config, "--lengths", str(file))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--device", "h20"], "nearest: h200"),
        (["--config.mesh.replica=3"], "choose one of"),
        (["--config.mesh.fsdp=3"], "not the number of devices"),
        (["--config.data.train=mine.parquet"], "--mean_length"),
        (["--config.model.path=Qwen/Qwen3-41B"], "nearest: qwen3_4b.*config.json: "),
        (["--config.train.epochs=many"], "epochs"),
        (["--devices", "none"], "devices"),
        (["--config.data.pack=3"], "nearest"),
        (["--mean_length", "0"], "--mean_length=0: must be positive"),
        (["--config.train.global_batch=100000"], "20,480 documents, fewer than train.global_batch=100,000"),
        (["--config.train.epochs=2"], "expects 640 updates, but 20,480 documents and train.epochs=2 give 160"),
        (["--lengths", "nowhere.txt"], "--lengths nowhere.txt: No such file or directory; want"),
    ],
)
def test_bad_input_is_one_line(argv, message, capsys):
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        run(capsys, "--config", "configs/qwen3_4b.py:math_cot_ep8", *argv)
    assert "\n" not in str(caught.value)


def test_data_that_is_not_there_needs_only_a_mean(capsys):
    argv = [
        "--config.data.train=mine.parquet",
        "--config.train.expect_steps=-1",
        "--mean_length",
        "2000",
        "--documents",
        "2560",
    ]
    code, text = run(capsys, "--config", "configs/qwen3_4b.py:math_cot_ep8", *argv, "--json")
    assert code == 0 and json.loads(text)["time"]["steps"] == 80


def test_models_are_found_by_hub_id():
    for path, name in (
        ("Qwen/Qwen2.5-7B", "qwen2_5_7b"),
        ("Qwen/Qwen3-14B-Base", "qwen3_14b"),
        ("internlm/internlm2_5-20b", "internlm2_5_20b"),
    ):
        assert find_model(path)[0] == PUBLISHED[name]


@pytest.fixture
def run_on_a_disk(monkeypatch):
    """A run whose checkpoint takes 1.05 x 12 bytes a parameter, and a disk with so many bytes free."""
    model = dataclasses.replace(find_model("Qwen/Qwen3-0.6B-Base")[0], **TINY)
    data = SimpleNamespace(total_steps=4)
    parts = SimpleNamespace(model=model, config=make_config(precision__params="float32"), data=data)
    needed = 1.05 * checkpoint_bytes(model, parts.config, 4)[0]
    asked = []

    def disk(free):
        def usage(place):
            asked.append(place)
            return SimpleNamespace(free=free)

        monkeypatch.setattr(preflight.shutil, "disk_usage", usage)
        return parts, asked

    return disk, needed


def test_a_disk_that_cannot_hold_one_checkpoint_is_refused_before_the_start(run_on_a_disk, tmp_path, capsys):
    disk, needed = run_on_a_disk
    parts, asked = disk(needed - 1)
    workdir = tmp_path / "runs" / "new"
    with pytest.raises(CheckpointError, match=r"needs [\d.]+ MB, and the disk of .*new has [\d.]+ MB free") as error:
        preflight.check_disk(parts, workdir, print)
    assert "\n" not in str(error.value) and asked == [tmp_path] and not list(tmp_path.iterdir())
    preflight.check_disk(parts, workdir, print, ignore=True)
    assert capsys.readouterr().out.startswith("warning: a checkpoint needs")
    preflight.check_disk(disk(needed + 1)[0], workdir, print)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(("gib", "warned"), [(3, True), (4, False)])
def test_a_host_too_small_for_a_save_is_named(monkeypatch, capsys, gib, warned):
    """1.6 copies of the state of its devices; here 8 of 0.25 GiB each."""
    state = jax.ShapeDtypeStruct((2**26,), "float32", sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    parts = SimpleNamespace(abstract=[state], config=make_config(precision__moments="float32"))
    monkeypatch.setattr(preflight.xla, "host_memory", lambda: gib * GIB)
    preflight.check_host(parts, print)
    said = capsys.readouterr().out
    assert said.startswith("warning: a save takes 3 GiB of this host's memory, which has 3: ") == warned == bool(said)
    assert ("precision.moments=bfloat16" in said) == warned


def test_the_disk_is_the_one_that_a_link_leads_to(run_on_a_disk, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")  # which the start will make
    parts, asked = run_on_a_disk[0](1e12)
    preflight.check_disk(parts, tmp_path / "run", print)
    assert asked == [tmp_path / "disk"]


def test_what_a_killed_save_left_counts_as_free(run_on_a_disk, tmp_path):
    disk, needed = run_on_a_disk
    for name, size in (("2.orbax-checkpoint-tmp", 10_000), ("4", 5000)):
        (tmp_path / "checkpoints" / name / "parameters").mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "parameters" / "array").write_bytes(b"x" * size)
    preflight.check_disk(disk(needed - 15_000)[0], tmp_path, print)
    (tmp_path / "checkpoints" / "4" / "manifest.json").write_text("{}")  # a milestone's parameters stay
    with pytest.raises(CheckpointError):
        preflight.check_disk(disk(needed - 15_000)[0], tmp_path, print)
