"""Countdown puzzles with worked solutions: numbers, a target, a chain of thought that searches and backtracks.

Every puzzle is made from a solution, so it has one; every stated equation is computed in exact rational arithmetic;
every final expression is checked (`countdown_check.check`) before it is written. Importing this module needs the
standard library alone: the serving environment generates its held-out puzzles with it.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import combinations
from typing import Any, NamedTuple

from jsft.data.countdown_check import check
from jsft.errors import ConfigError, DataError

OPERATIONS = ("+", "-", "*", "/")
MAX_DRAWS = 2000  # puzzles drawn for one that is new, before giving up


class Difficulty(NamedTuple):
    """What makes a puzzle hard. attempts: dead ends that the chain of thought walks into, at most."""

    min_numbers: int = 3
    max_numbers: int = 4
    max_number: int = 99
    min_target: int = 10
    max_target: int = 100
    attempts: int = 8
    operations: tuple[str, ...] = OPERATIONS

    def check(self) -> None:
        """Raises ConfigError for options that make no puzzle."""
        if not 2 <= self.min_numbers <= self.max_numbers <= 8:
            raise ConfigError(f"--numbers {self.min_numbers}-{self.max_numbers}: use 2 to 8, the smaller first")
        if self.max_number < 2 or self.min_target < 1 or self.max_target < self.min_target:
            raise ConfigError("--max_number must be at least 2, --target a range such as 10-100")
        if self.attempts < 0:
            raise ConfigError(f"--attempts {self.attempts}: must not be negative")
        if not self.operations or not set(self.operations) <= set(OPERATIONS):
            raise ConfigError(f"--operations {''.join(self.operations)}: use some of {''.join(OPERATIONS)}")


class _Term(NamedTuple):
    """A value on the table and how it was made."""

    value: Fraction
    text: str
    operator: str  # outermost; '' for a given number


def generate(
    rows: int,
    seed: int,
    difficulty: Difficulty,
    known: Iterable[tuple] = (),
    *,
    known_numbers: Iterable[tuple] = (),
    repeat: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yields `rows` rows: message, response, answer, advantage, numbers, target. Row i depends on seed and i.

    No puzzle (numbers in any order, target) comes twice or is in `known`, unless `repeat` allows repetition among the
    rows (never of `known`). No puzzle has the numbers of one in `known_numbers`, whatever its target. Raises ConfigError when the options do not give that many puzzles.
    """
    difficulty.check()
    seen, taken = set(known), {puzzle[1:] for puzzle in known_numbers}
    for index in range(rows):
        rng = random.Random(f"countdown/{seed}/{index}")
        count = rng.randint(difficulty.min_numbers, difficulty.max_numbers)
        for _ in range(MAX_DRAWS):
            puzzle = _draw(rng, count, difficulty)
            if puzzle is not None:
                name = identity(puzzle[0], puzzle[1])
                if name not in seen and name[1:] not in taken:
                    break
        else:
            raise ConfigError(
                f"only {index} of {rows} puzzles found with these options; widen --numbers, --max_number or "
                "--target, ask for fewer rows, or allow --repeat"
            )
        numbers, target, steps = puzzle
        if not repeat:
            seen.add(identity(numbers, target))
        yield _row(rng, numbers, target, steps, difficulty)


def identity(numbers: list[int], target: int) -> tuple:
    """What makes two puzzles the same."""
    return (target, *sorted(int(number) for number in numbers))


def prompt(numbers: list[int], target: int) -> str:
    """The question, as a user asks it."""
    listed = ", ".join(map(str, numbers))
    return (
        f"Make {target} from the numbers {listed}. Use each number exactly once, with +, -, *, / and "
        "parentheses. Think step by step and put the expression in \\boxed{}."
    )


def write(
    out: str,
    rows: int,
    seed: int,
    difficulty: Difficulty,
    *,
    exclude: Sequence[str] = (),
    exclude_numbers: Sequence[str] = (),
    repeat: bool = False,
    overwrite: bool = False,
) -> None:
    """Generates a data set into the file `out`, without the puzzles of the files `exclude`, and without any puzzle whose
    numbers are those of one in the files `exclude_numbers`.
    """
    from jsft.data.progress import track
    from jsft.data.tables import check_output, write_rows

    if rows < 1:
        raise ConfigError(f"--rows {rows}: must be at least 1")
    difficulty.check()
    path = check_output(out, overwrite=overwrite)
    known, known_numbers = _identities(exclude), _identities(exclude_numbers)
    puzzles = generate(rows, seed, difficulty, known, known_numbers=known_numbers, repeat=repeat)
    count = write_rows((("a puzzle", one) for one in track(puzzles, "generating", "puzzles", rows)), path)
    print(f"{path}: {count} puzzles, each solution checked")


def _identities(files: Sequence[str]) -> set[tuple]:
    """The `identity` of every puzzle in the files. Raises DataError."""
    from jsft.data.tables import read_columns

    found = set()
    for file in files:
        for where, row in read_columns(file, ["numbers", "target"]):
            try:
                found.add(identity(row["numbers"], row["target"]))
            except (TypeError, ValueError, OverflowError) as error:
                raise DataError(
                    f"{where}: 'numbers' must be a list of whole numbers and 'target' a whole number ({error})"
                ) from error
    return found


