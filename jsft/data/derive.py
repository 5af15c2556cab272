"""Data sets made from others: without thinking, a subset, or another set's solutions to the same problems."""

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from os.path import commonprefix
from typing import Any

from jsft.data.progress import track
from jsft.data.rows import (
    answer_text,
    field,
    good_rows,
    open_listed,
    pick,
    prompt_text,
    responses,
    row_columns,
    schema_of,
)
from jsft.data.sources import Source
from jsft.data.tables import check_output, write_rows
from jsft.data.thinking import ends_inside, prompt_opened, with_opening
from jsft.errors import ConfigError, DataError

EMPTY_THINKING = "<think>\n\n</think>\n\n"


def nocot(
    data: str,
    out: str,
    *,
    response_key: str = "response",
    keep_tags: bool = False,
    on_bad_row: str = "error",
    overwrite: bool = False,
) -> None:
    """Writes the rows with the thinking removed from their responses; summary and boxed answer stay.

    keep_tags: leave an empty pair of think tags in front. A row without `</think>`, or with nothing after it, is bad.
    """
    path, source = check_output(out, overwrite=overwrite), open_listed(data)
    columns, left_out = row_columns(source), 0

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        nonlocal left_out
        for row, value in track(source.rows(columns=columns), "reading", "rows", len(source)):
            where = source.where(row)
            try:
                if isinstance(value, DataError):
                    raise value
                value[response_key] = _without_thinking(field(value, response_key, where), response_key, where)
            except DataError as error:
                if on_bad_row == "error":
                    raise DataError(f"{error}; or leave such rows out with --on_bad_row=skip") from error
                left_out += 1
                continue
            value[response_key] = EMPTY_THINKING + value[response_key] if keep_tags else value[response_key]
            yield where, pick(value, columns)

    count = write_rows(rows(), path, schema_of(source, columns))
    print(f"{path}: {count} rows without thinking, {left_out} left out")


def subset(data: str, out: str, rows: int, *, seed: int | None = None, overwrite: bool = False) -> None:
    """Writes the first `rows` rows, or with `seed` a random choice of them, in the order of the data."""
    path, source = check_output(out, overwrite=overwrite), open_listed(data)
    if not 1 <= rows <= len(source):
        raise ConfigError(f"--rows {rows}: the data has {len(source)} rows")
    chosen = set(range(rows) if seed is None else random.Random(f"subset/{seed}").sample(range(len(source)), rows))

    def wanted() -> Iterator[tuple[str, dict[str, Any]]]:
        for row, value in good_rows(source):
            if row in chosen:
                yield source.where(row), value
            elif row > max(chosen):
                return

    count = write_rows(wanted(), path, schema_of(source, source.columns))
    how = "the first" if seed is None else f"chosen with seed {seed}"
    print(f"{path}: {count} of {len(source)} rows, {how}")


def match(
    data: str,
    other: str,
    out: str,
    *,
    prompt_key: str = "message",
    response_key: str = "response",
    answer_key: str = "answer",
    other_prompt_key: str = "problem",
    other_response_key: str = "solution",
    seed: int = 0,
    verify: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes the rows of `data` whose problem `other` has too, with `other`'s response in place of their own.

    Problems are compared without white space, and without the lines that all prompts of a set end with ("Please reason
    step by step ..."). A response cut inside its thinking is no solution (as in `select`). Of several responses one is
    chosen by `seed`; with `verify` one that math-verify finds equal to the row's answer.
    """
    path = check_output(out, overwrite=overwrite)
    source, theirs = open_listed(data), open_listed(other)
    source.require(prompt_key, *([answer_key] if verify else []))
    solutions = _solutions(theirs, other_prompt_key, other_response_key)
    prompts = [prompt_text(field(value, prompt_key, where), where) for where, value in _placed(source, [prompt_key])]
    problems = _problems(prompts)
    if not solutions.keys() & set(problems):
        raise DataError(f"{other}: has none of the problems of {data}; is --other_prompt_key={other_prompt_key} right?")
    columns, left_out, unanswered = row_columns(source), 0, 0

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        nonlocal left_out, unanswered
        for row, value in good_rows(source, columns):
            where = source.where(row)
            candidates = solutions.get(problems[row], [])
            candidates = random.Random(f"match/{seed}/{row}").sample(candidates, len(candidates))
            if verify:
                from jsft.data.verify import same_answer

                answer = answer_text(value.get(answer_key), where)
                unanswered += answer is None
                candidates = (one for one in candidates if answer is not None and same_answer(one, answer))
            response = next(iter(candidates), None)
            if response is None:
                left_out += 1
                continue
            yield where, pick(value, columns) | {response_key: response}

    count = write_rows(rows(), path, schema_of(source, columns) if response_key in columns else None)
    right = "right " if verify else ""
    print(f"{path}: {count} rows matched, {left_out} of {len(source)} have no {right}solution there")
    if unanswered:
        print(f"{data}: {unanswered} of these have no '{answer_key}' to verify with (null)")


def _solutions(source: Source, prompt_key: str, response_key: str) -> dict[str, list[str]]:
    """The responses of each problem of `source` that are not cut inside their thinking."""
    source.require(prompt_key, response_key)
    pairs = [
        (prompt_text(field(value, prompt_key, where), where), response)
        for where, value in _placed(source, [prompt_key, response_key])
        for response in responses(field(value, response_key, where), where)
    ]
    ending = "open" if prompt_opened(response for _, response in pairs) else "none"
    found: dict[str, list[str]] = defaultdict(list)
    for problem, (_, response) in zip(_problems([prompt for prompt, _ in pairs]), pairs):
        if not ends_inside(with_opening(response, ending)):
            found[problem].append(response)
    return found


def _placed(source: Source, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`FILE row N`, row) of the whole source."""
    return ((source.where(row), value) for row, value in good_rows(source, columns))


def _without_thinking(response: Any, field: str, where: str) -> str:
    if not isinstance(response, str):
        raise DataError(f"{where}, field '{field}': no text to remove the thinking from")
    _, tag, rest = response.rpartition("</think>")
    if not tag:
        raise DataError(f"{where}, field '{field}': has no </think>, so the thinking's end is unknown")
    if not rest.strip():
        raise DataError(f"{where}, field '{field}': has nothing after </think>")
    return rest.lstrip()


def _problems(prompts: Sequence[str]) -> list[str]:
    """Prompts without white space and without the lines that all of them end with: the set's instruction."""
    shared = commonprefix([prompt[::-1] for prompt in set(prompts)])[::-1] if len(set(prompts)) > 1 else ""
    _, newline, instruction = shared.partition("\n")
    end = len(newline + instruction)
    return [re.sub(r"\s+", "", prompt[: len(prompt) - end]) for prompt in prompts]
