"""Right responses to each problem, out of a raw release with many responses to each."""

import math
import random
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jsft.data.chat import Chat
from jsft.data.progress import track
from jsft.data.rows import (
    answer_text,
    field,
    good_rows,
    is_utf8,
    open_listed,
    pick,
    placed_responses,
    prompt_text,
    row_columns,
    schema_of,
)
from jsft.data.sources import Source
from jsft.data.tables import check_output, write_rows
from jsft.data.thinking import ends_inside, prompt_opened, with_opening
from jsft.data.token_scores import Means, read_means
from jsft.data.verify import require_math_verify, same_answer
from jsft.errors import ConfigError, DataError

_EVERYTHING = (-math.inf, math.inf)


class Columns(NamedTuple):
    """Names of columns. answer: None where answers are not verified. logprob, entropy: numbers for each token of a
    response, read where something asks for them."""

    prompt: str = "message"
    response: str = "response"
    answer: str | None = "answer"
    logprob: str = "logprob"
    entropy: str = "entropy"


class Wanted(NamedTuple):
    """Which responses, and how many. prefer: which are taken first, a name of PREFER in jsft/prepare.py. tokens, logprob and entropy are ranges, both ends included; the last two of means
    over a response's tokens. count: tokens of a text; None: as many as the teacher's log-probabilities."""

    per_problem: int = 1
    prefer: str = "random"
    tokens: tuple[float, float] = _EVERYTHING
    logprob: tuple[float, float] = _EVERYTHING
    entropy: tuple[float, float] = _EVERYTHING
    keep_scores: bool = False  # write the chosen responses' log-probabilities and entropies too
    count: Callable[[str], int] | None = None

    def needs_length(self) -> bool:
        return self.prefer in ("short", "long") or self.tokens != _EVERYTHING

    def needs_logprob(self) -> bool:
        by_length = self.needs_length() and self.count is None
        return by_length or self.prefer in ("likely", "unlikely") or self.logprob != _EVERYTHING


class Candidate(NamedTuple):
    """A response: its row, its place among the row's responses, its text and what is known of its tokens."""

    row: int
    place: int
    text: str
    tokens: float
    logprob: float
    entropy: float


def select(
    data: str,
    out: str,
    *,
    rows: int | None = None,
    seed: int = 0,
    columns: Columns = Columns(),
    wanted: Wanted = Wanted(),
    chat: Chat | None = None,
    overwrite: bool = False,
) -> None:
    """Writes for each problem up to `wanted.per_problem` different responses, of those in the ranges of `wanted`, not
    cut inside their thinking, and found by math-verify to equal the answer; with `rows`, of that many problems drawn by
    `seed`. Order of the data.

    The prompt has opened the thinking where the template of `chat` does so, or where the responses look like it
    (`prompt_opened`); then a response without `</think>` is cut inside its thinking. The data has a row per response,
    or a row per problem with a list of responses. ConfigError when fewer than `rows` problems have a response that
    passes, DataError when none has.
    """
    if columns.answer:
        require_math_verify()
    path, source = check_output(out, overwrite=overwrite), open_listed(data)
    source.require(columns.prompt, columns.response, *([columns.answer] if columns.answer else []))
    scored = [name for name in (columns.logprob, columns.entropy) if name in source.columns]
    if wanted.keep_scores and not scored:
        source.require(columns.logprob)
    if wanted.needs_length() and wanted.count is None and columns.logprob not in scored:
        raise ConfigError(
            "--max_tokens, --min_tokens and --prefer short or long need --model, whose tokenizer counts; the data has no "
            f"column '{columns.logprob}' that would tell"
        )
    problems, opened = _problems(source, columns)
    if opened:
        print(f"{data}: the responses close thinking that their prompts opened; one without </think> counts as cut")
    logprob = read_means(source, columns.logprob) if wanted.needs_logprob() else {}
    entropy = read_means(source, columns.entropy) if wanted.entropy != _EVERYTHING else {}
    right = _Right(source, columns, wanted, chat, opened, logprob, entropy)
    chosen: list[list[Candidate]] = []
    for number, members in enumerate(track(problems, "selecting", "problems", len(problems))):
        if found := right.some(members, random.Random(f"select/{seed}/{number}")):
            chosen.append([one._replace(text="") for one in found])
    passed = len(chosen)
    if rows is not None:
        if passed < rows:
            raise ConfigError(f"--rows {rows}: only {passed} of {len(problems)} problems have a response that passes")
        keep = random.Random(f"select/{seed}").sample(range(passed), rows)
        chosen = [chosen[i] for i in sorted(keep)]
    if not chosen:
        raise DataError(f"{data}: none of {len(problems)} problems has a response that passes")
    kept = scored if wanted.keep_scores else []
    count = _write(source, path, columns, kept, [one for found in chosen for one in found])
    print(f"{path}: {count} rows; {passed} of {len(problems)} problems have a response that passes")


def _problems(source: Source, columns: Columns) -> tuple[list[list[int]], bool]:
    """Rows with the same prompt, in the order of the data; and whether the prompts opened the thinking."""
    groups: dict[str, list[int]] = {}

    def read() -> Iterator[str]:
        for row, value in good_rows(source, [columns.prompt, columns.response]):
            where = source.where(row)
            groups.setdefault(prompt_text(field(value, columns.prompt, where), where), []).append(row)
            yield from (text for _, text in placed_responses(field(value, columns.response, where), where))

    opened = prompt_opened(read())
    return list(groups.values()), opened


