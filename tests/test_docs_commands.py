"""Every command of README and docs: run in a folder that has what the page supposes, or, where it needs GPUs, a vLLM or
another machine, parsed by what it calls.

Names that a reader replaces (DATA, DIR, FILE, a published model's id) stand for a tiny model, 64 Countdown rows and a
finished run of four updates.
"""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jsft import cli, export, plan, prepare, report, train
from jsft import config as schema
from jsft.data.chat import load_tokenizer
from jsft.hf.random_model import write_random_model

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md")) + [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PROGRAM = (
    r"(?:\.venv/bin/)?(?:python -m (?:jsft|pytest)|jsft (?=[a-z]))|scripts/\w+\.\w+|touch |tail |tensorboard |vllm "
)
GPUS = ("GPU", "H200", "node")


class Command(NamedTuple):
    page: str
    section: str
    words: tuple[str, ...]


def commands(page: Path) -> list[Command]:
    """Command lines that are indented or in a bash block, and those between backticks; comments taken off."""
    found = []
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    for section in re.split(r"^(?=## )", text, flags=re.MULTILINE):
        blocks = "\n".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL))
        lines = [line[4:] for line in section.splitlines() if line.startswith("    ")] + blocks.splitlines()
        lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", section, flags=re.DOTALL))
        for line in lines:
            if match := re.match(rf"(?:[A-Z_]+=\S+ )*?((?:{PROGRAM}).*)", line):
                words = tuple(shlex.split(match[1].replace("$i", "0"), comments=True))
                if len(words) > 1 or line.startswith("    "):
                    found.append(Command(page.name, section, words))
    return list(dict.fromkeys(found))


