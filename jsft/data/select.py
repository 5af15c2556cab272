"""One right response per problem, out of a raw release with many responses to each."""

import random
from collections.abc import Callable, Iterator
from typing import Any

from jsft.data.progress import track
from jsft.data.rows import good_rows, pick, prompt_text, responses, row_columns, schema_of
from jsft.data.sources import Source, open_source, split_paths
from jsft.data.tables import check_output, write_rows
from jsft.data.verify import require_math_verify, same_answer
from jsft.errors import ConfigError, DataError


def select(
    data: str,
    out: str,
    *,
    rows: int | None = None,
    seed: int = 0,
    prompt_key: str = "message",
    response_key: str = "response",
    answer_key: str = "answer",
    verify: bool = True,
    fits: Callable[[str], bool] = lambda response: True,
    overwrite: bool = False,
) -> None:
    """Writes for each problem one response, drawn by `seed` among those that `fits` and that math-verify
    finds equal to the answer; with `rows`, that many problems drawn by `seed`. Order of the data.

    The data has a row per response, or a row per problem with a list of responses. ConfigError when fewer
    than `rows` problems have a response that passes."""
    if verify:
        require_math_verify()
    path, source = check_output(out, overwrite=overwrite), open_source(split_paths(data))
    for key in (prompt_key, response_key, *([answer_key] if verify else [])):
        if key not in source.columns:
            raise DataError(f"{data}: no column '{key}' (has {', '.join(source.columns)})")
    problems = _rows_of_problems(source, prompt_key)
    chosen: list[tuple[int, int]] = []
    for number, members in enumerate(track(problems, "selecting", "problems", len(problems))):
        rng = random.Random(f"select/{seed}/{number}")
        found = _first_right(source, members, rng, response_key, answer_key if verify else None, fits)
        if found is not None:
            chosen.append(found)
    passed = len(chosen)
    if rows is not None:
        if passed < rows:
            raise ConfigError(
                f"--rows {rows}: only {passed} of {len(problems)} problems have a response that passes"
            )
        keep = random.Random(f"select/{seed}").sample(range(passed), rows)
        chosen = [chosen[i] for i in sorted(keep)]

    columns = row_columns(source)

    def picked() -> Iterator[dict[str, Any]]:
        for row, index in chosen:
            value = pick(source.row(row, columns), columns)
            yield value | {response_key: responses(value[response_key])[index]}

    schema = schema_of(source, columns)
    one_each = schema is not None and str(schema.field(response_key).type) in ("string", "large_string")
    count = write_rows(picked(), path, schema if one_each else None)
    print(f"{path}: {count} rows; {passed} of {len(problems)} problems have a response that passes")


def _rows_of_problems(source: Source, prompt_key: str) -> list[list[int]]:
    """Rows with the same prompt, in the order of the data."""
    groups: dict[str, list[int]] = {}
    for row, value in good_rows(source, [prompt_key]):
        groups.setdefault(prompt_text(value[prompt_key]), []).append(row)
    return list(groups.values())


def _first_right(source, rows, rng, response_key, answer_key, fits) -> tuple[int, int] | None:
    """(row, index among its responses) of the first candidate, in an order drawn by `rng`, that passes."""
    columns = [response_key, *([answer_key] if answer_key else [])]
    values = {row: source.row(row, columns) for row in rows}
    candidates = [(row, i) for row in rows for i in range(len(responses(values[row][response_key])))]
    for row, index in rng.sample(candidates, len(candidates)):
        response = responses(values[row][response_key])[index]
        if fits(response) and (answer_key is None or same_answer(response, str(values[row][answer_key]))):
            return row, index
    return None
