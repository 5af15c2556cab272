"""The Countdown generator: every statement of a chain of thought is true, every answer right, rows reproducible."""

import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jsft.data.countdown import Difficulty, generate, identity, prompt
from jsft.data.countdown_check import check, evaluate, extract_answer
from jsft.errors import ConfigError

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
difficulties = st.builds(
    lambda low, more, number, target, span, attempts: Difficulty(
        low, low + more, number, target, target + span, attempts
    ),
    st.integers(2, 4),
    st.integers(0, 2),
    st.integers(9, 120),
    st.integers(1, 30),
    st.integers(60, 300),
    st.integers(0, 6),
)


def thinking_of(row):
    return row["response"].partition("<think>\n")[2].partition("\n</think>")[0]


@settings(max_examples=40, deadline=None)
@given(difficulties, st.integers(0, 10**6))
def test_rows_are_right_and_within_the_difficulty(difficulty, seed):
    for row in generate(3, seed, difficulty, repeat=True):
        numbers, target = row["numbers"], row["target"]
        assert difficulty.min_numbers <= len(numbers) <= difficulty.max_numbers
        assert all(1 <= number <= difficulty.max_number for number in numbers)
        assert difficulty.min_target <= target <= difficulty.max_target
        assert row["message"] == [{"role": "user", "content": prompt(numbers, target)}]
        assert row["response"].startswith("<think>\n") and row["advantage"] == 1.0
        assert extract_answer(row["response"]) == row["answer"]
        assert check(row["answer"], numbers, target)


@settings(max_examples=40, deadline=None)
@given(difficulties, st.integers(0, 10**6))
def test_every_equation_and_verdict_in_the_thinking_is_true(difficulty, seed):
    (row,) = generate(1, seed, difficulty, repeat=True)
    target, lines = row["target"], thinking_of(row).splitlines()
    for left, operation, right, result in EQUATION.findall("\n".join(lines[:-1])):
        assert evaluate(f"{left} {operation} {right}")[0] == Fraction(result)
    for line in lines:
        results = [int(result) for *_, result in EQUATION.findall(line)]
        if line.endswith(": no."):
            assert target not in results
        if line.endswith(": yes."):
            assert results[-1] == target and target not in results[:-1]
        if line.startswith("Try "):
            assert line.partition("leaving ")[2].removesuffix(".").split(", ")[-1] == str(results[0])
    assert lines[-1] == f"So {row['answer']} = {target}."


def test_dead_ends_are_explored_and_left():
    rows = list(generate(200, 1, Difficulty(attempts=6)))
    back = [thinking_of(row).count("Back to ") for row in rows]
    assert max(back) >= 5 and sum(back) > 300 and back.count(0) < 80
    for row in rows:
        tried = [line for line in thinking_of(row).splitlines() if line.startswith("Try ")]
        assert len(set(tried)) == len(tried)
    short = list(generate(200, 1, Difficulty(attempts=0)))
    assert not any("Back to " in row["response"] for row in short)


def test_seed_decides_and_a_prefix_is_a_prefix():
    rows = list(generate(30, 5, Difficulty()))
    assert rows == list(generate(30, 5, Difficulty())) and rows[:10] == list(generate(10, 5, Difficulty()))
    assert rows != list(generate(30, 6, Difficulty()))


def test_no_puzzle_twice_and_none_that_is_known():
    names = lambda rows: [identity(row["numbers"], row["target"]) for row in rows]
    easy = Difficulty(2, 3, 20, 5, 40, 1)
    train = names(generate(400, 1, easy))
    held_out = names(generate(100, 2, easy, known=train))
    assert len(set(train)) == 400 and len(set(held_out)) == 100 and not set(train) & set(held_out)
    repeated = names(generate(400, 2, easy, known=train, repeat=True))
    assert not set(train) & set(repeated)


def test_division_and_all_numbers_counts_occur():
    rows = list(generate(600, 3, Difficulty()))
    assert sum("/" in row["answer"] for row in rows) > 20
    assert {len(row["numbers"]) for row in rows} == {3, 4}
    assert not any("/" in row["answer"] for row in generate(100, 3, Difficulty(operations=("+", "-", "*"))))


def test_too_many_rows_or_impossible_options():
    with pytest.raises(ConfigError, match="of 2000 puzzles found with these options; widen"):
        list(generate(2000, 7, Difficulty(2, 2, 9, 3, 30, 0)))
    for difficulty, message in [
        (Difficulty(1, 3), "--numbers 1-3"),
        (Difficulty(4, 3), "--numbers 4-3"),
        (Difficulty(max_number=1), "--max_number must be at least 2"),
        (Difficulty(min_target=50, max_target=40), "--target a range"),
        (Difficulty(attempts=-1), "--attempts -1"),
        (Difficulty(operations=("^",)), "--operations"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(message)):
            next(generate(1, 0, difficulty))


def test_a_thousand_rows_take_under_three_seconds():
    """20,480 rows are to take under a minute."""
    import time

    began = time.process_time()
    assert len(list(generate(1000, 11, Difficulty()))) == 1000
    assert time.process_time() - began < 2.9
