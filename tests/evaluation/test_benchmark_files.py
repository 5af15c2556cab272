"""Benchmark files as their authors and their copies ship them: names, shapes, types, and one line for what is wrong."""

import csv
import json

import pytest

from jsft.errors import DataError
from jsft.evaluation.data import Source, find_files, read_rows
from jsft.evaluation.fields import parse_list
from jsft.evaluation.tasks import get_task


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def problems(task, folder):
    task = get_task(task)
    return task.problems(task.rows(folder))


PAIRS = {
    "qa_data.json": {"knowledge": "k", "question": "q?", "right_answer": "R", "hallucinated_answer": "H"},
    "dialogue_data.json": {
        "knowledge": "k",
        "dialogue_history": "d",
        "right_response": "R",
        "hallucinated_response": "H",
    },
    "summarization_data.json": {"document": "d", "right_summary": "R", "hallucinated_summary": "H"},
}


def test_halu_evals_original_files_are_json_lines_of_pairs(tmp_path):
    for name, row in PAIRS.items():
        write(tmp_path / name, *({**row, next(iter(row)): f"text {i}"} for i in range(20)))
    general = {"ID": "1", "user_query": "List fruit.", "chatgpt_response": "Apples.", "hallucination": "no"}
    older = {"ID": "2", "user_query": "List fruit.", "chatgpt_response": "Stones.", "hallucination_label": "yes"}
    write(tmp_path / "general_data.json", general, older)
    found = problems("halueval", tmp_path)
    kinds = [p.gold["kind"] for p in found]
    assert {kind: kinds.count(kind) for kind in kinds} == {"qa": 20, "dialogue": 20, "summarization": 20, "general": 2}
    paired = [p for p in found if p.gold["kind"] != "general"]
    for p in paired:  # the statement that is shown decides the answer, and which one is shown is fixed
        assert (": H\n" in p.messages[0]["content"]) == (p.gold["answer"] == "yes")
        assert (": R\n" in p.messages[0]["content"]) == (p.gold["answer"] == "no")
    assert {p.gold["answer"] for p in paired} == {"yes", "no"} and found == problems("halueval", tmp_path)
    assert [p.gold["answer"] for p in found if p.gold["kind"] == "general"] == ["no", "yes"]


def test_truthful_qas_csv_has_capital_names_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "TruthfulQA.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream).writerows(
            [
                ["Type", "Category", "Question", "Best Answer"],
                ["Adversarial", "Law", 'Is "it", legal?', "No\nnot at all"],
            ]
        )
    task = get_task("truthfulqa")
    rows = task.rows(tmp_path)
    assert task.document(rows[0], 0) == {"question": 'Is "it", legal?'} and list(rows[0])[0] == "Type"


OPTIONS = ["gluon", "W boson", "photon", "Higgs boson"]


@pytest.mark.parametrize(
    "row, options, answer",
    [
        ({"Question": "Which?", "options": OPTIONS, "answer": 2}, OPTIONS, "C"),
        ({"question": "Which?", "choices": OPTIONS, "answer": "C"}, OPTIONS, "C"),
        ({"question": "Which?", "choices": str(OPTIONS), "answer": "photon"}, OPTIONS, "C"),
        (
            {"question": "Which?", "A": "gluon", "B": "W boson", "C": "photon", "D": "Higgs boson", "answer": "C"},
            OPTIONS,
            "C",
        ),
        ({"question": "Which?", **{f"choice{i + 1}": o for i, o in enumerate(OPTIONS)}, "answer": "(C)"}, OPTIONS, "C"),
        ({"question": "Which? A. gluon B. W C. photon D. Higgs", "answer": "C"}, [], "C"),
        (
            {"problem": "Which? A. gluon B. W C. photon D. Higgs", "solution": "\\boxed{C}", "domain": "Physics"},
            [],
            "C",
        ),
    ],
)
def test_copies_of_gpqa_keep_their_order(row, options, answer):
    document = get_task("gpqa_diamond").document(row, 0)
    assert document["options"] == options and document["answer"] == answer and document["question"].startswith("Which?")


@pytest.mark.parametrize("answer", ["E", 4, "boson", "A or B", [1]])
def test_a_copy_of_gpqa_without_a_readable_answer_is_refused(answer):
    with pytest.raises(DataError, match="gpqa_diamond: row 3: 'answer' is .*wanted a letter from A to D"):
        get_task("gpqa_diamond").document({"question": "Which?", "options": OPTIONS, "answer": answer}, 3)


def test_gpqas_original_columns_may_be_written_otherwise():
    row = {
        "Question": "Which?",
        "Correct Answer": "photon",
        "Incorrect Answer 1": "a",
        "Incorrect Answer 2": "b",
        "Incorrect Answer 3": 3.5,
        "Record ID": "rec1",
    }
    task = get_task("gpqa_diamond")
    folded = {key.lower().replace(" ", "_"): value for key, value in row.items()}
    assert task.document(row, 0) == task.document(folded, 0) and task.identity(folded, 0) == "rec1"
    assert sorted(task.document(row, 0)["options"]) == ["3.5", "a", "b", "photon"]


