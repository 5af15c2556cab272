"""mesh.gather=auto: what it becomes in a run, by the compiler's count, and in a plan, by its estimate."""

import json
from types import SimpleNamespace

import jax
import pytest

from jsft import config as schema
from jsft import plan
from jsft.errors import ConfigError
from jsft.hardware.cards import RATES, find_device
from jsft.models.published import PUBLISHED
from jsft.models.remat import LADDER
from jsft.planning import fitting, remat
from jsft.planning.memory import HEADROOM, estimate, planned_mesh
from jsft.step.components import Components
from jsft.step.gather_once import gathers_once, possible_gathers, reduces_once, settle_gather, with_gather

GIB = 2**30


def make_config(**fields):
    config = schema.default_config()
    config.model.path, config.data.train, config.fidelity = "model", "data", "best"
    for name, value in fields.items():
        schema.put(config, name.replace("__", "."), value)
    return schema.resolve(config)


FLOAT8 = dict(precision__matmul="float8")


@pytest.mark.parametrize(
    "fields, possible",
    [
        ({}, ("layer",)),
        (FLOAT8, ("layer", "step")),
        (dict(mesh__gather="layer", **FLOAT8), ("layer",)),
        (dict(mesh__gather="step"), ("step",)),
        (dict(mesh__reduce="step"), ("step",)),
        (dict(mesh__reduce="step", **FLOAT8), ("step",)),
    ],
)
def test_what_auto_may_become(fields, possible):
    config = make_config(**fields)
    assert possible_gathers(config) == possible
    for room in (True, False):
        asked = []
        settled = settle_gather(config, lambda config: asked.append(config.mesh.gather) or room)
        assert settled.mesh.gather == possible[-1 if room else 0]
        assert asked == list(possible[1:])  # nothing is compiled where nothing is chosen
    assert config.mesh.gather == fields.get("mesh__gather", "auto")


def test_auto_that_is_not_settled_counts_as_the_leanest():
    eight = SimpleNamespace(shape={"fsdp": 8})
    assert not gathers_once(make_config(**FLOAT8), eight) and not gathers_once(make_config(), eight)
    both = make_config(mesh__reduce="step")
    assert gathers_once(both, eight) and reduces_once(both, eight)


def test_gradients_reduced_once_a_step_need_weights_gathered_once_a_step():
    with pytest.raises(ConfigError, match="mesh.reduce=step.*leave mesh.gather out") as caught:
        make_config(mesh__gather="layer", mesh__reduce="step")
    assert "\n" not in str(caught.value)


class Compiled:
    """Stands for a device of 80 GiB, the plan and the compiler: GiB of each mesh.gather."""

    def __init__(self, monkeypatch, needs, planned=None, limit=80 * GIB):
        self.compiled, self.said, planned = [], [], planned or needs
        device = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": limit} if limit else None)
        monkeypatch.setattr(remat.jax, "local_devices", lambda: [device])

        def compile_program(parts, rung):
            gather = parts.config.mesh.gather
            self.compiled.append((gather, rung))
            return needs[gather] and remat.Needed(int(needs[gather] * GIB), 0)

        def plan_of(model, config, mesh, rung, platform):
            return SimpleNamespace(total=planned[config.mesh.gather] * GIB)

        monkeypatch.setattr(remat, "bytes_needed", compile_program)
        monkeypatch.setattr(remat, "estimate", plan_of)

    def choose(self, rung="full", **fields):
        parts = components(make_config(**fields))
        return remat.choose_gather(parts, rung, self.said.append).config.mesh.gather


def components(config):
    mesh = SimpleNamespace(shape={"fsdp": 1})
    return Components(config, None, None, mesh, None, None, None, 1)


def test_float8_is_quantised_once_a_step_where_the_compiled_program_fits(monkeypatch):
    compiler = Compiled(monkeypatch, {"step": 78.3})
    assert compiler.choose("gate,up", **FLOAT8) == "step"
    assert compiler.compiled == [("step", "gate,up")]
    assert compiler.said == ["gather:    step needs 78.3 of 80.0 GiB"]
    compiler = Compiled(monkeypatch, {"step": 78.5})  # above the headroom
    assert compiler.choose(**FLOAT8) == "layer"
    assert compiler.said == ["gather:    step would need 78.5 of 80.0 GiB"]
    compiler = Compiled(monkeypatch, {"step": None}, {"step": 80})
    assert compiler.choose(**FLOAT8) == "layer"
    assert compiler.said == ["gather:    step would need more than 80.0 GiB"]


def test_a_program_far_too_large_by_the_plan_is_not_compiled(monkeypatch):
    compiler = Compiled(monkeypatch, {"step": 70}, {"step": 93})
    assert compiler.choose(**FLOAT8) == "layer" and compiler.compiled == []
    assert compiler.said == ["gather:    not tried, by the plan: step (93 GiB)"]


