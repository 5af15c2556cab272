"""Small inputs of the data room's tests: a byte-level tokenizer with a ChatML template, and rows."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

CHATML = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}{% endif %}"
)
WITH_DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
)


def write_tokenizer(folder: Path, template: str | None = CHATML, eos: str | None = "<|im_end|>") -> Path:
    """A model directory with only a tokenizer: 256 bytes, then the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>"}
    config |= {"eos_token": eos} if eos else {}
    config |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def rows_of(lengths, **more):
    """Rows whose responses have these many characters."""
    return [
        {
            "message": [{"role": "user", "content": f"question {i}"}],
            "response": (f"{i}:" + "abcdefgh" * (n // 8 + 1))[:n],
            "answer": str(i),
            "advantage": 1.0,
            **more,
        }
        for i, n in enumerate(lengths)
    ]


def write_rows(path: Path, rows, row_group_size: int | None = None) -> Path:
    """Parquet or JSON lines, by the name."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def cot_rows(count=12):
    ask = "What is {0} + {0}?\nPlease reason step by step and box the answer."
    return [
        {
            "message": [{"role": "user", "content": ask.format(i)}],
            "response": f"<think>\n{i} and {i}, \\boxed{{0}} no\n</think>\n\nIt is \\boxed{{{2 * i}}}.",
            "answer": str(2 * i),
            "advantage": 1.0,
        }
        for i in range(count)
    ]


def read_rows(path: str | Path) -> list[dict]:
    """Rows of a parquet or JSON-lines file."""
    return (
        pq.read_table(path).to_pylist()
        if str(path).endswith("parquet")
        else [json.loads(line) for line in Path(path).read_text().splitlines()]
    )