@pytest.mark.parametrize(
    "row",
    [
        {"target": 98, "nums": [44, 19, 35]},
        {"target": "98", "nums": "[44 19 35]"},
        {"target": 98.0, "numbers": "[44, 19, 35]"},
        {
            "prompt": [{"role": "user", "content": "in <answer>"}],
            "reward_model": {"style": "rule", "ground_truth": {"target": 98, "numbers": [44, 19, 35]}},
        },
    ],
)
def test_tiny_zeros_puzzles(row):
    problem = get_task("countdown").problem(row, 0)
    assert problem.gold == {"numbers": [44, 19, 35], "target": 98} and "boxed" in problem.messages[0]["content"]


def test_the_math_set_as_published_has_its_answer_in_the_solution_alone():
    row = {"problem": "1/2?", "level": "Level 1", "type": "Algebra", "solution": "It is $\\boxed{\\frac{1}{2}}$."}
    assert get_task("math500").problem(row, 0).gold["answer"] == "\\frac{1}{2}"


def test_hex_phis_files_have_no_header(tmp_path):
    (tmp_path / "HEx-PHI").mkdir()
    (tmp_path / "HEx-PHI" / "category_1.csv").write_text("first request\nsecond request\n")
    (tmp_path / "HEx-PHI" / "category_2.csv").write_text('"third, request"\nfourth request\n')
    requests = [p.gold["request"] for p in problems("hexphi", tmp_path)]
    assert sorted(requests) == ["first request", "fourth request", "second request", "third, request"]


@pytest.mark.parametrize(
    "task, file",
    [
        ("math500", "MATH-500.jsonl"),
        ("math500", "math500/test.jsonl"),
        ("gsm8k", "gsm8k/main/test-00000-of-00001.parquet"),
        ("aime24", "aime_2024.json"),
        ("aime25", "aime2025-II.jsonl"),
        ("mmlu_pro", "MMLU-Pro/data/test-0.parquet"),
        ("ifeval", "input_data.jsonl"),
        ("ifeval", "IFEval/ifeval_input_data.jsonl"),
        ("alpacaeval", "alpaca_eval.json"),
        ("livecodebench_v2", "livecodebench_v2/test2.jsonl"),
        ("gpqa_diamond", "GPQA-Diamond.csv"),
        ("halueval", "HaluEval/data/qa_data.json"),
        ("halueval", "HaluEval/qa_samples/data-0.parquet"),
        ("truthfulqa", "TruthfulQA.csv"),
        ("countdown", "Countdown-Tasks-3to4.parquet"),
        ("hexphi", "HEx-PHI/category_1.csv"),
    ],
)
def test_original_names_are_found(task, file, tmp_path):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    (tmp_path / "README.md").touch()
    assert find_files(tmp_path, task, get_task(task).source) == [tmp_path / file]


@pytest.mark.parametrize(
    "task, file",
    [
        ("gsm8k", "gsm8k/main/test-0.parquet"),
        ("math500", "math500/test.jsonl"),
        ("halueval", "HaluEval/data/qa_data.json"),
        ("livecodebench_v2", "livecodebench_v2/test.jsonl"),
        ("aime25", "aime25/aime2025-I.jsonl"),
    ],
)
def test_other_files_beside_the_test_rows_are_left(task, file, tmp_path):
    (tmp_path / file).parent.mkdir(parents=True)
    for name in ("train.jsonl", "validation-0.parquet", (tmp_path / file).name):
        (tmp_path / file).parent.joinpath(name).touch()
    assert find_files(tmp_path, task, get_task(task).source) == [tmp_path / file]


def test_the_tasks_own_name_goes_first(tmp_path):
    for name in ("aime_2024.jsonl", "aime24.csv", "aime24.jsonl"):
        (tmp_path / name).touch()
    assert find_files(tmp_path, "aime24", get_task("aime24").source) == [tmp_path / "aime24.jsonl"]


def test_a_folder_without_clear_test_rows_is_refused(tmp_path):
    write(tmp_path / "gsm8k" / "a.jsonl", {})
    write(tmp_path / "gsm8k" / "b.jsonl", {})
    with pytest.raises(DataError, match="gsm8k holds 2 files .* none is called test"):
        find_files(tmp_path, "gsm8k", Source())


def test_a_file_given_as_data_dir_must_have_the_tasks_name(tmp_path):
    row = {"question": "?", "answer": "#### 3"}
    assert len(problems("gsm8k", write(tmp_path / "gsm8k.jsonl", row))) == 1
    with pytest.raises(DataError) as caught:
        problems("gsm8k", write(tmp_path / "mine.jsonl", row))
    assert f"--data_dir is the file {tmp_path / 'mine.jsonl'}" in str(caught.value) and "gsm8k.jsonl" in str(
        caught.value
    )


