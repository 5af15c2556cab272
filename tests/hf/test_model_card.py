"""The card of an exported model: front matter that the hub reads, values of the run, snippets that name the model."""

import ast
import re

import pytest

from jsft import config as schema
from jsft.hf.model_card import Facts, Score, data_names, find_license, model_card


def facts(**changes) -> Facts:
    config = schema.default_config()
    config.model.path, config.data.train = "Qwen/Qwen3-4B-Base", ["org/rows", "/home/me/secret/mine.parquet"]
    config.optimizer.learning_rate, config.data.truncation, config.checkpoint.every = 3e-5, "left", 77
    flat = schema.flatten(schema.resolve(config))
    given = dict(run="mine", step=640, config=flat, family="qwen3", license="apache-2.0", eos="5 `<|a|>`")
    return Facts(**given | dict(dtype="bfloat16", code="trained by jsft 1") | changes)


def front(card: str) -> list[str]:
    assert card.startswith("---\n")
    return card[4 : card.index("\n---\n")].splitlines()


def test_the_front_matter_names_base_licence_data_and_task():
    lines = front(model_card(facts()))
    for line in (
        "pipeline_tag: text-generation",
        "license: apache-2.0",
        "base_model: Qwen/Qwen3-4B-Base",
        "- org/rows",
    ):
        assert line in lines
    assert all(re.fullmatch(r"(- \S+|\w+:( \S+)?)", line) for line in lines)
    local = facts(license=None, config=facts().config | {"model.path": "/data/base", "data.train": "/data/mine.jsonl"})
    assert not [line for line in front(model_card(local)) if line.startswith(("license", "base_model", "datasets"))]


def test_the_card_gives_what_was_chosen_and_no_path_of_the_machine():
    card = model_card(facts())
    for row in ("| `optimizer.learning_rate` | 3e-05 |", "| `data.truncation` | left |", "| `train.epochs` | 1.0 |"):
        assert row in card
    assert "mine.parquet" in card and "secret" not in card and "`checkpoint.every`" not in card
    assert "`data.rows_per_device`" not in card  # the default
    assert "5 `<\\|a\\|>`" in card and "## Scores" not in card


def test_scores_stand_in_the_card_where_the_step_was_evaluated():
    card = model_card(facts(scores=[Score("GSM8K", "strict", "71.0 [68.1, 73.9]", "12.5")]))
    assert "| GSM8K | strict | 71.0 [68.1, 73.9] | 12.5 |" in card


@pytest.mark.parametrize("chats", [True, False])
@pytest.mark.parametrize(("family", "snippets"), [("qwen3", 2), ("internlm2", 1)])
def test_the_snippets_are_python_and_name_the_repository(family, snippets, chats):
    card = model_card(facts(family=family, repository="me/model", chats=chats))
    assert ("messages" in card) == chats == ("Prompts must be rendered with the chat template" in card)
    found = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(found) == snippets
    for code in found:
        ast.parse(code)
        assert '"me/model"' in code
    assert ("trust_remote_code=True" in found[-1]) == (family == "internlm2")


def test_the_licence_is_the_base_models(tmp_path):
    assert find_license(tmp_path, None) is None
    (tmp_path / "LICENSE").write_text("   Apache License\n   Version 2.0, January 2004\n")
    assert find_license(tmp_path, None) == "apache-2.0"
    (tmp_path / "LICENSE").write_text("Our own terms\n")
    card = model_card(facts(license=find_license(tmp_path, None)))
    assert front(card)[2:5] == ["license: other", "license_name: base-model", "license_link: LICENSE"]
    source = tmp_path / "source"
    source.mkdir()
    (source / "README.md").write_text("---\nlicense: llama3.1\nlanguage: en\n---\nlicense: mit\n")
    assert find_license(tmp_path, source) == "llama3.1"


def test_data_is_named_in_every_form_of_the_field():
    assert data_names("a.parquet, b.parquet") == data_names({"x": "a.parquet", "y": ["b.parquet"]})
    assert data_names(None) == []
