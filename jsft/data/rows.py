"""Rows as data sets write them: prompts and responses in their several shapes."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

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


def responses(value: Any) -> list[str]:
    """One or several responses: a string, a list of strings, or conversations whose last turn is the
    response."""
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, dict):
        return responses(value.get("content") or "")
    if isinstance(value, list) and value:
        if all(isinstance(turn, dict) for turn in value):
            return responses(value[-1])
        return [response for one in value for response in responses(one)]
    return []


def good_rows(source: Source, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, row) of the whole source, with a progress bar; raises the DataError of a row that is
    one."""
    for row, value in track(source.rows(columns=columns), "reading", "rows", len(source)):
        if isinstance(value, DataError):
            raise value
        yield row, value


def schema_without(source: Source, column: str) -> pa.Schema | None:
    """The Arrow schema of a parquet source without `column`; None where there is none."""
    schema = source.schema()
    if schema is None or column not in schema.names:
        return schema
    return schema.remove(schema.get_field_index(column))
