r"""Reading answers out of text: `\boxed{...}`, the letter of a choice, Yes or No."""

import re

_BOX = re.compile(r"\\f?boxed\s*(\{|(?=[^\s{]))")
_LETTER_ONLY = re.compile(r"^\W*(?:\\text(?:bf|rm)?\{\s*)?\(?([A-Z])(?:\)|\}|[.:,\s]|$)")
_WRAPPED = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf)\s*\{\s*([^{}]*?)\s*\}")


def boxed(text: str) -> list[str]:
    r"""The contents of all outermost `\boxed{...}` in order; a box that never closes is none.

    Braces nest; `\{` and `\}` are LaTeX's printed braces and do not count. `\boxed5` holds one character.
    """
    found, place = [], 0
    while match := _BOX.search(text, place):
        if not match[1]:
            found.append(text[match.end()])
            place = match.end() + 1
            continue
        end = _closing(text, match.end())
        if end is None:
            place = match.end()
        else:
            found.append(text[match.end() : end].strip())
            place = end + 1
    return found


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, without boxes inside it; None where there is none."""
    found = boxed(text)
    if not found:
        return None
    inner = boxed(found[-1])
    return inner[-1] if inner else found[-1]


def choice(text: str | None, letters: str) -> str | None:
    r"""The letter that an answer such as 'C', '(C)', '\text{C}' or 'C. 42 m' names, if it is one of `letters`."""
    if text is None:
        return None
    match = _LETTER_ONLY.match(_WRAPPED.sub(r"\1", text).strip())
    return match[1] if match and match[1] in letters else None


def last_yes_no(text: str) -> str | None:
    """'yes' or 'no', whichever word stands last; None where there is neither."""
    found = re.findall(r"\b(yes|no)\b", text, re.I)
    return found[-1].lower() if found else None


def last_code_block(text: str) -> str | None:
    """The content of the last fenced code block, of one marked as Python where there is one; None without any."""
    blocks = re.findall(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)```", text, re.S)
    marked = [code for language, code in blocks if language.lower() in ("python", "python3", "py")]
    if marked:
        return marked[-1]
    return blocks[-1][1] if blocks else None


def _closing(text: str, start: int) -> int | None:
    depth = 1
    place = start
    while place < len(text):
        character = text[place]
        if character == "\\":
            place += 2
            continue
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return place
        place += 1
    return None
