"""Base models with random weights for the proofs.

    python scripts/proof/models.py countdown DATA OUT [--tiny | --size qwen3_8b]
    python scripts/proof/models.py pair OUT

The first: a Qwen3 of 31 M parameters (--size: as large as another), its tokenizer learnt from DATA. The second: a very small Qwen2 and what
smollm2.py makes of one. An OUT that exists is not changed.
"""

import argparse
import json
import shutil
from pathlib import Path

from safetensors.numpy import load_file, save_file
from smollm2 import as_internlm2, as_llama
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from jsft.data.tables import read_columns
from jsft.errors import run_command
from jsft.hf.random_model import SPECIAL_TOKENS, write_random_model
from jsft.models.published import PUBLISHED

ROWS = 2000  # documents that the tokenizer is learnt from
LARGE = {
    "hidden_size": 512,
    "layers": 10,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1536,
}
QWEN3_4B = {
    "hidden_size": 2560,
    "layers": 36,
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
}
TINY = {"hidden_size": 64, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 32, "intermediate_size": 128}


def word_tokenizer(data: Path, size: int = 384) -> Tokenizer:
    """Byte-level BPE of `size` tokens, special ones included: a token for a common word, one for a digit."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size - len(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False)
    rows = read_columns(str(data), ["message", "response"])
    texts = [
        f"user\n{row['message'][0]['content']}\nassistant\n{row['response']}" for (_, row), _ in zip(rows, range(ROWS))
    ]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def published(name: str) -> dict[str, int]:
    """The sizes of a published model, its vocabulary included: most of its rows are then never used."""
    model = PUBLISHED[name]
    return {
        "hidden_size": model.hidden_size,
        "layers": model.num_layers,
        "heads": model.num_heads,
        "kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.intermediate_size,
        "vocab_size": model.vocab_size,
        "tied": model.tied_embeddings,
    }


SIZES = {"large": LARGE, "qwen3_4b": QWEN3_4B, "tiny": TINY} | {
    name: published(name) for name in ("qwen3_1_7b", "qwen3_8b", "qwen3_14b")
}


def countdown(data: Path, out: Path, sizes: dict[str, int]) -> None:
    write_random_model(out, "qwen3", max_positions=2048, rope_theta=1e4, tokenizer=word_tokenizer(data), **sizes)


def pair(out: Path) -> None:
    """Directories with the same function: a Qwen2, an InternLM2, and that as a Llama."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_random_model(partial / "qwen2", "qwen2", **TINY)
    # The other directories have files of their own; their config and weights are derived from the first one.
    write_random_model(partial / "internlm2", "internlm2", **TINY)
    shutil.copytree(partial / "qwen2", partial / "llama")
    base = (
        json.loads((partial / "qwen2/config.json").read_text()),
        load_file(partial / "qwen2/model.safetensors"),
    )
    for name, change in (("internlm2", as_internlm2), ("llama", as_llama)):
        config, tensors = change(*base)
        (partial / name / "config.json").write_text(json.dumps(config, indent=2))
        save_file(tensors, partial / name / "model.safetensors", {"format": "pt"})
    partial.rename(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    one = kinds.add_parser("countdown")
    one.add_argument("data", type=Path)
    one.add_argument("out", type=Path)
    # Of two options with one destination, argparse takes the first one's default: both leave theirs to the parser.
    one.add_argument("--tiny", dest="size", action="store_const", const="tiny")
    one.add_argument("--size", choices=SIZES)
    one.set_defaults(size="large")
    kinds.add_parser("pair").add_argument("out", type=Path)
    args = parser.parse_args()
    if args.out.exists():
        print(f"{args.out} is there already")
    elif args.kind == "pair":
        pair(args.out)
    else:
        countdown(args.data, args.out, SIZES[args.size])
    return 0


if __name__ == "__main__":
    run_command(main)
