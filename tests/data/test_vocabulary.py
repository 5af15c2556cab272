"""The tokenizer against the embedding: a token without a row is refused, whatever brings it in."""

import json

import numpy as np
import pytest

from jsft.data.cache import open_cache
from jsft.data.chat import Chat, load_tokenizer
from jsft.data.loader import make_chat, open_eval_data, open_training_data
from jsft.data.shapes import Keys
from jsft.data.sources import open_source
from jsft.data.vocabulary import Embedding
from jsft.errors import ModelError
from tests.data.helpers import CHATML, rows_of, write_rows, write_tokenizer

IDS = 259  # of the tiny tokenizer: 256 bytes, <|endoftext|>, <|im_start|>, <|im_end|>


def model(folder, rows=IDS, template=CHATML, eos="<|im_end|>", added=(), special=True):
    """A tokenizer with further tokens and a config.json whose embedding has `rows` rows."""
    from tokenizers import AddedToken, Tokenizer

    write_tokenizer(folder, template, eos)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(text, special=special) for text in added])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": rows}))
    return folder


def check(folder, **choices):
    Embedding.of(folder).check_tokenizer(Chat(load_tokenizer(folder), **choices))


def test_tokenizer_that_fits_passes(tmp_path):
    check(model(tmp_path / "equal"))
    check(model(tmp_path / "spare", rows=400))
    check(model(tmp_path / "unused", added=["<|pad|>"]))  # nothing puts it into a row
    assert Embedding.of(write_tokenizer(tmp_path / "no_config")) is None


def test_eos_without_a_row_is_refused(tmp_path):
    folder = model(tmp_path / "m", added=["<|stop|>"])
    with pytest.raises(ModelError, match=rf"{folder}: token '<\|stop\|>' has id 259, .* has 259 rows .*ends every"):
        check(folder, eos_token="<|stop|>")


WRITERS = {
    "every turn": CHATML.replace("<|im_start|>", "<|turn|>"),
    "a system turn": "{% if messages[0].role == 'system' %}<|turn|>{% endif %}" + CHATML,
    "a tool turn": CHATML.replace("{{ raise_exception('no tools here') }}", "<|turn|>"),
    "a later turn": CHATML.replace("{% for m", "{% if messages|length > 2 %}<|turn|>{% endif %}{% for m"),
    "composed": CHATML.replace("'<|im_start|>'", "'<|' + 'turn' + '|>'"),
    "bos": "{{ bos_token }}" + CHATML,
    "a branch that no row of ours reaches": "{% if tools %}<|turn|>{% endif %}" + CHATML,
}


@pytest.mark.parametrize("template", WRITERS.values(), ids=WRITERS.keys())
def test_template_token_without_a_row_is_refused(tmp_path, template):
    folder = model(tmp_path / "m", template=template, added=["<|turn|>"])
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<|turn|>"}))
    with pytest.raises(ModelError, match=r"'<\|turn\|>' has id 259, but .* 259 rows .*the chat template writes it"):
        check(folder)


@pytest.mark.parametrize("cached", [False, True])
def test_text_whose_token_has_no_row_is_refused_before_and_after_tokenising(tmp_path, cached):
    """An added token that is not special is read out of the data's text."""
    folder = model(tmp_path / "m", added=["gamma"], special=False)
    rows = rows_of([20, 20, 20])
    rows[1]["response"] = "alpha beta gamma"
    path, chat = write_rows(tmp_path / "x.parquet", rows), Chat(load_tokenizer(folder))
    if cached:
        open_cache(open_source(path), chat, Keys())
    with pytest.raises(ModelError, match=rf"{folder}: token 'gamma' has id 259, .*259 rows.* row 1 holds it"):
        open_cache(open_source(path), chat, Keys(), embedding=Embedding.of(folder))
    if not cached:
        assert not list(tmp_path.glob(".jsft_cache/*/part-*"))
    assert len(open_cache(open_source(path), chat, Keys(), embedding=Embedding(folder, IDS + 1))) == 3


def test_training_and_held_out_data_are_both_checked(tmp_path, make_config):
    folder = model(tmp_path / "m", added=["gamma"], special=False)
    bad = write_rows(tmp_path / "bad.jsonl", rows_of([20] * 8, response="gamma"))
    with pytest.raises(ModelError, match="bad.jsonl row 0 holds it"):
        open_training_data(make_config(bad), folder, rows_per_micro_batch=4)
    config = make_config(rows_of([20] * 8), data__eval=str(bad))
    open_training_data(config, folder, rows_per_micro_batch=4)
    with pytest.raises(ModelError, match="bad.jsonl row 0 holds it"):
        open_eval_data(config, folder, rows=4)
    with pytest.raises(ModelError, match="ends every response"):
        make_chat(config, model(tmp_path / "small", rows=IDS - 1))


def test_preview_stats_and_validate_refuse_it_too(tmp_path):
    from jsft.prepare import main

    folder = str(model(tmp_path / "m", added=["gamma"], special=False))
    good = str(write_rows(tmp_path / "good.jsonl", rows_of([20] * 2)))
    bad = str(write_rows(tmp_path / "bad.jsonl", rows_of([20] * 2, response="gamma")))
    assert main(["validate", good, "--model", folder]) == 0
    for command in ("preview", "stats", "validate"):
        with pytest.raises(ModelError, match="'gamma' has id 259, .*bad.jsonl row 0 holds it"):
            main([command, bad, "--model", folder])
    with pytest.raises(ModelError, match="ends every response"):
        main(["validate", good, "--model", folder, "--eos_token", "gamma"])


def test_unreadable_vocab_size_is_the_model_directory_s_error(tmp_path):
    folder = model(tmp_path / "m")
    for text in ("{", "{}", '{"vocab_size": null}', "[]"):
        (folder / "config.json").write_text(text)
        with pytest.raises(ModelError, match="config.json: no vocab_size to be read"):
            Embedding.of(folder)


def test_notebook_model_refuses_what_has_no_row(tmp_path):
    from jsft.api import Model
    from jsft.hf.random_model import write_random_model

    size = dict(hidden_size=32, layers=1, heads=2, kv_heads=1, head_dim=16, intermediate_size=32)
    folder = tmp_path / "m"
    write_random_model(folder, family="qwen3", vocab_size=IDS, **size)
    settings = json.loads((folder / "tokenizer.json").read_text())
    token = {
        "id": IDS,
        "content": "gamma",
        "special": False,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }
    settings["added_tokens"].append(token)
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    loaded = Model(folder)
    assert np.isfinite(loaded.log_probabilities([{"message": "hi", "response": "yo"}])[0]).all()
    with pytest.raises(ModelError, match="'gamma' has id 259, .*row 0 holds it"):
        loaded.tokenize([{"message": "hi", "response": "gamma"}])
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = settings["chat_template"].replace("<|im_start|>", "gamma")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="the chat template writes it"):
        Model(folder)
