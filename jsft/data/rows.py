"""Rows as data sets write them: prompts and responses in their several shapes."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from jsft.data.examples import check_keys
from jsft.data.examples import Keys, columns_to_read
from jsft.data.progress import track
from jsft.data.sources import Source
from jsft.errors import DataError


def prompt_text(value: Any) -> str:
    """The user's text of a prompt that is a string or a list of {role, content}."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        users = [turn.get("content") or "" for turn in value if turn.get("role") == "user"]
        return "\n".join(users)
    raise DataError(f"a prompt is neither a string nor a list of {{role, content}}: {str(value)[:60]!r}")


def responses(value: Any, where: str) -> list[str]:
    """One or several responses: a string, a list of strings, or conversations whose last turn is the
    response. Raises DataError naming `where` when that turn says more than its text, which would be lost."""
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, dict):
        check_keys(value, f"{where}, a response")
        content = value.get("content") or ""
        if not isinstance(content, str):
            raise DataError(
                f"{where}, a response: its content is a {type(content).__name__} where text is expected; join the "
                "texts of its parts into one"
            )
        return responses(content, where)
    if isinstance(value, list) and value:
        if all(isinstance(turn, dict) for turn in value):
            return responses(value[-1], where)
        return [response for one in value for response in responses(one, where)]
    return []


def good_rows(source: Source, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, row) of the whole source, with a progress bar; raises the DataError of a row that is
    one."""
    for row, value in track(source.rows(columns=columns), "reading", "rows", len(source)):
        if isinstance(value, DataError):
            raise value
        yield row, value


def training_columns(source: Source, keys: Keys, *, need_advantage: bool = False) -> list[str]:
    """The columns that training reads (`examples.columns_to_read`); DataError naming the file that lacks one."""
    for path, columns in source.columns_by_file():
        columns_to_read(columns, keys, where=str(path), need_advantage=need_advantage)
    return columns_to_read(source.columns, keys, where=str(source.files[0]), need_advantage=need_advantage)


def row_columns(source: Source) -> list[str]:
    """Columns that belong to a row, not to the tokens of its response (log-probabilities, entropies), which a
    new response makes wrong, and which are most of the raw release's bytes."""
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
