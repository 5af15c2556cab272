"""The quickstart's parts: its puzzles, its model, its options and its last words. The whole is scripts/quickstart.sh."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jsft import prepare
from jsft.cli import parse
from jsft.data.chat import load_tokenizer

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "quickstart.sh"


@pytest.fixture(scope="module")
def parts():
    spec = importlib.util.spec_from_file_location("quickstart_parts", ROOT / "scripts" / "quickstart_parts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory, parts):
    """The script's data and model, with its own options."""
    folder = tmp_path_factory.mktemp("quickstart")
    text = SCRIPT.read_text(encoding="utf-8")
    puzzles = text[text.index("puzzles=(") + len("puzzles=(") :].partition(")")[0].split()
    held_out = str(folder / "eval_countdown.parquet")
    prepare.main(["countdown", "--rows", "100", "--seed", "9", *puzzles, "--out", held_out])
    out = ["--out", str(folder / "train.parquet"), "--exclude_numbers", held_out]
    prepare.main(["countdown", "--rows", "1200", "--seed", "1", *puzzles, "--repeat", *out])
    parts.write_model(folder)
    return folder


def test_held_out_puzzles_share_no_set_of_numbers_with_the_training_puzzles(folder):
    train, held_out = (pq.read_table(folder / f"{n}.parquet").to_pylist() for n in ("train", "eval_countdown"))
    sets = [{tuple(sorted(row["numbers"])) for row in rows} for rows in (train, held_out)]
    assert len(held_out) == 100 and len(sets[0]) > 200 and len(sets[1]) > 80 and not sets[0] & sets[1]


def test_documents_fit_the_rows_of_the_config(folder):
    config = parse(["--config", str(ROOT / "configs" / "quickstart.py:countdown")], lambda values: None, "")[0]
    tokenizer = load_tokenizer(folder / "base")
    rows = pq.read_table(folder / "train.parquet").to_pylist()
    for row in rows[:200]:
        prompt = tokenizer.apply_chat_template(row["message"], tokenize=False, add_generation_prompt=True)
        assert len(tokenizer.encode(prompt + row["response"])) + 1 <= config.data.max_length == config.data.pack_length
    assert config.train.epochs * (3200 // config.train.global_batch) == 300


@pytest.fixture
def run(tmp_path):
    """A finished run: held-out losses, an export, and two evaluations."""
    run = tmp_path / "run"
    (run / "hf" / "step_300").mkdir(parents=True)
    losses = [{"step": step, "eval_countdown/loss": loss} for step, loss in ((0, 6.1), (300, 0.2))]
    (run / "heldout.jsonl").write_text("".join(json.dumps(line) + "\n" for line in losses))
    question = [{"role": "user", "content": "Make 25 from the numbers 8, 17. Use each number once."}]
    for step, solved, response in ((0, 0.0, "\x00 \n"), (300, 1.0, "8 + 17 = 25: yes. \\boxed{8 + 17}")):
        folder = run / "eval" / f"step_{step}" / "countdown"
        folder.mkdir(parents=True)
        sample = {"problem": "0", "prompt": question, "response": response, "scores": {"solved": solved}}
        (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return run


def test_the_last_words_show_scores_one_puzzle_and_three_commands(parts, run):
    text = "\n".join(lines := parts.result(run.parent))
    assert "6.100 before, 0.200 after" in text and "0% before, 100% after, of 1 held-out puzzles" in text
    assert "Make 25 from the numbers 8, 17." in text and "nothing that can be read" in text
    assert "\\boxed{8 + 17}" in text and len([line for line in lines if line.startswith("    ")]) == 3
    words = [line.replace(str(run.parent), "runs/quickstart") for line in lines if not line.startswith("    ")]
    assert max(map(len, words)) <= 80


def test_without_vllm_the_package_itself_solves_the_puzzles(parts, run, folder, monkeypatch):
    """A model that has learnt is not trained here: its answers are put in."""
    rows = pq.read_table(folder / "eval_countdown.parquet").to_pylist()
    asked = []

    def answers(self, prompts, max_tokens):
        asked.append((Path(self.path).name, len(prompts)))
        return [row["response"] if Path(self.path).name == "step_300" else "" for row in rows]

    monkeypatch.setattr("jsft.api.Model.generate", answers)
    shutil.rmtree(run / "eval")
    for name in ("base", "run/hf/step_300"):
        shutil.copytree(folder / "base", run.parent / name, dirs_exist_ok=True)
    shutil.copy(folder / "eval_countdown.parquet", run.parent)
    text = "\n".join(parts.result(run.parent))
    assert "0% before, 100% after, of 100 held-out puzzles" in text and asked == [("base", 100), ("step_300", 100)]


def test_a_model_that_did_not_learn_ends_with_an_error(parts, run):
    samples = run / "eval" / "step_300" / "countdown" / "samples.jsonl"
    samples.write_text(samples.read_text().replace('"solved": 1.0', '"solved": 0.0'))
    with pytest.raises(SystemExit, match="did not learn"):
        parts.result(run.parent)


@pytest.mark.parametrize("argv", [["--seed"], ["--seed", "x"], ["--bogus"]])
def test_a_wrong_option_is_one_line(argv):
    done = subprocess.run([SCRIPT, *argv], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--seed" in done.stderr
    assert not done.stdout