ALL = [command for page in PAGES for command in commands(page)]
# What a reader puts in, and what the test does.
PUT_IN = {
    "DATA": "train.parquet",
    "OTHER": "other.parquet",
    "DIR": "runs/quickstart/base",
    "WORKDIR": "runs/latest",
    "Qwen/Qwen3-14B-Base": "runs/quickstart/base",
    "jasonrqh/Math-CoT-20k": "train.parquet",
    "runs/qwen3_14b-math_cot_ep8": "runs/latest",
    "runs/qwen3_4b-math_cot_ep8": "runs/latest",
    "runs/qwen3_4b-math_nocot_ep8": "runs/first",
    "640": "4",
    "20480": "64",
    "2560": "16",
    "500": "20",
    "N": "8",
    "S": "1",
    "SCORED": "scored.parquet",
    "FILE.py:RECIPE": "configs/qwen3_4b.py:math_cot_ep8",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder like a checkout after the quickstart and one run of `tiny`."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    before = os.getcwd()
    os.chdir(folder)
    try:
        write_random_model("runs/quickstart/base", hidden_size=64, heads=2, kv_heads=1, intermediate_size=128)
        puzzles = ["--numbers", "2-3", "--max_number", "9", "--target", "1-20", "--attempts", "1"]
        made = (("train", 64, 1), ("mine", 64, 1), ("jsft-data", 64, 1))
        made += (("runs/quickstart/train", 64, 1), ("runs/quickstart/eval_countdown", 20, 2))
        for name, rows, seed in made:
            out = ["--out", f"{name}.parquet", "--rows", str(rows), "--seed", str(seed)]
            assert prepare.main(["countdown", *out, *puzzles]) in (0, None)
        solved = [
            {"problem": row["message"][0]["content"], "solution": row["response"]}
            for row in pq.read_table("train.parquet").to_pylist()
        ]
        pq.write_table(pa.Table.from_pylist(solved), "other.parquet")
        tokenizer = load_tokenizer("runs/quickstart/base")
        scored = [  # numbers of a teacher, for each token
            row | dict.fromkeys(("logprob", "entropy"), [0.5] * len(tokenizer.encode(row["response"])))
            for row in pq.read_table("train.parquet").to_pylist()
        ]
        pq.write_table(pa.Table.from_pylist(scored), "scored.parquet")
        assert train.main(["--config", "configs/quickstart.py:tiny", "--workdir", "runs/first"]) == 0
    finally:
        os.chdir(before)
    return folder


def filled_in(words) -> list[str]:
    """The words without the marks of a synopsis: optional parts kept, of alternatives the first, names put in."""
    line = re.sub(r" \| [^\]]*", "", " ".join(words)).replace("[", "").replace("]", "").replace("...", "")
    named = [PUT_IN.get(word, word) for word in line.split()]
    outputs = {"FILE": "made.parquet", "FILE.parquet": "made.parquet"}
    if "jsft.report" in named:
        outputs["runs/quickstart/base"] = "made_report"  # its DIR is where it writes
    if "--png" in named:
        outputs["FILE"] = "made.png"
    if "validate" in named:
        outputs["FILE"] = "train.parquet"
    return [outputs.get(word, word) for word in named]


@cache
def help_of(module: str, verb: str = "") -> str:
    command = [sys.executable, "-m", module, *verb.split(), "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


def check_options(words, known: str) -> None:
    for word in words:
        assert not word.startswith("--") or word.partition("=")[0] in known, word


@pytest.mark.parametrize("command", ALL, ids=lambda c: f"{c.page} {' '.join(c.words)[:80]}")
def test_command(command, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    words = filled_in(command.words)
    if words[0].endswith("jsft"):  # jsft train is python -m jsft.train
        words = ("python", "-m", f"jsft.{words[1]}", *words[2:])
    program, arguments = words[0], words[1:]
    if program.startswith("scripts/"):
        script(command, program, arguments)
    elif program == "vllm":
        assert "vLLM" in command.section
    elif program in ("touch", "tail", "tensorboard"):
        target = next(Path(word) for word in arguments if word.startswith("runs/"))
        assert target.exists() or program == "touch" and target.parent.is_dir()
    elif arguments[1] == "pytest":
        assert (ROOT / "tests").is_dir()
    else:
        module(command, arguments[1], arguments[2:])
    capsys.readouterr()


def script(command: Command, program: str, arguments: list[str]) -> None:
    text = Path(program).read_text(encoding="utf-8")
    if program in ("scripts/launch_node.sh", "scripts/run_forever.sh"):
        if arguments[1:]:  # with more than --config ...
            assert any(word in command.section for word in GPUS)
            schema.resolve(cli.parse(arguments, train._define_flags, "")[0])
    else:
        check_options(arguments, text + (help_of("jsft.evaluate") if program.endswith("eval_vllm.sh") else ""))


def module(command: Command, name: str, arguments: list[str]) -> None:
    mains = {"jsft.prepare": prepare.main, "jsft.export": export.main, "jsft.report": report.main}
    if not arguments and name != "jsft.report":  # only named
        assert help_of(name)
    elif name == "jsft.evaluate" or "--push" in arguments:
        check_options(arguments, help_of(name))
    elif name in ("jsft.plan", "jsft.train") and "--help" in arguments:
        assert "data.train" in help_of(name)
    elif name == "jsft.plan" and "--compile" not in arguments:
        assert plan.main(arguments) in (0, 6)
    elif name in ("jsft.plan", "jsft.train"):
        define = plan._define_flags if name == "jsft.plan" else train._define_flags
        config, _, flags = cli.parse(arguments, define, "")
        schema.resolve(config)
        if "configs/quickstart.py:tiny" in arguments:
            assert train.main([*arguments, *([] if flags.workdir else ["--workdir", "runs/again"])]) == 0
        else:
            assert any(word in command.section for word in GPUS), "say that it needs GPUs"
    else:
        if arguments[1:] == [] and name == "jsft.prepare":  # only named
            assert help_of(name, arguments[0])
            return
        if "--out" in arguments and name == "jsft.prepare":
            Path(arguments[arguments.index("--out") + 1]).unlink(missing_ok=True)
        assert mains[name](arguments) in (0, None)


def test_every_page_with_commands_is_read():
    assert {command.page for command in ALL} >= {
        "CONTRIBUTING.md",
        "README.md",
        "data.md",
        "evaluation.md",
        "memory-and-speed.md",
        "own-run.md",
        "models.md",
        "performance.md",
        "quickstart.md",
        "real-run.md",
        "recipes.md",
        "reproduce.md",
        "resume.md",
    }
    assert len(ALL) > 50
