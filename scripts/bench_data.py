"""What the data room costs: tokenising, planning, loading.

  python scripts/bench_data.py --model DIR [--rows 512] [--threads 1 2] [--text FILE]

Documents have log-normal lengths (median 6,000 tokens, sigma 0.6), cut from the words of --text (GSM8K's
train.jsonl, say) in random order; without it, of generated Countdown solutions.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jsft.data import schedule
from jsft.data.cache import open_cache
from jsft.data.chat import Chat, load_tokenizer
from jsft.data.countdown import Difficulty, generate
from jsft.data.documents import Documents
from jsft.data.shapes import Keys
from jsft.data.sources import open_source

CHARACTERS_PER_TOKEN = 3.2
BATCH, DEVICES, LENGTH = 256, 8, 20_480


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory with a tokenizer")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, len(os.sched_getaffinity(0))])
    parser.add_argument("--text", type=Path)
    args = parser.parse_args()
    if args.rows < BATCH:
        parser.error(f"--rows {args.rows}: less than one step of {BATCH} documents")
    chat = Chat(load_tokenizer(args.model), eos_token="<|endoftext|>")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.parquet"
        write_documents(path, args.rows, args.text)
        for threads in args.threads:
            began, used = time.perf_counter(), time.process_time()
            cache = open_cache(
                open_source(path),
                chat,
                Keys(),
                cache_dir=f"{folder}/{threads}",
                threads=threads,
                say=lambda line: None,
            )
            seconds, used = time.perf_counter() - began, time.process_time() - used
            tokens = int(cache.lengths.sum())
            print(
                f"tokenise  {threads:2} threads: {tokens / seconds / 1e6:.2f} M tokens/s "
                f"({tokens:,} tokens, {seconds:.1f} s, {used:.1f} s of processor time)",
                flush=True,
            )
        measure_loading(Documents(cache, 20_000))


def measure_loading(documents: Documents) -> None:
    """Planning and assembling steps of 256 documents, on one thread."""
    from jsft.data.steps import Recipe, StepSource

    last = schedule.choose_last_lengths(documents.lengths, DEVICES, LENGTH, BATCH)
    layout = schedule.Layout(DEVICES, DEVICES, LENGTH, last)
    steps = len(documents) // BATCH
    source = StepSource(documents, Recipe(BATCH, False, 0, "reference", False, 8, 4), layout, steps)
    source[0]
    began = time.perf_counter()
    for step in range(steps):
        source.schedule(step)
    plan = (time.perf_counter() - began) / steps
    began = time.perf_counter()
    tokens = sum(source[step].tokens for step in range(steps))
    whole = (time.perf_counter() - began) / steps
    print(f"plan      {plan * 1e3:.1f} ms a step of {BATCH} documents, {plan * 640:.1f} s for 640 steps")
    print(
        f"step      {whole * 1e3:.0f} ms, planned and assembled for {DEVICES} devices on one thread: "
        f"{tokens / steps / whole / 1e6:.1f} M tokens/s"
    )


def write_documents(path: Path, rows: int, text: Path | None) -> None:
    if text:
        words = [word for line in text.read_text().splitlines() for word in json.loads(line)["answer"].split(" ")]
    else:
        words = [word for row in generate(5000, 0, Difficulty()) for word in row["response"].split(" ")]
    lengths = np.minimum(np.exp(np.random.default_rng(0).normal(np.log(6000), 0.6, rows)), 20_000)
    rng = random.Random(0)
    table = {"message": [], "response": []}
    for i, length in enumerate(lengths):
        parts, count = [], 0
        while count < length * CHARACTERS_PER_TOKEN:
            start = rng.randrange(len(words) - 50)
            parts += words[start : start + 50]
            count = sum(map(len, parts)) + len(parts) if len(parts) % 500 == 0 else count + 250
        table["message"].append([{"role": "user", "content": f"Problem {i}"}])
        table["response"].append(" ".join(parts))
    pq.write_table(pa.table(table), path, row_group_size=1000)


if __name__ == "__main__":
    main()