def _draw(rng: random.Random, count: int, difficulty: Difficulty):
    """Numbers, a target, and one solution as (index, index, operation) steps; None when this draw has none."""
    numbers = [rng.randint(1, difficulty.max_number) for _ in range(count)]
    terms = [Fraction(number) for number in numbers]
    steps = []
    while len(terms) > 1:
        low, high = 1, 10 * difficulty.max_target
        if len(terms) == 2:
            low, high = difficulty.min_target, difficulty.max_target
        i, j = rng.sample(range(len(terms)), 2)
        if terms[i] < terms[j] and rng.random() < 0.5:  # a difference or a quotient is more often possible
            i, j = j, i
        values = {operation: _apply(terms[i], terms[j], operation) for operation in difficulty.operations}
        possible = [
            operation
            for operation, value in values.items()
            if value is not None and value.denominator == 1 and low <= value <= high
        ]
        if not possible:
            return None
        operation = rng.choice(possible)
        steps.append((i, j, operation))
        terms = [term for k, term in enumerate(terms) if k not in (i, j)] + [values[operation]]
    return None if int(terms[0]) in numbers else (numbers, int(terms[0]), steps)


def _row(rng: random.Random, numbers: list[int], target: int, steps: list, difficulty: Difficulty) -> dict[str, Any]:
    table = [_Term(Fraction(number), str(number), "") for number in numbers]
    thought = _Thought(rng, target, difficulty)
    expression = thought.solve(table, steps)
    if not check(expression, numbers, target):
        raise AssertionError(f"{expression} does not make {target} from {numbers}")
    thinking = "\n".join([f"I have {_list(table)} and need {target}.", *thought.lines, f"So {expression} = {target}."])
    return {
        "message": [{"role": "user", "content": prompt(numbers, target)}],
        "response": f"<think>\n{thinking}\n</think>\n\n{expression} = {target}\n\n\\boxed{{{expression}}}",
        "answer": expression,
        "advantage": 1.0,
        "numbers": numbers,
        "target": target,
    }


class _Thought:
    """A search told in words: wrong moves explored and given up, then the way that works."""

    def __init__(self, rng: random.Random, target: int, difficulty: Difficulty):
        self.rng, self.target, self.operations = rng, target, difficulty.operations
        self.attempts = rng.randint(0, difficulty.attempts)
        self.lines: list[str] = []
        self.seen: set[tuple[Fraction, ...]] = set()  # tables that were explored

    def solve(self, table: list[_Term], steps: list[tuple[int, int, str]]) -> str:
        """Walks into `attempts` dead ends on the way along `steps`; the expression found first."""
        for place, step in enumerate(steps):
            if len(table) == 2:
                return self.last_two(table)
            here = self.attempts if place == len(steps) - 2 else self.rng.randint(0, self.attempts)
            self.seen.add(_values(_combine(table, step)))
            for _ in range(here):
                if not self.moves(table):
                    break
                self.attempts -= 1
                if found := self.explore(table):
                    return found
                self.lines.append(f"Back to {_list(table)}.")
            table = self.move(table, step)
        return table[0].text

    def explore(self, table: list[_Term]) -> str | None:
        """Follows moves to tables not seen yet, to the end; the expression if it happens to make the target."""
        while len(table) > 2:
            moves = self.moves(table)
            if not moves:
                self.lines.append("Nothing new from here.")
                return None
            table = self.move(table, self.rng.choice(moves))
        return self.last_two(table)

    def moves(self, table: list[_Term]) -> list[tuple[int, int, str]]:
        """Moves to a positive whole number and a table not seen yet, each sum and product in one order."""
        moves = []
        for i, j in combinations(range(len(table)), 2):
            if table[i].value < table[j].value:
                i, j = j, i
            for operation in self.operations:
                value = _apply(table[i].value, table[j].value, operation)
                if value is not None and value > 0 and value.denominator == 1:
                    if _values(_combine(table, (i, j, operation))) not in self.seen:
                        moves.append((i, j, operation))
        return moves

    def move(self, table: list[_Term], step: tuple[int, int, str]) -> list[_Term]:
        i, j, operation = step
        after = _combine(table, step)
        self.seen.add(_values(after))
        self.lines.append(
            f"Try {table[i].value} {operation} {table[j].value} = {after[-1].value}, leaving {_list(after)}."
        )
        return after

    def last_two(self, table: list[_Term]) -> str | None:
        """Tries all that two positive numbers give; what is left out is negative or not whole, so not the target."""
        tried = []
        a, b = (0, 1) if table[0].value >= table[1].value else (1, 0)
        for operation in self.operations:
            value = _apply(table[a].value, table[b].value, operation)
            if value <= 0 or value.denominator != 1:
                continue
            tried.append(f"{table[a].value} {operation} {table[b].value} = {value}")
            if value == self.target:
                self.lines.append(f"{', '.join(tried)}: yes.")
                return _combine(table, (a, b, operation))[0].text
        self.lines.append(f"{', '.join(tried) or 'Nothing whole'}: no.")
        return None


def _apply(a: Fraction, b: Fraction, operation: str) -> Fraction | None:
    match operation:
        case "+":
            return a + b
        case "-":
            return a - b
        case "*":
            return a * b
        case "/":
            return a / b if b else None


def _combine(table: list[_Term], step: tuple[int, int, str]) -> list[_Term]:
    """The table after a move: the two terms gone, their result last; parentheses only where needed."""
    i, j, operation = step
    a, b = table[i], table[j]
    left = f"({a.text})" if operation in "*/" and a.operator in ("+", "-") else a.text
    weaker = {"+": (), "-": ("+", "-"), "*": ("+", "-"), "/": OPERATIONS}[operation]
    right = f"({b.text})" if b.operator in weaker else b.text
    result = _Term(_apply(a.value, b.value, operation), f"{left} {operation} {right}", operation)
    return [term for k, term in enumerate(table) if k not in (i, j)] + [result]


def _values(table: list[_Term]) -> tuple[Fraction, ...]:
    return tuple(sorted(term.value for term in table))


def _list(table: list[_Term]) -> str:
    return ", ".join(str(term.value) for term in table)
