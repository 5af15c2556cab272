"""A fast tokenizer from a sentencepiece file, for InternLM2 directories that have only that and Python code.

The code of the directory is not run: the pieces come from tokenizer.model, the special tokens and the chat template
from tokenizer_config.json, and the result is compared with sentencepiece itself before it is used.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from jsft.errors import ModelError

_TOKEN_FIELDS = ("bos_token", "eos_token", "unk_token", "pad_token")

# sentencepiece's kinds of pieces
_CONTROL, _USER_DEFINED = 3, 4

_SPACE = "▁"

# What the converted tokenizer must encode as sentencepiece does, and decode to itself.
MIXED_TEXT = (
    "Let x = 12.5 and y = -3; then x·y = -37.5.\n\n  Indented:\tdef f(a, b):\n        return a ** b  # comment\n"
    "Ünïcödé, naïve café — 数学很有趣，我们来算 3×4＝12。 Привет, мир! 😀🧮 ½ ≤ ∑ \\boxed{\\frac{1}{2}}\n"
    "https://example.org/a?b=c&d=e  'quoted' \"double\"   trailing spaces   "
)


def add_fast_tokenizer(model_dir: Path) -> bool:
    """Writes tokenizer.json into a directory that has only tokenizer.model, and says so in tokenizer_config.json.

    It removes `auto_map` and sets the class to PreTrainedTokenizerFast, so that no code is needed to load it. Returns
    whether anything was written. Raises ModelError when there is no tokenizer, or it cannot be converted.
    """
    if (model_dir / "tokenizer.json").is_file():
        return False
    tokenizer = convert_sentencepiece(model_dir)
    fields = _tokenizer_config(model_dir)
    fields.pop("auto_map", None)
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    fields |= {name: _content(fields[name]) for name in _TOKEN_FIELDS if name in fields}
    tokenizer.save(str(model_dir / "tokenizer.json"))
    text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    (model_dir / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return True


def load_converted(model_dir: str | Path):
    """transformers' PreTrainedTokenizerFast of a directory that has only tokenizer.model. Raises ModelError."""
    from transformers import PreTrainedTokenizerFast

    model_dir = Path(model_dir)
    fields = _tokenizer_config(model_dir)
    used = (*_TOKEN_FIELDS, "chat_template", "model_max_length")
    options = {name: _content(fields[name]) for name in used if fields.get(name) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=convert_sentencepiece(model_dir), clean_up_tokenization_spaces=False, **options
    )


def convert_sentencepiece(model_dir: Path) -> Tokenizer:
    """The tokenizers.Tokenizer that encodes as `tokenizer.model` does, checked on MIXED_TEXT. Raises ModelError."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    file = model_dir / "tokenizer.model"
    if not file.is_file():
        raise ModelError(f"{model_dir} has no tokenizer: neither tokenizer.json nor tokenizer.model")
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except (OSError, DecodeError) as error:
        raise ModelError(f"{file} is not a sentencepiece model ({error}); download it again") from error
    if proto.trainer_spec.model_type != sentencepiece_model_pb2.TrainerSpec.BPE:
        raise ModelError(f"{file} is not a BPE model; only those of InternLM2's kind are converted")
    fields = _tokenizer_config(model_dir)
    tokenizer = _assemble(proto, _special_tokens(fields, proto), fields)
    _check(tokenizer, file)
    return tokenizer


def _assemble(proto, special: dict[int, AddedToken], fields: dict[str, Any]) -> Tokenizer:
    # A special token may take the id of a piece that was reserved for it; it then replaces the piece's name too.
    names = [special[i].content if i in special else piece.piece for i, piece in enumerate(proto.pieces)]
    vocabulary = {name: i for i, name in enumerate(names)}
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges(names, [piece.score for piece in proto.pieces], vocabulary, skip=set(special)),
        unk_token=names[proto.trainer_spec.unk_id],
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )
    tokenizer = Tokenizer(model)
    prefix = proto.normalizer_spec.add_dummy_prefix
    steps = [normalizers.Replace(" ", _SPACE)]
    if prefix:
        steps.insert(0, normalizers.Prepend(_SPACE))
    if proto.normalizer_spec.precompiled_charsmap:
        steps.insert(0, normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    tokenizer.normalizer = normalizers.Sequence(steps)
    undo = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if prefix else undo)
    for i in sorted(special):
        add = tokenizer.add_special_tokens if special[i].special else tokenizer.add_tokens
        add([special[i]])
        if tokenizer.token_to_id(special[i].content) != i:
            raise ModelError(
                f"tokenizer_config.json gives token {special[i].content!r} id {i}, but the next free id is "
                f"{tokenizer.token_to_id(special[i].content)}; the file does not fit tokenizer.model"
            )
    bos = _content(fields.get("bos_token"))
    if bos and fields.get("add_bos_token", True):
        bos_id = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
        )
    return tokenizer


def _merges(names: list[str], scores: list[float], vocabulary: dict[str, int], skip: set[int]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best score first: sentencepiece merges by the score of the result."""
    found = []
    for i, name in enumerate(names):
        if i in skip:
            continue
        for cut in range(1, len(name)):
            left, right = vocabulary.get(name[:cut]), vocabulary.get(name[cut:])
            if left is not None and right is not None:
                found.append((-scores[i], left, right))
    return [(names[left], names[right]) for _, left, right in sorted(found)]


def _special_tokens(fields: dict[str, Any], proto) -> dict[int, AddedToken]:
    """Id -> token: tokenizer_config.json's added tokens, and sentencepiece's own control and user-defined pieces."""
    tokens = {
        i: AddedToken(piece.piece, special=piece.type == _CONTROL, normalized=False)
        for i, piece in enumerate(proto.pieces)
        if piece.type in (_CONTROL, _USER_DEFINED)
    }
    for key, entry in fields.get("added_tokens_decoder", {}).items():
        tokens[int(key)] = AddedToken(entry["content"], special=entry.get("special", True), normalized=False)
    return tokens


def _check(tokenizer: Tokenizer, file: Path) -> None:
    import sentencepiece

    original = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for text in (MIXED_TEXT, *MIXED_TEXT.splitlines()):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if ids != original.encode(text):
            raise ModelError(f"{file} cannot be converted: the result encodes {text[:40]!r} differently")
        if tokenizer.decode(ids) != original.decode(ids):
            raise ModelError(f"{file} cannot be converted: the result decodes {text[:40]!r} differently")


def _tokenizer_config(model_dir: Path) -> dict[str, Any]:
    file = model_dir / "tokenizer_config.json"
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{model_dir} has no tokenizer_config.json beside tokenizer.model; download it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{file} holds a {type(fields).__name__}, not an object; download it again")
    return fields


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token
