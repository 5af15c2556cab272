"""The fast tokenizer made from a sentencepiece file: same ids, same text, special tokens and template in place."""

import json
import shutil

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from jsft.errors import ModelError
from jsft.hardware.mesh import make_mesh
from jsft.hf import tokenizer as module
from jsft.hf.load import open_parameters
from jsft.hf.tokenizer import MIXED_TEXT, add_fast_tokenizer, convert_sentencepiece, load_converted
from jsft.hf.verify import prompt_ids
from jsft.hf.write import write_model
from jsft.models import read_config

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = [
    "Let x = 12.5 and y = -3; then the answer is 42.",
    "the quick brown fox jumps over the lazy dog, twice",
    "def f(a, b):\n    return a ** b",
    "数学很有趣，我们来算 3×4＝12。",
    "  indented   text with  spaces",
    "Привет, мир",
    "the theory then gathers there, thus the other thing",
] * 40


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "dummy-prefix"])
def directory(request, tmp_path_factory):
    """As an InternLM2 directory has it: unused pieces that special tokens take over, and one beyond the vocabulary."""
    folder = tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=520,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=request.param,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        user_defined_symbols=["[UNUSED_TOKEN_1]", "[UNUSED_TOKEN_2]"],
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    original = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    unused = original.piece_to_id("[UNUSED_TOKEN_1]")
    added = {0: "<unk>", 1: "<s>", 2: "</s>", unused: "<|im_start|>", original.get_piece_size(): "<|im_end|>"}
    config = {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.X", None]},
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "chat_template": TEMPLATE,
        "added_tokens_decoder": {str(i): {"content": text, "special": True} for i, text in added.items()},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder, original, added


def test_same_ids_and_text_as_sentencepiece(directory):
    folder, original, _ = directory
    fast = convert_sentencepiece(folder)
    for text in [MIXED_TEXT, *TEXT[:7], "then there, the other\n\n\n  x", "😀" * 3, " a", "a ", ""]:
        ids = fast.encode(text, add_special_tokens=False).ids
        assert ids == original.encode(text)
        assert fast.decode(ids) == text == original.decode(ids)


def test_special_tokens_keep_their_ids(directory):
    folder, original, added = directory
    fast = convert_sentencepiece(folder)
    for i, text in added.items():
        assert fast.token_to_id(text) == i
        assert fast.encode(f"x{text}y", add_special_tokens=False).ids.count(i) == 1
    assert fast.get_vocab_size() == original.get_piece_size() + 1
    assert fast.token_to_id("[UNUSED_TOKEN_1]") is None and fast.token_to_id("[UNUSED_TOKEN_2]") is not None
    assert fast.encode("x").ids[0] == 1  # <s>


def test_chat_template_and_eos(directory):
    folder, original, added = directory
    tokenizer = load_converted(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "12"}], add_generation_prompt=True)["input_ids"]
    start, end = (next(i for i, t in added.items() if t == text) for text in ("<|im_start|>", "<|im_end|>"))
    assert ids[:2] == [1, start] and ids.count(start) == 2 and ids.count(end) == 1
    assert tokenizer.eos_token_id == 2 and tokenizer.pad_token_id == 2


def test_the_written_tokenizer_loads_without_code(directory, tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder, original, _ = directory
    copy = shutil.copytree(folder, tmp_path / "model")
    assert add_fast_tokenizer(copy) and not add_fast_tokenizer(copy)
    written = json.loads((copy / "tokenizer_config.json").read_text())
    assert "auto_map" not in written and written["chat_template"] == TEMPLATE
    for load in (AutoTokenizer, PreTrainedTokenizerFast):
        tokenizer = load.from_pretrained(copy)
        assert tokenizer.encode(MIXED_TEXT, add_special_tokens=False) == original.encode(MIXED_TEXT)
        assert tokenizer.eos_token == "</s>"


def test_an_export_has_the_tokenizer_its_base_lacks(directory, random_model, tmp_path):
    folder, original, _ = directory
    base = shutil.copytree(random_model("internlm2"), tmp_path / "base")
    (base / "tokenizer.json").unlink()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(folder / name, base / name)
    config, mesh = read_config(base), make_mesh()
    with open_parameters(base, config, mesh, None) as read:
        out = write_model(read, config, base, tmp_path / "out", "bfloat16")
    assert (out / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    assert prompt_ids(out, 1000)[1] == original.encode(MIXED_TEXT)
    assert not (base / "tokenizer.json").exists()


def test_a_conversion_that_differs_is_refused(directory, monkeypatch):
    folder, *_ = directory
    merges = module._merges
    monkeypatch.setattr(module, "_merges", lambda *args, **kwargs: merges(*args, **kwargs)[::-1])
    with pytest.raises(ModelError, match="cannot be converted: the result encodes"):
        convert_sentencepiece(folder)


def test_bad_files_are_named(directory, tmp_path):
    folder, original, _ = directory
    with pytest.raises(ModelError, match="no tokenizer: neither"):
        add_fast_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is not a"):
        convert_sentencepiece(tmp_path)
    shutil.copyfile(folder / "tokenizer.model", tmp_path / "tokenizer.model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["9999"] = {"content": "<|far|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="'<|far|>' id 9999"):
        convert_sentencepiece(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer_config.json"):
        convert_sentencepiece(tmp_path)
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    proto.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.UNIGRAM
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="not a BPE model"):
        convert_sentencepiece(tmp_path)
