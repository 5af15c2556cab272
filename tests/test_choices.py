"""What a run of one's own leaves unset is chosen by stated rules, said, and the same when the run resumes."""

import json

import numpy as np
import pytest

from jsft import cli
from jsft import config as schema
from jsft.data.chat import Chat, load_tokenizer
from jsft.hardware.cards import DEVICES
from jsft.hf.random_model import write_random_model
from jsft.models.published import PUBLISHED
from jsft.planning import choices, inputs
from jsft.run import naming

GIB = 2**30


def own(*arguments):
    config, name, _ = cli.parse(["--model=m", "--data=d", *arguments], lambda values: None, "")
    assert name == cli.OWN_RUN.stem
    return schema.resolve(config)


def chosen(lengths, *arguments, model="qwen3_1_7b", devices=choices.Devices(8, 130 * GIB)):
    return choices.choose(own(*arguments), PUBLISHED[model], np.array(lengths), devices)


@pytest.mark.parametrize(
    "rows, epochs, batch",
    [(20000, 3, 256), (5000, 3, 128), (1000, 3, 16), (100, 3, 8), (5, 3, 4), (1, 3, 1), (1000, 0.1, 8)],
)
def test_the_batch_leaves_a_hundred_updates_and_never_exceeds_the_rows(rows, epochs, batch):
    assert choices.batch_for(rows, epochs) == batch


@pytest.mark.parametrize("model, rate", [("qwen3_14b", 1e-5), ("qwen3_1_7b", 2e-5), ("internlm2_5_20b", 1e-5)])
def test_the_rate_falls_with_the_models_size(model, rate):
    config, notes = chosen([900] * 1000, model=model)
    assert config.optimizer.learning_rate == rate
    assert any(note.startswith(f"optimizer.learning_rate={rate:g}: for ") for note in notes)


def test_lengths_follow_the_longest_document_and_a_devices_share_of_a_batch():
    config, notes = chosen([500] * 999 + [1300])
    assert config.data.max_length == 1408  # 1300 rounded up to 128
    assert config.train.global_batch == 16 and config.data.pack_length == 1408
    assert "data.max_length=1,408: the longest document, rounded up to 128" in notes
    config, _ = chosen([500] * 20000)
    assert (config.train.global_batch, config.data.max_length) == (256, 512)
    assert config.data.pack_length == choices.KERNEL_ROW  # 256 x 500 tokens on 8 devices would be 16,800
    for plain in (choices.Devices(8, None, "cpu", kernels=False), choices.Devices(8, 75 * GIB, kernels=False)):
        assert chosen([500] * 20000, devices=plain)[0].data.pack_length == choices.PLAIN_ROW


def test_documents_that_do_not_fit_are_cut_at_the_999th_permille_and_counted():
    lengths = [2000] * 9995 + [30000] * 5
    config, notes = chosen(lengths, model="qwen3_14b", devices=choices.Devices(8, 50 * GIB))
    assert config.data.max_length == 2048
    (note,) = [note for note in notes if note.startswith("data.max_length")]
    assert "99.9th percentile" in note and "5 of 10,000 documents are cut, the longest has 30,000" in note
    config, notes = chosen([50000] * 200, devices=choices.Devices(8, None))
    assert config.data.max_length == PUBLISHED["qwen3_1_7b"].max_positions  # nothing beyond the model's context
    assert "200 of 200 documents are cut" in str(notes)


def test_what_is_given_stays_and_the_rest_goes_with_it():
    config, notes = chosen([900] * 1000, "--lr=3e-4", "--batch_size=64", "--config.data.max_length=512")
    assert (config.optimizer.learning_rate, config.train.global_batch, config.data.max_length) == (3e-4, 64, 512)
    assert [note.partition("=")[0] for note in notes] == ["data.pack_length"]
    config, _ = chosen([900] * 1000, "--config.data.pack_length=640")
    assert (config.data.max_length, config.data.pack_length) == (640, 640)


def test_a_run_directory_remembers_what_was_chosen_and_an_old_one_that_it_never_evaluated(tmp_path):
    config = own()
    assert naming.remembered(config, tmp_path).data.max_length is None
    decided, _ = choices.choose(config, PUBLISHED["qwen3_1_7b"], np.array([900] * 1000), choices.Devices(8, None))
    flat = schema.flatten(decided) | {"eval.every": 0}  # what versions before the default wrote
    (tmp_path / "config.json").write_text(json.dumps({"config": flat}))
    again = naming.remembered(config, tmp_path)
    assert not choices.undecided(again) and again.data.max_length == decided.data.max_length
    assert again.optimizer.learning_rate == 2e-5 and again.eval.every == 0
    assert naming.remembered(own("--lr=1e-3"), tmp_path).optimizer.learning_rate == 1e-3
    (tmp_path / "config.json").write_text("[")
    assert naming.remembered(config, tmp_path).data.max_length is None


def test_the_same_command_has_the_same_directory_and_another_model_data_or_rate_has_not():
    name = naming.own_name(own("--data=my/data.v2.jsonl", "--model=Qwen/Qwen3-1.7B-Base"))
    assert name.startswith("Qwen3-1.7B-Base-data.v2-") and len(name.rpartition("-")[2]) == 6
    same = ["--data=my/data.v2.jsonl", "--model=Qwen/Qwen3-1.7B-Base", "--config.checkpoint.every=5"]
    assert naming.own_name(own(*same)) == name  # it changes nothing that is computed
    assert naming.own_name(own(*same, "--lr=1e-3")) != name
    assert naming.own_name(own("--data=a/x.parquet,b.parquet")).startswith("m-x-")
    assert naming.own_name(own("--data=org/set@main", "--model=/")).startswith("run-set-")


def test_a_plan_chooses_as_the_run_does_or_says_that_it_knows_no_lengths(tmp_path):
    write_random_model(tmp_path / "model", hidden_size=64, heads=2, kv_heads=1, intermediate_size=128)
    (tmp_path / "lengths").write_text("100\n" * 300)
    config = own(f"--model={tmp_path / 'model'}")
    found, lines = inputs.find_decisions(config, 2, DEVICES["H100"], str(tmp_path / "lengths"))
    assert (found.data.max_length, found.train.global_batch) == (128, 8) and len(lines) == 4
    found, (line,) = inputs.find_decisions(config, 2, DEVICES["H100"], None)
    assert found.data.max_length == 20000 and "lengths of the data are not known" in line


def test_a_response_ends_as_the_chat_template_ends_a_turn(tmp_path):
    tokenizer = load_tokenizer(write_random_model(tmp_path / "model", hidden_size=64, heads=2, kv_heads=1))
    own_end = Chat(tokenizer, eos_token="chat")
    assert tokenizer.convert_ids_to_tokens(own_end.eos_id) == "<|im_end|>"
    assert Chat(tokenizer).eos_id == tokenizer.eos_token_id != own_end.eos_id
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    assert Chat(tokenizer, eos_token="chat").eos_id == tokenizer.eos_token_id  # the template has no token for it