def test_where_nothing_is_to_be_chosen_nothing_is_compiled_or_said(monkeypatch):
    compiler = Compiled(monkeypatch, {"step": 1, "layer": 1})
    assert compiler.choose() == "layer"
    assert compiler.choose(mesh__gather="layer", **FLOAT8) == "layer"
    assert compiler.choose(mesh__gather="step", **FLOAT8) == "step"
    assert compiler.choose(mesh__reduce="step") == "step"
    assert compiler.compiled == [] and compiler.said == []
    unknown = Compiled(monkeypatch, {"step": 1}, limit=None)  # a CPU
    assert unknown.choose(**FLOAT8) == "layer" and unknown.compiled == [] and unknown.said == []


def test_the_rung_is_chosen_as_each_layer_quantises(monkeypatch):
    """The weights of a step would not fit with the second rung; the first rung that they fit with is not taken."""
    needs = {("auto", 0): 90, ("auto", 1): 75, ("step", 1): 82, ("step", 2): 60}
    Compiled(monkeypatch, {}, {"auto": 0, "step": 0})
    monkeypatch.setattr(
        remat,
        "bytes_needed",
        lambda parts, rung: remat.Needed(needs[parts.config.mesh.gather, LADDER.index(rung)] * GIB, 0),
    )
    parts, said = components(make_config(**FLOAT8)), []
    rung = remat.choose_remat(parts, said.append)
    assert rung == LADDER[1]
    assert remat.choose_gather(parts, rung, said.append).config.mesh.gather == "layer"
    assert len(said) == 2


def test_a_run_out_of_memory_may_quantise_layer_by_layer(monkeypatch):
    compiler = Compiled(monkeypatch, {"step": 78, "layer": 72})
    parts = components(make_config(mesh__gather="step", **FLOAT8))
    text = remat.advise_out_of_memory(parts, "full")
    assert text.endswith("78 GiB of 80.0 GiB per device; mesh.gather=layer fits with the same remat and 72 GiB")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "set mesh.gather=layer, or a later rung" in remat.advise_out_of_memory(parts, "full")
    layer = components(make_config(mesh__gather="layer", **FLOAT8))
    assert "mesh.gather" not in remat.advise_out_of_memory(layer, "full")
    assert compiler.compiled == [("step", "full"), ("layer", "full")]


@pytest.mark.parametrize("base, devices", [("qwen3_4b", 1), ("qwen3_8b", 8), ("qwen3_14b", 1), ("qwen3_14b", 2)])
def test_a_plan_takes_the_rung_of_layer_and_step_where_it_fits(base, devices):
    model, limit = PUBLISHED[base], find_device("h200").usable
    config = make_config(precision__params="bfloat16", precision__gradients="bfloat16", **FLOAT8)
    config.precision.moments, config.data.pack_length = "bfloat16", 16384
    best, layer = (fitting.best_rung(model, c, devices, limit) for c in (config, with_gather(config, "layer")))
    step = estimate(model, with_gather(config, "step"), planned_mesh(config, devices), best.rung)
    assert best.rung == layer.rung and best.fits
    assert best.gather == ("step" if step.total <= HEADROOM * limit else "layer")
    assert best.memory == (step if best.gather == "step" else layer.memory)


def test_a_plan_without_room_is_of_layer_and_one_with_room_of_step():
    model, config = PUBLISHED["qwen3_8b"], make_config(remat="full", **FLOAT8)
    mesh = planned_mesh(config, 8)
    totals = [estimate(model, with_gather(config, gather), mesh, "full").total for gather in ("layer", "step")]
    between = sum(totals) / 2 / HEADROOM
    assert fitting.fit(model, config, 8, between).gather == "layer"
    assert fitting.fit(model, config, 8, totals[1] / HEADROOM).gather == "step"
    assert fitting.fit(model, make_config(remat="full"), 8, 10 * between).gather == "layer"
    asked = make_config(remat="full", mesh__gather="step", **FLOAT8)
    assert fitting.fit(model, asked, 8, between).changes[0] == "mesh.gather=layer"


def test_the_plan_says_what_auto_becomes(capsys):
    argv = ["--config", "configs/qwen3_4b.py:math_cot_ep8", "--config.fidelity=best"]
    float8 = [*argv, "--config.precision.matmul=float8"]
    assert plan.main([*float8, "--verbose"]) == 0
    text = capsys.readouterr().out
    assert "mesh.gather=step, layers save: none" in text and "quantised for a step" in text
    assert RATES.float8_source in text and "quantising to float8" in text
    assert plan.main([*float8, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"]["gather"] == "step" and found["memory"]["whole_bytes"] > 0
    assert found["memory"]["rungs"][0]["total_bytes"] == found["memory"]["total_bytes"]
    assert plan.main([*argv, "--json"]) == 0
    wide = json.loads(capsys.readouterr().out)
    assert wide["memory"]["gather"] == "layer" and wide["step"]["quantising_seconds"] == 0
    assert wide["time"]["rates"] == RATES.source and found["step"]["seconds"] < 0.8 * wide["step"]["seconds"]
