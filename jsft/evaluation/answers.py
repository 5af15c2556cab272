r"""Reading answers out of text: `\boxed{...}`, the letter of a choice, Yes or No."""

import re

# A box with braces, one before a single character, an escaped character, a brace.
_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\boxed(?=[^\sa-zA-Z{])|\\.|[{}]", re.S)
_LETTER_ONLY = re.compile(r"^\W*(?:\\text(?:bf|rm)?\{\s*)?\(?([A-Z])(?:\)|\}|[.:,\s]|$)")
_WRAPPED = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf)\s*\{\s*([^{}]*?)\s*\}")


def boxed(text: str) -> list[str]:
    r"""The contents of all outermost `\boxed{...}` in order; a box that never closes is none.

    Braces nest; `\{` and `\}` are LaTeX's printed braces and do not count. `\boxed5` holds one character. One
    pass, however the braces are nested.
    """
    found: list[tuple[int, int]] = []  # closed boxes, inner ones first
    opened: list[int] = []  # where the content of each open box starts; -1 for other braces
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token.endswith("boxed"):
            if match.end() < len(text):
                found.append((match.end(), match.end() + 1))
        elif token.endswith("{") and token[0] == "\\" and len(token) > 2:
            opened.append(match.end())
        elif token == "{":
            opened.append(-1)
        elif token == "}" and opened:
            start = opened.pop()
            if start >= 0:
                found.append((start, match.start()))
    outermost: list[str] = []
    covered = -1
    for start, end in sorted(found):
        if start > covered:
            outermost.append(text[start:end].strip())
            covered = end
    return outermost


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, without boxes inside it; None where there is none."""
    found = boxed(text)
    if not found:
        return None
    inner = boxed(found[-1])
    return inner[-1] if inner else found[-1]


def choice(text: str | None, letters: str) -> str | None:
    r"""The letter that an answer such as 'C', '(C)', '\text{C}' or 'C. 42 m' names, if it is in `letters`."""
    if text is None:
        return None
    match = _LETTER_ONLY.match(_WRAPPED.sub(r"\1", text).strip())
    return match[1] if match and match[1] in letters else None


def last_yes_no(text: str) -> str | None:
    """'yes' or 'no', whichever word stands last; None where there is neither."""
    found = re.findall(r"\b(yes|no)\b", text, re.I)
    return found[-1].lower() if found else None


def last_code_block(text: str) -> str | None:
    """The content of the last fenced code block, of one marked as Python if there is one; or None."""
    blocks = re.findall(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)```", text, re.S)
    marked = [code for language, code in blocks if language.lower() in ("python", "python3", "py")]
    if marked:
        return marked[-1]
    return blocks[-1][1] if blocks else None