def _write(source: Source, path, columns: Columns, kept: list[str], chosen: list[Candidate]) -> int:
    names = [name for name in row_columns(source) if name not in kept]
    per_token = {columns.logprob, columns.entropy} - set(kept)

    def picked() -> Iterator[tuple[str, dict[str, Any]]]:
        for one in chosen:
            value, where = source.row(one.row, [*names, *kept]), source.where(one.row)
            texts, many = dict(placed_responses(value[columns.response], where)), _is_many(value[columns.response])
            found = pick(value, names) | {columns.response: texts[one.place]}
            found |= {name: value[name][one.place] if many else value[name] for name in kept}
            # JSON lines have no types by which to leave these columns out.
            yield where, {k: v for k, v in found.items() if k not in per_token or not isinstance(v, list)}

    schema = schema_of(source, [*names, *kept])
    one_each = schema is not None and str(schema.field(columns.response).type) in ("string", "large_string")
    return write_rows(picked(), path, schema if one_each else None)


def _is_many(response: Any) -> bool:
    """Whether a row's value is a list of responses, and not one conversation."""
    return isinstance(response, list) and not all(isinstance(turn, dict) for turn in response)


class _Right(NamedTuple):
    """What makes a response pass, and which of those that do are taken."""

    source: Source
    columns: Columns
    wanted: Wanted
    chat: Chat | None
    opened: bool  # the responses look as if their prompts opened the thinking
    logprob: dict[int, Means]
    entropy: dict[int, Means]

    def some(self, rows: list[int], rng: random.Random) -> list[Candidate]:
        """Up to `per_problem` candidates that pass, in the order of preference; `rng` orders equals."""
        names = [self.columns.prompt, self.columns.response, *([self.columns.answer] if self.columns.answer else [])]
        values = {row: self.source.row(row, names) for row in rows}
        prompt = self._prompt_thinking(values[rows[0]][self.columns.prompt], self.source.where(rows[0]))
        answers = {row: self._answer(values[row], self.source.where(row)) for row in rows}
        candidates = [one for row in rows for one in self._candidates(row, values[row][self.columns.response])]
        candidates = self._ordered(rng.sample(candidates, len(candidates)))
        passing = (one for one in candidates if self._passes(one, prompt, answers[one.row]))
        if self.wanted.prefer == "diverse":
            return _spread(list(passing), self.wanted.per_problem)
        taken: dict[str, Candidate] = {}
        for one in passing:
            taken.setdefault(one.text, one)
            if len(taken) == self.wanted.per_problem:
                break
        return list(taken.values())

    def _candidates(self, row: int, value: Any) -> list[Candidate]:
        where = self.source.where(row)
        places = len(value) if _is_many(value) else 1
        found = []
        for place, text in placed_responses(value, where):
            logprob, counted = self._mean(self.logprob, self.columns.logprob, row, place, places)
            entropy, _ = self._mean(self.entropy, self.columns.entropy, row, place, places)
            tokens = counted
            if self.wanted.count and not is_utf8(text):
                tokens = math.nan  # a lone surrogate has no token
            elif self.wanted.count and self.wanted.needs_length():
                tokens = self.wanted.count(text)
            found.append(Candidate(row, place, text, tokens, logprob, entropy))
        return found

    def _mean(self, means: dict[int, Means], column: str, row: int, place: int, places: int) -> tuple[float, float]:
        """(mean, tokens) of a response; zeros where the column is not read."""
        if not means:
            return 0.0, 0.0
        if len(means[row].mean) != places:
            raise DataError(
                f"{self.source.where(row)}, field '{column}': has {len(means[row].mean)} lists for {places} responses; "
                "fix or remove the row"
            )
        return float(means[row].mean[place]), float(means[row].tokens[place])

    def _ordered(self, candidates: list[Candidate]) -> list[Candidate]:
        keys: dict[str, Callable[[Candidate], float]] = {
            "short": lambda one: one.tokens,
            "long": lambda one: -one.tokens,
            "likely": lambda one: -one.logprob,
            "unlikely": lambda one: one.logprob,
        }
        key = keys.get(self.wanted.prefer)
        return sorted(candidates, key=key) if key else candidates

    def _passes(self, one: Candidate, prompt: str, answer: str | None) -> bool:
        ranges = (
            (self.wanted.tokens, one.tokens),
            (self.wanted.logprob, one.logprob),
            (self.wanted.entropy, one.entropy),
        )
        if not all(low <= value <= high for (low, high), value in ranges):  # NaN is in no range
            return False
        whole = with_opening(one.text, prompt)
        if ends_inside(whole):
            return False
        return self.columns.answer is None or (answer is not None and same_answer(whole, answer))

    def _answer(self, row: dict[str, Any], where: str) -> str | None:
        return answer_text(row.get(self.columns.answer), where) if self.columns.answer else None

    def _prompt_thinking(self, prompt: Any, where: str) -> str:
        if self.opened or self.chat is None:
            return "open" if self.opened else "none"
        return self.chat.prompt_thinking(prompt, where)


def _spread(candidates: list[Candidate], count: int) -> list[Candidate]:
    """The first candidate, then each time the one whose largest similarity (Jaccard, of sets of three words) to those
    taken is smallest; none that equals one taken."""
    sets = [_triples(one.text) for one in candidates]
    taken: list[int] = []
    nearest = [0.0] * len(candidates)
    while len(taken) < min(count, len(candidates)):
        left = [i for i in range(len(candidates)) if i not in taken]
        best = min(left, key=nearest.__getitem__)
        if taken and nearest[best] == 1.0:
            break
        taken.append(best)
        nearest = [max(near, _similarity(sets[i], sets[best])) for i, near in enumerate(nearest)]
    return [candidates[i] for i in taken]


def _triples(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[^\W_]+|[^\w\s]", text.lower())
    return set(zip(words, words[1:], words[2:])) or {tuple(words)}


def _similarity(a: set, b: set) -> float:
    return len(a & b) / len(a | b)
