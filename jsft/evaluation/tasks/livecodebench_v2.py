"""LiveCodeBench v2: 511 programming problems; the last Python block runs against the tests in a sandbox; mean of 3.

A problem reads standard input and prints, or completes a function of `class Solution`. The sandboxed program
sees only a test's input; its output is compared outside.
"""

import base64
import io
import json
import pickle
import sys
import zlib
from decimal import Decimal, InvalidOperation
from typing import Any

from jsft.errors import DataError
from jsft.evaluation import answers, contest_program, sandbox, thinking
from jsft.evaluation.data import Source
from jsft.evaluation.fields import Fields
from jsft.evaluation.sampling import Sampling
from jsft.evaluation.tasks.base import OUT_OF_DOMAIN, Grade, Problem, Task

INSTRUCTION = (
    "You are an expert Python programmer. You will be given a programming problem; write a correct Python program that "
    "matches its specification and passes all tests.\n\n"
)
WITH_STDIN = (
    "{question}\n\nRead the input from standard input and print the result. "
    "Put the whole program into one fenced block:\n```python\n# your code\n```"
)
WITH_FUNCTION = (
    "{question}\n\nComplete this starter code and put the whole program into one fenced block:\n"
    "```python\n{starter}\n```"
)
SECONDS = 6.0  # per test, as in the reference
NOTES = {"timeout": "too slow", "flood": "printed too much", "memory": "used too much memory"}
# What malformed tests of a row raise.
UNREADABLE = (
    ValueError,
    TypeError,
    AttributeError,
    RecursionError,
    zlib.error,
    pickle.UnpicklingError,
    EOFError,
)


class LiveCodeBenchV2(Task):
    name, title, group = "livecodebench_v2", "LiveCodeBench v2", OUT_OF_DOMAIN
    version = 2
    source = Source(
        "livecodebench/code_generation_lite",
        ("test.jsonl", "test2.jsonl"),  # release_v2 is the first two files
        ("question_content", "public_test_cases", "private_test_cases"),
    )
    sampling = Sampling(temperature=0.6, top_p=0.95, max_tokens=32768)
    samples = 3
    metrics = {
        "solved": "the last Python block after the thinking passes all tests",
        "reference": "the last Python block anywhere, thinking included, passes all tests",
        "has_code": "there is a code block after the thinking",
    }
    primary = "solved"
    breakdown = "difficulty"
    grade_seconds = 900.0

    def requirement(self) -> str | None:
        missing = sandbox.why_not()
        if missing is None:
            for weakness in sandbox.weaknesses():
                _note(weakness)
        return missing

    def problems(self, rows: list[dict[str, Any]]) -> list[Problem]:
        problems = super().problems(rows)
        public_only = sum(not p.gold["private"] for p in problems)
        if public_only:
            _note(
                f"{public_only} of {len(rows)} problems have no private tests (column private_test_cases): "
                "a program that passes the few public ones counts as solved"
            )
        return problems

    def problem(self, row: dict[str, Any], index: int) -> Problem:
        fields = Fields(self.name, index, row)
        fields.value("public_test_cases")
        starter = fields.text("starter_code") if fields.has("starter_code") else ""
        template = WITH_FUNCTION if starter else WITH_STDIN
        text = INSTRUCTION + template.format(question=fields.text("question_content"), starter=starter)
        name = str(row.get("question_id") or index)
        try:
            public = decode_tests(row["public_test_cases"])
            private = decode_tests(row.get("private_test_cases") or [])
            metadata = row.get("metadata") or {}
            function = (json.loads(metadata) if isinstance(metadata, str) else metadata).get("func_name")
        except UNREADABLE as error:
            raise DataError(f"{fields.where}: the tests of problem {name} cannot be read: {error}") from error
        if not public and not private:
            raise DataError(
                f"livecodebench_v2: row {index} (problem {name}) has no tests, so any program would pass; "
                "put them into public_test_cases or private_test_cases, or leave the row out"
            )
        gold = {
            "tests": public + private,
            "private": len(private),
            "function": function,
            "difficulty": str(fields.get("difficulty", default="unknown")),
        }
        return Problem(name, [{"role": "user", "content": text}], gold)

    def shown_gold(self, gold: dict[str, Any]) -> dict[str, Any]:
        return {**gold, "tests": len(gold["tests"])}  # they are megabytes

    def grade(self, gold: dict[str, Any], response: str) -> Grade:
        final = answers.last_code_block(thinking.final_answer(response))
        anywhere = answers.last_code_block(response)
        solved, note = passes(final, gold) if final else (False, None)
        reference = solved if anywhere == final else bool(anywhere) and passes(anywhere, gold)[0]
        scores = {
            "solved": float(solved),
            "reference": float(reference),
            "has_code": float(final is not None),
        }
        return Grade(scores, None, note)


def passes(code: str, gold: dict[str, Any]) -> tuple[bool, str | None]:
    """Whether a program passes all tests; else how the first failing one ended, in a word."""
    source = contest_program.source(code, gold["function"])
    for test in gold["tests"]:
        finished = sandbox.run(
            source, test["input"].encode(errors="surrogatepass"), sandbox.Limits(seconds=SECONDS, memory_mb=4096)
        )
        if finished.state == "broken":
            raise RuntimeError(finished.stderr.strip() or "the sandbox could not be built")
        if finished.state != "ok":
            return False, NOTES.get(finished.state, "crashed")
        shown = finished.stdout.decode("utf-8", "replace")
        if gold["function"]:
            right = same_value(shown, test["output"])
        else:
            right = same_output(shown, test["output"])
        if not right:
            return False, "wrong output"
    return True, None


def same_value(shown: str, expected: str) -> bool:
    """Whether two JSON texts hold the same value."""
    try:
        return json.loads(shown) == json.loads(expected)
    except (ValueError, RecursionError):  # a program may print anything
        return False


def same_output(shown: str, expected: str) -> bool:
    """Whether two outputs agree line by line: as text, or as numbers."""
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (shown, expected))
    return len(ours) == len(theirs) and all(
        a == b or _same_numbers(a.split(), b.split()) for a, b in zip(ours, theirs, strict=True)
    )


def _same_numbers(ours: list[str], theirs: list[str]) -> bool:
    try:
        return len(ours) == len(theirs) and [Decimal(x) for x in ours] == [Decimal(x) for x in theirs]
    except InvalidOperation:
        return False


def decode_tests(tests: str | list) -> list[dict[str, str]]:
    """Tests of a row: a list, or JSON, or JSON in a pickle in zlib in base64, as the private ones are shipped.

    Raises ValueError for anything else, and what zlib and pickle raise.
    """
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except ValueError:
            data = zlib.decompress(base64.b64decode(tests))
            tests = json.loads(_PlainUnpickler(io.BytesIO(data)).load())
    pairs = [(t.get("input"), t.get("output")) if isinstance(t, dict) else (None, None) for t in tests]
    if not isinstance(tests, list) or not all(isinstance(text, str) for pair in pairs for text in pair):
        raise ValueError("a test is an object with the texts 'input' and 'output'")
    return [{"input": given, "output": wanted} for given, wanted in pairs]


class _PlainUnpickler(pickle.Unpickler):
    """Reads plain values only: a pickle that names a class or function is refused."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"the pickle names {module}.{name}; only text is expected")


def _note(text: str) -> None:
    print(f"note: livecodebench_v2: {text}", file=sys.stderr, flush=True)
