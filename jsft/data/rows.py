"""Rows as data sets write them: prompts and responses in their several shapes."""

from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa

from jsft.data.folders import Wanted
from jsft.data.progress import track
from jsft.data.shapes import Keys, Shape, recognise
from jsft.data.sources import Source, open_source, split_paths
from jsft.data.turns import check_keys, kind_of
from jsft.errors import DataError


def field(row: dict[str, Any], name: str, where: str) -> Any:
    """row[name]; DataError naming `where` for a row of JSON lines that lacks it."""
    if name not in row:
        raise DataError(f"{where}: no field '{name}' (has {', '.join(row) or 'none'})")
    return row[name]


def prompt_text(value: Any, where: str) -> str:
    """The user's text of a prompt that is a string or a list of {role, content}. Raises DataError naming `where`."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        users = [turn.get("content") for turn in value if turn.get("role") == "user"]
        for content in users:
            if content is not None and not isinstance(content, str):
                raise DataError(
                    f"{where}: the content of a prompt's turn is {kind_of(content)} where text is expected; "
                    "join the texts of its parts into one"
                )
        return "\n".join(content or "" for content in users)
    kind = kind_of(value)
    raise DataError(
        f"{where}: a prompt is {kind}, neither a string nor a list of {{role, content}}: {str(value)[:60]!r}"
    )


def answer_text(value: Any, where: str) -> str | None:
    """A reference answer as text: a string or a number; None where it is null. Raises DataError naming `where`."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise DataError(
            f"{where}: the answer is {kind_of(value)} where text or a number is expected; fix or remove the row"
        )
    return str(int(value)) if value == value and abs(value) != float("inf") and value == int(value) else str(value)


def is_utf8(text: str) -> bool:
    """Whether the text can be encoded: half of a surrogate pair cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def responses(value: Any, where: str) -> list[str]:
    """One or several responses: a string, a list of strings, or conversations whose last turn is the response. Raises
    DataError naming `where` when that turn says more than its text, which would be lost.
    """
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, dict):
        check_keys(value, f"{where}, a response")
        content = value.get("content") or ""
        if not isinstance(content, str):
            raise DataError(
                f"{where}, a response: its content is {kind_of(content)} where text is expected; join the "
                "texts of its parts into one"
            )
        return responses(content, where)
    if isinstance(value, list) and value:
        if all(isinstance(turn, dict) for turn in value):
            return responses(value[-1], where)
        return [response for one in value for response in responses(one, where)]
    if value is None or value == []:
        return []
    raise DataError(f"{where}: a response is {kind_of(value)} where text is expected; fix or remove the row")


def placed_responses(value: Any, where: str) -> list[tuple[int, str]]:
    """(place in the row's list of responses, response), blank ones left out; place 0 of a row with one response."""
    if isinstance(value, list) and not all(isinstance(turn, dict) for turn in value):
        return [(place, text) for place, one in enumerate(value) for text in responses(one, where)]
    return [(0, text) for text in responses(value, where)]


def open_listed(data: str | Sequence[str], wanted: Wanted = Wanted()) -> Source:
    """Opens a data set and prints which files are read, and which columns are not because a file lacks them."""
    source = open_source(split_paths(data), wanted)
    for line in source.listing():
        print(f"{data}: {line}")
    if lacking := source.uncommon_columns():
        print(f"{data}: left out: columns that not every file has: {', '.join(lacking)}")
    return source


def good_rows(source: Source, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, row) of the whole source, with a progress bar; raises the first DataError among the rows."""
    for row, value in track(source.rows(columns=columns), "reading", "rows", len(source)):
        if isinstance(value, DataError):
            raise value
        yield row, value


def training_shape(source: Source, keys: Keys, *, need_advantage: bool = False) -> Shape:
    """The shape of the rows. DataError where it is not clear, or naming the file that lacks a column of it."""
    (first, columns), *others = source.columns_by_file()
    shape = recognise(columns, keys, where=str(first), need_advantage=need_advantage)
    for path, there in others:
        if missing := [name for name in shape.reads(columns) if name not in there and name != shape.advantage]:
            raise DataError(
                f"{path}: no column '{missing[0]}' (has {', '.join(there) or 'none'}), which {first} has "
                f"({shape.name}); give all files of data.train the same columns, or set data.columns"
            )
    if need_advantage:
        source.require(shape.advantage)
    return shape if not shape.advantage or shape.advantage in source.columns else shape._replace(advantage=None)


def row_columns(source: Source) -> list[str]:
    """Columns that belong to a row, not to the tokens of its response.

    Per-token columns (log-probabilities, entropies) are wrong for a new response, and are most of
    the raw release's bytes.
    """
    schema = source.schema()
    per_token = {"logprob"} | {field.name for field in schema or () if _of_floats(field.type)}
    return [column for column in source.columns if column not in per_token]


def schema_of(source: Source, columns: Sequence[str]) -> pa.Schema | None:
    """The Arrow schema of these columns of a parquet source; None for JSON lines."""
    schema = source.schema()
    return None if schema is None else pa.schema([schema.field(column) for column in columns])


def pick(row: dict[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    """The row with these columns alone, as far as it has them."""
    return {column: row[column] for column in columns if column in row}


def _of_floats(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.types.is_floating(kind.value_type) or _of_floats(kind.value_type)
    return False