@pytest.mark.parametrize(
    "name, text, count",
    [
        ("a.json", '{"a": 1}\n{"a": 2}\n', 2),
        ("a.jsonl", '[{"a": 1},\n {"a": 2}]', 2),
        ("a.json", '{"a": 1}', 1),
        ("a.json", '{\n  "a": 1\n}', 1),
        ("a.jsonl", '\ufeff{"a": 1}\r\n\r\n{"a": 2}', 2),
        ("a.csv", "\ufeffa\r\n1\r\n", 1),
        ("A.JSONL", '{"a": "\u2028"}\n', 1),
        ("a.csv", "a,b\n" + "x" * 200_000 + ",1\n", 1),
    ],
)
def test_json_is_read_by_its_content(name, text, count, tmp_path):
    (tmp_path / name).write_bytes(text.encode())
    rows = read_rows(tmp_path / name)
    assert len(rows) == count and all("a" in row for row in rows)


@pytest.mark.parametrize(
    "name, data, says",
    [
        ("a.json", b'{"a": 1}\n{"a": \n', "a.json, line 2: not JSON"),
        ("a.json", b"[1, 2]", "must hold a list of objects"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.json", b"", "holds no rows"),
        ("a.csv", b"a,b\n1,2,3\n", "a.csv, line 2: more fields than the 2 names of the header"),
        ("a.csv", b'a\n"x\n', "cannot be read"),
        ("a.csv", b"a\n\xff\n", "is not UTF-8"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "is not UTF-8"),
        ("a.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_one_data_error(name, data, says, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=says):
        read_rows(tmp_path / name)


@pytest.mark.parametrize(
    "text, value",
    [
        ('["a", "b"]', ["a", "b"]),
        ("['a', 'b']", ["a", "b"]),
        ("['a' 'b']", ["a", "b"]),
        ("('a', 'b')", ["a", "b"]),
        ("['it\\'s'\n \"x\"]", ["it's", "x"]),
        ("[44 19]", [44, 19]),
        ("[{'a': None, 'b': nan}]", [{"a": None, "b": None}]),
        ("a, b", None),
        ("['a' 'b' ...]", None),
        ("{'a': 1}", None),
        ("[" * 10_000, None),
        ("__import__('os')", None),
    ],
)
def test_lists_kept_as_text(text, value):
    assert parse_list(text) == value


GOOD = {
    "math500": {"problem": "?", "answer": "1", "solution": "s"},
    "aime24": {"problem": "?", "answer": 1},
    "gsm8k": {"question": "?", "answer": "#### 1"},
    "countdown": {"numbers": [1, 2], "target": 3},
    "mmlu_pro": {"question": "?", "options": ["a", "b"], "answer": "B"},
    "gpqa_diamond": {"question": "?", "options": ["a", "b", "c", "d"], "answer": "B"},
    "ifeval": {"prompt": "?", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    "alpacaeval": {"instruction": "?"},
    "halueval": {"knowledge": "k", "question": "?", "answer": "a", "hallucination": "yes"},
    "truthfulqa": {"question": "?"},
    "hexphi": {"prompt": "?"},
    "livecodebench_v2": {"question_content": "?", "public_test_cases": [{"input": "1", "output": "1"}]},
}


@pytest.mark.parametrize("odd", [{"a": 1}, [[1], {}], float("nan"), True, None, 1e400, "", b"x"], ids=repr)
@pytest.mark.parametrize("name, column", [(name, column) for name, row in GOOD.items() for column in row])
def test_a_field_of_a_wrong_type_is_one_data_error_that_names_the_row(name, column, odd):
    task = get_task(name)
    read = getattr(task, "document", task.problem)
    read(GOOD[name], 0)
    try:
        read({**GOOD[name], column: odd}, 7)
    except DataError as error:
        assert f"{name}: row 7" in str(error) and len(str(error)) < 400 and "\n" not in str(error)


def test_numbers_and_lists_of_tables_are_what_they_were():
    mmlu = get_task("mmlu_pro")
    document = mmlu.document({"question": "?", "options": "['54' '55' '56']", "answer_index": 2.0, "category": None}, 0)
    assert document == {"question": "?", "options": ["54", "55", "56"], "answer": "C", "category": "unknown"}
    row = {"prompt": "?", "instruction_id_list": "['a:b', 'c:d']", "kwargs": "[{'num_words': 300.0, 'x': None}, {}]"}
    assert get_task("ifeval").document(row, 5)["kwargs"] == [{"num_words": 300}, {}]
    with pytest.raises(DataError, match="row 5: 'kwargs' is .* wanted 2 objects"):
        get_task("ifeval").document({**row, "kwargs": "[{}]"}, 5)
    with pytest.raises(DataError, match="row 5: the answer 'C' is no letter of its 2 options"):
        mmlu.document({"question": "?", "options": ["a", "b"], "answer": "C"}, 5)
