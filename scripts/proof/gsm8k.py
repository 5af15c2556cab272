"""GSM8K as training rows: the benchmark's own prompt, the worked solution, the answer in a box.

    python scripts/proof/gsm8k.py FOLDER OUT [--heldout N] [--made ROWS]

FOLDER holds train.jsonl and test.jsonl (question, answer) of github.com/openai/grade-school-math. OUT gets
train.parquet and heldout.parquet, both cut from the training problems in a random order, and gsm8k.jsonl,
the test problems as `jsft.evaluate --data_dir OUT` reads them, in a random order too: the first N are a
random sample. --made writes ROWS made-up sums into FOLDER
first, for a trial without the data.
"""

import argparse
import json
import random
import re
from pathlib import Path

from jsft.data.tables import write_rows
from jsft.errors import DataError, run_command
from jsft.evaluation.tasks.gsm8k import Gsm8k


def row(problem: dict[str, str], index: int) -> dict:
    """A training row. The calculator's marks `<<48/2=24>>` of the data set are left out."""
    solution, mark, answer = problem["answer"].rpartition("####")
    if not mark:
        raise DataError(f"train.jsonl, row {index}: the answer has no '####'")
    solution = re.sub(r"<<[^>]*>>", "", solution).strip()
    asked = Gsm8k().problem(problem, index)
    answer = asked.gold["answer"]
    return {
        "message": asked.messages,
        "response": f"{solution}\nThe answer is \\boxed{{{answer}}}.",
        "answer": answer,
    }


def read(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        raise DataError(f"{file} is not there; take both files from github.com/openai/grade-school-math")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_lines(rows: list[dict[str, str]], file: Path) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_up(folder: Path, rows: int) -> None:
    """Sums in the format of the data set, three quarters of them to train on."""
    rng = random.Random(0)
    lines = []
    for _ in range(rows):
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        question = f"Ada has {a} apples and buys {b} more. How many apples does she have?"
        answer = f"She has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} apples.\n#### {a + b}"
        lines.append({"question": question, "answer": answer})
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", lines[: 3 * rows // 4]), ("test", lines[3 * rows // 4 :])):
        write_lines(part, folder / f"{name}.jsonl")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--heldout", type=int, default=305)
    parser.add_argument("--made", type=int, default=0)
    args = parser.parse_args()
    if args.made:
        make_up(args.folder, args.made)
    rows = [row(problem, i) for i, problem in enumerate(read(args.folder / "train.jsonl"))]
    random.Random(0).shuffle(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("heldout", rows[: args.heldout]), ("train", rows[args.heldout :])):
        write_rows(((f"{name} row {i}", row) for i, row in enumerate(part)), args.out / f"{name}.parquet")
        print(f"{args.out / name}.parquet: {len(part)} rows")
    test = read(args.folder / "test.jsonl")
    random.Random(0).shuffle(test)
    write_lines(test, args.out / "gsm8k.jsonl")
    print(f"{args.out}/gsm8k.jsonl: {len(test)} test problems")
    return 0


if __name__ == "__main__":
    run_command(main)
