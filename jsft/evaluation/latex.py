r"""LaTeX that answers are wrapped in: fonts, spacing, separators of thousands, and spellings of numbers.

`plain` reads the letter of a choice out of its wrapping. `spelled` rewrites an answer into forms that math-verify
reads; it changes no value. Both take one answer, not a whole response.
"""

import re
import unicodedata

_SANS = r"boldsymbol|bm|pmb|mathsf|mathtt|mathnormal|textsf|texttt|textsc|textsl|textup|textmd|emph|mbox|hbox"
# Commands of one argument that only choose a font. math-verify knows the first line of names, not `_SANS`.
_FONT = re.compile(
    r"\\(?:text(?:bf|it|rm|normal)?|math(?:bf|it|rm)|operatorname\*?|underline|textcolor\s*\{[^{}]*\}|"
    + _SANS
    + r")\s*\{"
)
_ANY_FONT = re.compile(r"\\(?:text(?!color)|math)[a-z]*\s*\{|" + _FONT.pattern)
_UNKNOWN_FONT = re.compile(rf"\\(?:{_SANS})\s*\{{")
_SWITCH = re.compile(
    r"\\(?:bf|bfseries|it|rm|sf|tt|boldmath|displaystyle|textstyle)(?![a-zA-Z])\s*|"
    r"\\color\s*\{[^{}]*\}"
)
_SPACE = re.compile(r"(?<!\\)\\[,;:! ]|\\(?:thinspace|enspace|space)(?![a-zA-Z])|~|[\u00a0\u2000-\u200a\u202f]")
_DOLLARS = re.compile(r"(?<!\\)\$|\\[()\[\]]")
PROSE = 2  # words; more than these are a sentence
_WORD = re.compile(r"[^\W\d_]{2,}")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_BRACE = re.compile(r"\\.|[{}]", re.S)

# A thin space, a tie or a guarded comma between groups of three digits belongs to the number. `,\,` does not: it
# separates the items of a list.
_SEPARATOR = r"(?:\{\s*(?:,|\\,|\\;|~)\s*\}(?:\\!)?\s?|,\\!\s?|\\[,;:]|\\thinspace\s?|~|[\u00a0\u2009\u202f])"
_GROUPED = re.compile(
    rf"(?<![\d.])(?:\d{{1,3}}(?:{_SEPARATOR}\d{{3}})+|\d+)(?:\.\d{{3}}(?:{_SEPARATOR}\d{{1,3}})+|\.\d+)?(?!\d)"
)
_SPACED = re.compile(r"^([-+]?\s?(?:\\?\$)?\s?)(\d{1,3}(?: \d{3})+)(?!\s*[\d/])")
_MIXED = re.compile(r"(?<![\w.^/}])(\d+)\s+([1-9]\d*)\s*/\s*(\d+)(?![\d.])")
_EXPONENT = re.compile(r"(?<![\w.\\])(\d+(?:\.\d+)?|\.\d+)[eE]([-+]?\d{1,3})(?![\w.^])")


def unwrap(text: str) -> str:
    r"""`text` without font commands: `\textbf{\text{C}}` becomes `C`. Braces nest; an unclosed command stays."""
    start = 0
    while match := _ANY_FONT.search(text, start):
        end = _closing(text, match.end())
        if end is None:
            start = match.end()
            continue
        text = text[: match.start()] + text[match.end() : end] + text[end + 1 :]
        start = match.start()
    return text


def plain(text: str) -> str:
    """A short text without fonts, dollars, spacing commands and Markdown marks, and with single spaces."""
    text = _SWITCH.sub("", unwrap(re.sub(r"\\[{}]", " ", text)))
    text = re.sub(r"\\(?:text|math)[a-z]+\s*", "", text)  # a font without braces, as in `\mathrm C`
    text = _DOLLARS.sub(" ", _SPACE.sub(" ", re.sub(r"\\(?:q?quad|left|right)(?![a-zA-Z])", " ", text)))
    text = re.sub(r"\*\*|__|`", "", text).replace("\\\\", "\n")
    text = re.sub(r"\{\s*([^{}]*?)\s*\}", r" \1 ", text)  # braces that only group, as in `{C}`
    return re.sub(r"[^\S\n]+", " ", text).strip()


def spelled(answer: str) -> str:
    r"""The same answer in a spelling that math-verify reads.

    `11 5/6` becomes `11\frac{5}{6}`, `1\,000` and `1 000` become `1000`, `1.2e3` becomes `1.2\times10^{3}`,
    `~33.` becomes `33`, `\boldsymbol{x}` becomes `x`. Anything else is unchanged.
    """
    text = _whole(_SWITCH.sub("", answer.strip()))
    text = _without_unknown_fonts(text)
    text = _GROUPED.sub(lambda match: re.sub(_SEPARATOR, "", match[0]), text)
    text = _SPACE.sub(" ", re.sub(r"\\text\s*\{\s*\}", " ", text.replace("\\!", "")))
    text = "".join(_fraction(c) for c in text).replace("·", r"\cdot ").replace("−", "-")
    text = re.sub(r"\s+", " ", text).strip().rstrip("\\ ")
    text = _without_stop(text)
    text = _SPACED.sub(lambda match: match[1] + match[2].replace(" ", ""), text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    return _EXPONENT.sub(lambda match: rf"{match[1]}\times10^{{{int(match[2])}}}", text)


def _closing(text: str, start: int) -> int | None:
    """Where the brace opened before `start` closes. Printed braces, as in LaTeX sets, do not count."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None


def _whole(text: str) -> str:
    r"""Without a font, dollars or full stop around the whole answer; words keep theirs, as `\text{east}` must."""
    while True:
        inner = text.strip()
        dollars = _DOLLARS.findall(inner)
        if len(dollars) == 2 and inner.startswith(dollars[0]) and inner.endswith(dollars[1]):
            inner = inner[len(dollars[0]) : -len(dollars[1])].strip()
        match = _FONT.match(inner)
        if match and _closing(inner, match.end()) == len(inner) - 1:
            content = inner[match.end() : -1].strip()
            if not _has_word(content) or re.match(r"[-+(\[$\\]*\d", content):
                inner = content
        inner = _without_stop(inner)
        if inner == text:
            return text
        text = inner


def _without_unknown_fonts(text: str) -> str:
    r"""Fonts that math-verify does not know: dropped around mathematics, `\text` around words."""
    start = 0
    while match := _UNKNOWN_FONT.search(text, start):
        end = _closing(text, match.end())
        start = match.end()
        if end is not None:
            content = text[match.end() : end]
            content = f"\\text{{{content}}}" if _has_word(content) else content
            text = text[: match.start()] + content + text[end + 1 :]
            start = match.start() + (len("\\text{") if _has_word(content) else 0)
    return text


def _without_stop(text: str) -> str:
    """Without one full stop or comma at the end. A sentence keeps it: without it, math-verify reads it differently."""
    ends = re.search(r"(?<!\.)(?<!\\right)[.,;:]$", text)
    return text[:-1].rstrip() if ends and len(_WORD.findall(_COMMAND.sub(" ", text))) <= PROSE else text


def _has_word(text: str) -> bool:
    return _WORD.search(_COMMAND.sub(" ", text)) is not None


def _fraction(character: str) -> str:
    """` 1/2` for the one character of it; others as they are."""
    if not character.isascii() and unicodedata.decomposition(character).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", character).replace("\u2044", "/")
    return character
