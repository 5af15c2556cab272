"""One right response per problem, out of a raw release with many responses to each."""

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jsft.data.chat import Chat
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
    chat: Chat | None = None,
    overwrite: bool = False,
) -> None:
    """Writes for each problem one response, drawn by `seed` among those that `fits`, that are not cut inside
    their thinking and that math-verify finds equal to the answer; with `rows`, that many problems drawn by
    `seed`. Order of the data.

    The prompt has opened the thinking where the template of `chat` does so, or where the responses look like it
    (`prompt_opened`); then a response without `</think>` is cut inside its thinking. The data has a row per response,
    or a row per problem with a list of responses. ConfigError when fewer than `rows` problems have a response that
    passes, DataError when none has.
    """
    if verify:
        require_math_verify()
    path, source = check_output(out, overwrite=overwrite), open_listed(data)
    source.require(prompt_key, response_key, *([answer_key] if verify else []))
    problems, opened = _problems(source, prompt_key, response_key)
    if opened:
        print(f"{data}: the responses close thinking that their prompts opened; one without </think> counts as cut")
    right = _Right(source, prompt_key, response_key, answer_key if verify else None, fits, chat, opened)
    chosen: list[tuple[int, int]] = []
    for number, members in enumerate(track(problems, "selecting", "problems", len(problems))):
        rng = random.Random(f"select/{seed}/{number}")
        found = right.first(members, rng)
        if found is not None:
            chosen.append(found)
    passed = len(chosen)
    if rows is not None:
        if passed < rows:
            raise ConfigError(f"--rows {rows}: only {passed} of {len(problems)} problems have a response that passes")
        keep = random.Random(f"select/{seed}").sample(range(passed), rows)
        chosen = [chosen[i] for i in sorted(keep)]

    if not chosen:
        raise DataError(f"{data}: none of {len(problems)} problems has a response that passes")

    columns = row_columns(source)

    def picked() -> Iterator[tuple[str, dict[str, Any]]]:
        for row, index in chosen:
            value, where = pick(source.row(row, columns), columns), source.where(row)
            yield where, value | {response_key: responses(value[response_key], where)[index]}

    schema = schema_of(source, columns)
    one_each = schema is not None and str(schema.field(response_key).type) in ("string", "large_string")
    count = write_rows(picked(), path, schema if one_each else None)
    print(f"{path}: {count} rows; {passed} of {len(problems)} problems have a response that passes")


def _problems(source: Source, prompt_key: str, response_key: str) -> tuple[list[list[int]], bool]:
    """Rows with the same prompt, in the order of the data; and whether the prompts opened the thinking."""
    groups: dict[str, list[int]] = {}

    def read() -> Iterator[str]:
        for row, value in good_rows(source, [prompt_key, response_key]):
            where = source.where(row)
            groups.setdefault(prompt_text(field(value, prompt_key, where), where), []).append(row)
            yield from responses(field(value, response_key, where), where)

    opened = prompt_opened(read())
    return list(groups.values()), opened


class _Right(NamedTuple):
    """What makes a response pass."""

    source: Source
    prompt_key: str
    response_key: str
    answer_key: str | None  # None: answers are not verified
    fits: Callable[[str], bool]
    chat: Chat | None
    opened: bool  # the responses look as if their prompts opened the thinking

    def first(self, rows: list[int], rng: random.Random) -> tuple[int, int] | None:
        """(row, index among its responses) of the first candidate, in an order drawn by `rng`, that passes."""
        columns = [self.prompt_key, self.response_key, *([self.answer_key] if self.answer_key else [])]
        values = {row: self.source.row(row, columns) for row in rows}
        texts = {row: responses(values[row][self.response_key], self.source.where(row)) for row in rows}
        prompt = self._prompt_thinking(values[rows[0]][self.prompt_key], self.source.where(rows[0]))
        answers = {row: self._answer(values[row], self.source.where(row)) for row in rows}
        candidates = [(row, index) for row in rows for index in range(len(texts[row]))]
        for row, index in rng.sample(candidates, len(candidates)):
            whole = with_opening(texts[row][index], prompt)
            if ends_inside(whole) or not self.fits(texts[row][index]):
                continue
            if self.answer_key is None:
                return row, index
            if answers[row] is not None and same_answer(whole, answers[row]):
                return row, index
        return None

    def _answer(self, row: dict[str, Any], where: str) -> str | None:
        return answer_text(row.get(self.answer_key), where) if self.answer_key else None

    def _prompt_thinking(self, prompt: Any, where: str) -> str:
        if self.opened or self.chat is None:
            return "open" if self.opened else "none"
        return self.chat.prompt_thinking(prompt, where)
