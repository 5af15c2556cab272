r"""Reading answers out of text: `\boxed{...}`, the letter of a choice, Yes or No."""

import re

from jsft.evaluation import latex

# What a box without braces holds. TeX boxes one token; a number is taken whole, because nobody means its first digit.
_UNBRACED = (
    r"[-+]?\\?\$?\d+(?:(?:,|\{,\})\d{3})*(?:\.\d+)?(?![.,]?\d|\{,\}\d|[a-zA-Z^_/(]|\\(?!text|mathrm|[)\],;:%$ ]))"
    r"|\\(?:[dtc]?frac\s*\d\s*\d|sqrt\s*\d|(?:[dtc]?frac|sqrt|text[a-z]*|math[a-z]+)(?:\s*\{(?:[^{}]|\{[^{}]{0,200}\}){0,200}\})+)"
    r"|\\(?:pi|infty|emptyset|varnothing)(?![a-zA-Z])"
    r"|\((?:[a-zA-Z]|-?\d+)\)|[a-zA-Z](?=\s*(?:$|[$.,;:\\*\n]))"
)
# A box with or without braces, an escaped character, or a brace.
_TOKEN = re.compile(
    rf"\\(?:boxed|fbox)\s*\{{|\\(?:boxed|fbox)(?![a-zA-Z])(?:\s|~|\\[ ,;:])*(?P<bare>{_UNBRACED})|\\.|[{{}}]", re.S
)
_BOXED_NUMBER = re.compile(r"(\\(?:boxed|fbox)\s*\{\s*)((?:\\?\$)?)(\d{1,3}(?:(?:,|\{,\})\d{3})+|\d{3})(?!\d)")
_YES_NO = (
    re.compile(r"\b(Yes|YES|No|NO)\b(?!['\u2019-]|[ \t]+[^\W_])"),
    re.compile(r"\b(Yes|YES|No|NO)\b(?!['\u2019-])"),
    re.compile(r"\A\W*(yes|no)(?=\s*(?:[.,;:!*]|\Z))"),
    re.compile(r"(?:[:*/\n]|\bis|\banswer)\s*\W*(yes|no)\W*\Z"),
)
LONGEST_CHOICE = 1_000  # characters: a letter and the words of its option
_LABEL = re.compile(
    r"[^\w(\[]*(?:(?:the )?(?:correct |final )?(?:option|choice|answer)(?: is)?\s*:?\s*)?"
    r"(?P<open>[(\[]?)\s*(?P<letter>[A-Z])[^\S\n]*(?P<close>[)\].:]?)(?P<rest>.*)",
    re.S | re.I,
)
_SET_OFF = re.compile(r"\s*(?:[;!]*$|[(\n=\u2013\u2014,-])")  # what may follow a bare letter: never a word


def boxed(text: str) -> list[str]:
    r"""The contents of all outermost `\boxed{...}` in order; a box that never closes does not count.

    Braces nest; `\{` and `\}` are LaTeX's printed braces and do not count. `\boxed 5` and `\boxed\frac12` are boxes
    too. The text is read once, however deep the braces are nested.
    """
    found: list[tuple[int, int]] = []  # closed boxes, inner ones first
    opened: list[int] = []  # where the content of each open box starts; -1 for other braces
    for match in _TOKEN.finditer(text):
        token = match[0]
        if match["bare"]:
            found.append(match.span("bare"))
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


def separate_boxes(text: str) -> str:
    r"""The text with a thin space before boxed numbers that math-verify would join to one number.

    math-verify joins the boxes of one sentence by commas: it reads `\boxed{1}, \boxed{234}` as 1,234. With the space
    it reads the set {1, 234}, as it does for all other pairs. Text with a single box, even repeated, is unchanged.
    """
    if len(set(boxed(text))) < 2:
        return text
    return _BOXED_NUMBER.sub(lambda m: rf"{m[1]}\,{m[2]}{re.sub('[^0-9]', '', m[3])}", text)


def choice(text: str | None, letters: str) -> str | None:
    r"""The one letter of `letters` that an answer names: 'C', '(C)', '$\mathsf{C}$', 'C. 42 m', 'Option C'.

    None where it names several ('A or C', 'A. x, B. y') or is prose that begins with a letter ('I am not sure').
    """
    if text is None or len(text) > LONGEST_CHOICE:
        return None
    match = _LABEL.fullmatch(latex.plain(text))
    if match is None or match["letter"] not in letters:
        return None
    letter, closed, rest = match["letter"], match["close"], match["rest"]
    # A letter of the options that ends a phrase or stands before a mark: 'B' in ', B' but not in 'A photon'.
    other = rf"(?<![^\W_])[{letters}](?=\s*(?:$|[)\].:,;/&|+-]|and\b|or\b|[{letters}]\b))"
    if not closed:
        alone = _SET_OFF.match(rest) and not (letter == "I" and rest.lstrip().startswith(","))
        return letter if alone and not re.search(other, rest) else None
    label = rf"[(\[][{letters}]{re.escape(closed)}" if match["open"] else rf"(?<![\w(\[])[{letters}]{re.escape(closed)}"
    joined = rf"\s*(?:(?:[,;/&+|-]|and\b|or\b|to\b)\s*)+[(\[]?{other}|\s*[{letters}]\s*$"
    return None if re.search(label, rest) or re.match(joined, rest) else letter


def last_yes_no(text: str) -> str | None:
    """'yes' or 'no', whichever answer comes last; None where there is neither.

    An answer starts with a capital and no word follows it directly: 'Yes, there is no support.' is a yes, and so is
    'Yes. No document denies it.' Where there is none, a capitalised one before a word counts, then a lower-case one at
    either end of the text.
    """
    for pattern in _YES_NO:
        found = pattern.findall(text)
        if found:
            return found[-1].lower()
    return None


def only_yes_no(text: str) -> str | None:
    """HaluEval's own rule: 'yes' or 'no' where the text holds 'Yes' or 'No', but not both. Case matters."""
    yes, no = "Yes" in text, "No" in text
    return None if yes == no else "yes" if yes else "no"


def last_code_block(text: str) -> str | None:
    """The content of the last fenced code block marked as Python, else of the last block; None without a block."""
    blocks = re.findall(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)```", text, re.S)
    marked = [code for language, code in blocks if language.lower() in ("python", "python3", "py")]
    if marked:
        return marked[-1]
    return blocks[-1][1] if blocks else None
