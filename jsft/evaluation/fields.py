"""The fields of a benchmark's row, read by any of their names; a missing or odd one is an error of one line."""

import ast
import io
import json
import tokenize
from typing import Any

from jsft.errors import DataError


class Fields:
    """One row. Names ignore case, and a space equals an underscore: `Correct Answer` is `correct_answer`."""

    def __init__(self, task: str, index: int, row: dict[str, Any]):
        self.where = f"{task}: row {index}"
        self._columns = ", ".join(str(key) for key in row) or "none"
        self._values: dict[str, Any] = {}
        for key, value in row.items():
            if not _is_missing(value):
                self._values.setdefault(_folded(key), value)

    def has(self, *names: str) -> bool:
        """Whether all of these are there and not empty."""
        return all(_folded(name) in self._values for name in names)

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of these fields that is there, as it is."""
        return next((self._values[_folded(name)] for name in names if _folded(name) in self._values), default)

    def value(self, *names: str) -> Any:
        """The same; raises DataError where there is none."""
        if not any(self.has(name) for name in names):
            raise DataError(f"{self.where} has no '{names[0]}' (its columns: {self._columns})")
        return self.get(*names)

    def text(self, *names: str) -> str:
        """A text. Raises DataError where it is missing or of another type."""
        value = self.value(*names)
        if not isinstance(value, str):
            raise self.wrong(names[0], value, "a text")
        return value

    def scalar(self, *names: str) -> str:
        """A text or a number, as text: an answer, an id, a level."""
        value = self.value(*names)
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise self.wrong(names[0], value, "a text or a number")
        return str(value)

    def items(self, *names: str) -> list[Any]:
        """A list; also one stored as text, as in CSV. Raises DataError."""
        value = self.value(*names)
        found = parse_list(value) if isinstance(value, str) else value
        if not isinstance(found, (list, tuple)) or not found:
            raise self.wrong(names[0], value, "a list")
        return list(found)

    def integer(self, *names: str) -> int:
        """A whole number, also as text or as `4.0`."""
        value = self.value(*names)
        number = as_integer(value)
        if number is None:
            raise self.wrong(names[0], value, "a whole number")
        return number

    def wrong(self, name: str, value: Any, wanted: str) -> DataError:
        """The error about a field that is not what it must be."""
        return DataError(f"{self.where}: '{name}' is {shown(value)}; wanted {wanted}")


def shown(value: Any) -> str:
    """A value in a few words, for messages."""
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def as_integer(value: Any) -> int | None:
    """4, '4', 4.0 or '4.0' as 4; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
        return int(value) if isinstance(value, int) else int(number) if number.is_integer() else None
    except (ValueError, OverflowError):
        return None


def parse_list(text: str) -> list[Any] | None:
    """A list from its text: JSON, Python, or numpy's, which has no commas (`['a' 'b']`). None for any other text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _python_list(text)
    return value if isinstance(value, list) else None


def _python_list(text: str) -> Any:
    """Python would join two adjacent texts to one; here a comma goes between them."""
    try:
        tokens = [t for t in tokenize.generate_tokens(io.StringIO(text.strip()).readline) if t.string.strip()]
        parts: list[str] = []
        for before, token in zip([None, *tokens], tokens):
            values = (tokenize.STRING, tokenize.NUMBER)
            if before is not None and before.type in values and token.type in values:
                parts.append(",")
            parts.append(
                {"null": "None", "true": "True", "false": "False", "nan": "None"}.get(token.string, token.string)
            )
        value = ast.literal_eval(" ".join(parts))
    except (ValueError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError, TypeError):
        return None
    return list(value) if isinstance(value, tuple) else value


def _folded(name: Any) -> str:
    return "_".join(str(name).lower().split())


def _is_missing(value: Any) -> bool:
    """Nothing, an empty text, or the not-a-number that tables have for nothing."""
    return value is None or value == "" or (isinstance(value, float) and value != value)
