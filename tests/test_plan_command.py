"""`jsft plan` as a user meets it: five lines, cards without kernels, many devices, layouts, any model's config.json."""

import json
from types import SimpleNamespace

import pytest

from jsft import cli, plan
from jsft import config as schema
from jsft.data import schedule
from jsft.data.loader import make_layout
from jsft.data.steps import Recipe, StepSource, packing_report
from jsft.errors import ConfigError, OutOfMemoryError
from jsft.hf.random_model import write_random_model
from jsft.models.published import PUBLISHED
from jsft.planning import words
from jsft.planning.inputs import find_model
from jsft.planning.packing import drawn_lengths, pack_steps

BASE_14B = ("--config", "configs/qwen3_14b.py:math_cot_ep8")


def run(capsys, *argv):
    code = plan.main(list(argv))
    return code, capsys.readouterr().out


def test_five_lines_of_80_columns_say_whether_how_long_how_much_and_what_to_change(capsys):
    code, text = run(capsys, *BASE_14B, "--device=h200", "--price=4")
    lines = text.splitlines()
    assert code == 0 and [line.split(":")[0] for line in lines] == ["fits", "time", "cost", "disk", "change"]
    assert lines[0].startswith("fits:      yes, ") and "640 steps" in lines[1] and "at 4" in lines[2]
    assert max(map(len, lines)) <= 80
    code, text = run(capsys, *BASE_14B, "--device=h100", "--devices=1")
    assert code == OutOfMemoryError.exit_code and "fits:      NO" in text and "to fit: 2 devices" in text


@pytest.mark.parametrize("card", ["a100", "b200"])
def test_a_card_without_the_kernels_is_planned_with_plain_attention(card, capsys):
    plans = {}
    for name in (card, "h200"):
        plans[name] = json.loads(run(capsys, *BASE_14B, f"--device={name}", "--json")[1])
    there, here = plans[card]["step"], plans["h200"]["step"]
    assert (there["attention"], here["attention"]) == ("plain XLA", "flash kernels")
    assert there["attention_seconds"] > 0.8 * there["seconds"] > 5 * here["seconds"]
    assert plans[card]["time"]["spread"] > plans["h200"]["time"]["spread"]
    text = run(capsys, *BASE_14B, f"--device={card}")[1]
    assert "is plain XLA attention (no kernel; not measured)" in text and "h200 or h100 has the" in text
    with pytest.raises(ConfigError, match=f"pallas: the kernels need a Hopper GPU.*not {card.upper()}"):
        run(capsys, *BASE_14B, f"--device={card}", "--config.attention.implementation=pallas")


class Documents(SimpleNamespace):
    def __len__(self):
        return len(self.lengths)

    def step_rows(self, step, global_batch, **order):
        return schedule.step_rows(step, len(self), global_batch, **order)


def test_padding_and_micro_batches_are_the_packers_own():
    """As `packing_report` finds them for a run on the same lengths; large where devices outnumber documents."""
    model, config = PUBLISHED["qwen3_14b"], schema.resolve(cli.parse(BASE_14B, lambda values: None, "")[0])
    documents = Documents(lengths=drawn_lengths(6600, 8500, 20000, 256))
    few, many = (pack_steps(model, config, devices, documents.lengths) for devices in (8, 128))
    recipe = Recipe(256, False, 0, "token_mean", False, 1, 1)
    of_run = packing_report(StepSource(documents, recipe, make_layout(config, documents, 8), 32), 32)
    assert few.padding == pytest.approx(of_run["padding_share"], abs=0.004)
    assert few.micro_batches == pytest.approx(of_run["micro_batches"], abs=0.3)
    assert few.padding < 0.03 and few.imbalance < 0.1 and many.padding > 0.25 and many.imbalance > 0.3


@pytest.mark.parametrize(("mean", "weighted", "longest"), [(6600, 8500, 20000), (500, 700, 20000), (300, 300, 512)])
def test_drawn_lengths_have_the_means_asked_for(mean, weighted, longest):
    lengths = drawn_lengths(mean, weighted, longest, 256).astype(float)
    assert lengths.mean() == pytest.approx(mean, rel=0.01) and lengths.max() <= longest and len(lengths) % 256 == 0
    assert (lengths**2).mean() / lengths.mean() == pytest.approx(weighted, rel=0.05)


def test_layouts_fit_and_the_cheapest_comes_first(capsys):
    lengths = ("--mean_length=2000", "--config.data.max_length=4096", "--config.data.pack_length=4096")
    argv = ("--config", "configs/qwen3_1_7b.py:math_cot_ep8", *lengths, "--layouts", "--price=2")
    plan = json.loads(run(capsys, *argv, "--json")[1])
    hours = [row["device_hours"] for row in plan["layouts"]]
    assert len(hours) >= 4 and hours == sorted(hours)
    assert all(row["memory_bytes"] <= plan["memory"]["limit_bytes"] for row in plan["layouts"])
    assert len({row["devices"] for row in plan["layouts"]}) == len(hours)
    text = words.layout_lines(plan)
    assert text[0].split()[:4] == ["cheapest:", "devices", "hours", "cost"] and len(text) == 1 + len(hours)
    assert float(text[1].split()[2]) == pytest.approx(2 * hours[0], rel=0.01)


def test_any_hub_id_needs_its_config_json_alone(tmp_path, monkeypatch):
    write_random_model(tmp_path / "full", hidden_size=64, heads=2, kv_heads=1, intermediate_size=128)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_bytes((tmp_path / "full" / "config.json").read_bytes())
    asked = []

    def resolve(path, revision, patterns):
        asked.append((path, revision, patterns))
        return tmp_path / "hub"

    monkeypatch.setattr("jsft.planning.inputs.resolve_model", resolve)
    model, source = find_model("someone/else", "v2")
    assert model.hidden_size == 64 and source == "config.json of someone/else"
    assert asked == [("someone/else", "v2", ("config.json",))]
    assert find_model(str(tmp_path / "hub"))[0] == model


def test_lengths_that_are_given_stand_for_the_data(capsys):
    code, text = run(capsys, "--model", "Qwen/Qwen3-1.7B-Base", "--mean_length=500", "--documents=1000")
    assert code == 0 and text.startswith("fits:      yes")
