"""What scripts/quickstart.sh does in Python: the model, and the result in words.

quickstart_parts.py model DIR    writes DIR/base for the puzzles in DIR/train.parquet
quickstart_parts.py result DIR   reads DIR/run; exit code 1 where nothing was learnt
"""

import json
import sys
from pathlib import Path

TASK = "countdown"
WANTED = 0.6  # of the held-out puzzles
MAX_TOKENS = 96  # of a response


def write_model(folder: Path) -> None:
    """A Qwen3 of 0.2 M random weights in `folder`/base."""
    import pyarrow.parquet as pq

    from jsft.hf.random_model import word_tokenizer, write_random_model

    rows = pq.read_table(folder / "train.parquet").to_pylist()
    texts = [text for row in rows for text in (row["message"][0]["content"], row["response"], "user\nassistant\n")]
    write_random_model(
        folder / "base",
        "qwen3",
        hidden_size=96,
        layers=2,
        heads=3,
        kv_heads=1,
        head_dim=32,
        intermediate_size=256,
        max_positions=1024,
        tokenizer=word_tokenizer(texts, 448),
    )


def result(folder: Path) -> list[str]:
    """Losses, scores and one puzzle before and after, and what to try next. Raises SystemExit where nothing was learnt."""
    run = folder / "run"
    losses = [json.loads(line)["eval_countdown/loss"] for line in (run / "heldout.jsonl").read_text().splitlines()]
    step = max(int(path.name[5:]) for path in (run / "hf").glob("step_*"))
    before, after = (
        (_graded(run, 0) or _answers(folder, folder / "base")),
        (_graded(run, step) or _answers(folder, run / "hf" / f"step_{step}")),
    )
    share = [sum(one["scores"]["solved"] for one in samples.values()) / len(samples) for samples in (before, after)]
    lines = [
        f"held-out loss   {losses[0]:.3f} before, {losses[-1]:.3f} after",
        f"solved          {share[0]:.0%} before, {share[1]:.0%} after, of {len(after)} held-out puzzles",
        *_one_puzzle(before, after),
        f"trained model   {run}/hf/step_{step} (Hugging Face safetensors)",
        f"the run         {run}/README.md says what its files are",
        "",
        "try next:",
        f"    .venv/bin/python -m jsft.report {run}",
        f"    .venv/bin/python -m jsft.prepare preview {folder}/train.parquet --model {folder}/base --rows 3",
        "    .venv/bin/python -m jsft.plan --config configs/qwen3_14b.py:math_cot_ep8 --devices 8 --price 4",
    ]
    if losses[-1] >= losses[0] or share[1] < WANTED:
        raise SystemExit("\n".join([*lines, "quickstart: the model did not learn the puzzles; please report this"]))
    return lines


def _graded(run: Path, step: int) -> dict[str, dict]:
    """The samples by problem that vLLM drew, graded; {} without an evaluation of this step."""
    file = run / "eval" / f"step_{step}" / TASK / "samples.jsonl"
    if not file.exists():
        return {}
    return {str(entry["problem"]): entry for entry in map(json.loads, file.read_text(encoding="utf-8").splitlines())}


def _answers(folder: Path, model_dir: Path) -> dict[str, dict]:
    """The same from jsft itself, where vLLM was left out."""
    import pyarrow.parquet as pq

    import jsft
    from jsft.data.countdown_check import check, extract_answer

    rows = pq.read_table(folder / f"eval_{TASK}.parquet").to_pylist()
    model = jsft.load_model(str(model_dir), compute_dtype="float32")
    found = {}
    for i, response in enumerate(model.generate([row["message"] for row in rows], max_tokens=MAX_TOKENS)):
        row, answer = rows[i], extract_answer(response)
        solved = answer is not None and check(answer, row["numbers"], row["target"])
        sample = {"prompt": row["message"], "response": response, "scores": {"solved": float(solved)}}
        found[str(i)] = sample
    return found


def _one_puzzle(before: dict[str, dict], after: dict[str, dict]) -> list[str]:
    """A puzzle that only the trained model solves, with both answers."""
    for problem, sample in after.items():
        if sample["scores"]["solved"] and not before[problem]["scores"]["solved"]:
            answers = [_short(samples[problem]) for samples in (before, after)]
            return [
                f"a puzzle        {_question(sample)}",
                f"  before        {answers[0]}",
                f"  after         {answers[1]}",
            ]
    return []


def _question(sample: dict) -> str:
    return " ".join(sample["prompt"][-1]["content"].split()).split(" Use each")[0]


def _short(sample: dict, width: int = 60) -> str:
    """The end of a response, where its answer is, in one printable line."""
    line = " ".join("".join(c if c.isprintable() else " " for c in sample["response"]).split())
    if not line:
        return "nothing that can be read"
    return line if len(line) <= width else f"... {line[-width:]}"


if __name__ == "__main__":
    command, where = sys.argv[1], Path(sys.argv[2])
    if command == "model":
        write_model(where)
    else:
        print("\n".join(result(where)))
