"""mesh.gather=auto: what it and remat=auto become in a run, by the compiler's count, and in a plan, by its estimate."""

import json
import random
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
from jsft.step.gather_once import gathers_once, possible_gathers, reduces_once, with_gather

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
        (dict(mesh__reduce="step", precision__float8_forward="all", **FLOAT8), ("step",)),
    ],
)
def test_what_auto_may_become(fields, possible):
    config = make_config(**fields)
    assert possible_gathers(config) == possible
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
    """Stands for a device of 80 GiB, the plan and the compiler: GiB of each mesh.gather, or of (mesh.gather, rung)."""

    def __init__(self, monkeypatch, needs, planned=None, limit=80 * GIB):
        self.compiled, self.said, planned = [], [], planned or needs
        device = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": limit} if limit else None)
        monkeypatch.setattr(remat.jax, "local_devices", lambda: [device])

        def compile_program(parts, rung):
            program = parts.config.mesh.gather, rung
            self.compiled.append(program)
            gib = needs.get(program, needs.get(program[0]))
            return gib and remat.Needed(int(gib * GIB), 0, program)

        def plan_of(model, config, mesh, rung, platform):
            gather = config.mesh.gather
            return SimpleNamespace(total=planned.get((gather, rung), planned.get(gather, 0)) * GIB)

        monkeypatch.setattr(remat, "bytes_needed", compile_program)
        monkeypatch.setattr(remat, "estimate", plan_of)

    def choose(self, rung="full", **fields):
        """mesh.gather and the rung."""
        chosen = remat.choose_program(components(make_config(remat=rung, **fields)), self.said.append)
        found = chosen.components.config.mesh.gather, chosen.remat
        assert chosen.gradients == (found if found in self.compiled else None)  # a run goes on with this program
        return found


def components(config):
    mesh = SimpleNamespace(shape={"fsdp": 1})
    return Components(config, None, None, mesh, None, None, None, 1)


def test_float8_is_quantised_once_a_step_where_the_compiled_program_fits(monkeypatch):
    compiler = Compiled(monkeypatch, {"step": 78.3})
    assert compiler.choose("gate,up", **FLOAT8) == ("step", "gate,up")
    assert compiler.compiled == [("step", "gate,up")]
    assert compiler.said == ["gather:    step needs 78.3 of 80.0 GiB"]
    compiler = Compiled(monkeypatch, {"step": 78.5})  # above the headroom
    assert compiler.choose(**FLOAT8) == ("layer", "full")
    assert compiler.said == ["gather:    step would need 78.5 of 80.0 GiB"]
    compiler = Compiled(monkeypatch, {"step": None}, {"step": 80})
    assert compiler.choose(**FLOAT8) == ("layer", "full")
    assert compiler.said == ["gather:    step would need more than 80.0 GiB"]


def test_a_program_far_too_large_by_the_plan_is_not_compiled(monkeypatch):
    compiler = Compiled(monkeypatch, {"step": 70}, {"step": 93})
    assert compiler.choose(**FLOAT8) == ("layer", "full") and compiler.compiled == []
    assert compiler.said == ["gather:    not tried, by the plan: step (93 GiB)"]


def test_where_nothing_is_to_be_chosen_nothing_is_compiled_or_said(monkeypatch):
    compiler = Compiled(monkeypatch, {"step": 1, "layer": 1})
    assert compiler.choose() == ("layer", "full")
    assert compiler.choose(mesh__gather="layer", **FLOAT8) == ("layer", "full")
    assert compiler.choose(mesh__gather="step", **FLOAT8) == ("step", "full")
    assert compiler.choose(mesh__reduce="step") == ("step", "full")
    assert compiler.compiled == [] and compiler.said == []
    unknown = Compiled(monkeypatch, {"step": 1}, limit=None)  # a CPU
    assert unknown.choose("auto", **FLOAT8) == ("layer", "none") and unknown.compiled == [] and unknown.said == []


def test_where_the_fastest_program_fits_it_is_the_only_one_compiled(monkeypatch):
    compiler = Compiled(monkeypatch, {"step": 78, "layer": 70})
    assert compiler.choose("auto", **FLOAT8) == ("step", "none")
    assert compiler.compiled == [("step", "none")]
    assert compiler.said == ["remat:     none needs 78.0 of 80.0 GiB", "gather:    step needs 78.0 of 80.0 GiB"]
    compiler = Compiled(monkeypatch, {"layer": 70})
    assert compiler.choose("auto") == ("layer", "none")
    assert compiler.compiled == [("layer", "none")] and compiler.said == ["remat:     none needs 70.0 of 80.0 GiB"]


def test_weights_of_a_step_cost_no_rung(monkeypatch):
    """They would not fit with the second rung; the first rung that they fit with is not taken."""
    first, second, third = LADDER[:3]
    needs = {("layer", first): 90, ("layer", second): 75, ("step", second): 82, ("step", third): 60}
    compiler = Compiled(monkeypatch, needs, needs | {("step", first): 97})
    assert compiler.choose("auto", **FLOAT8) == ("layer", second)
    assert compiler.compiled == [("layer", first), ("layer", second), ("step", second)]
    assert compiler.said == [
        f"remat:     {second} needs 75.0 of 80.0 GiB",
        "gather:    step would need 82.0 of 80.0 GiB",
    ]


@pytest.mark.parametrize("error", [0, 0.1])
def test_one_search_finds_what_two_would(monkeypatch, error):
    """remat with the leanest mesh.gather, then mesh.gather. With a plan that is right it compiles no more than they."""
    rng = random.Random(0)
    for _ in range(200):
        layer = sorted((rng.uniform(40, 120) for _ in LADDER[:-1]), reverse=True) + [40]
        gathered = rng.uniform(0, 20)
        needs = {("layer", rung): gib for rung, gib in zip(LADDER, layer)}
        needs |= {("step", rung): gib + gathered for rung, gib in zip(LADDER, layer)}
        planned = {program: gib * (1 + rng.uniform(-error, error)) for program, gib in needs.items()}
        compiler = Compiled(monkeypatch, needs, planned)
        tried = [rung for rung in LADDER if planned["layer", rung] <= 1.15 * 80]
        rung = next(rung for rung in tried if needs["layer", rung] <= HEADROOM * 80)
        possible = planned["step", rung] <= 1.15 * 80
        gather = "step" if possible and needs["step", rung] <= HEADROOM * 80 else "layer"
        assert compiler.choose("auto", **FLOAT8) == (gather, rung)
        assert len(set(compiler.compiled)) == len(compiler.compiled)
        if not error:
            assert len(compiler.compiled) <= tried.index(rung) + 1 + possible
        assert len(compiler.said) == 2 + (len(tried) < len(LADDER))


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
