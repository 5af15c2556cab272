"""Exact check of a Countdown answer: rational arithmetic, no floating point, no `eval`.

Standard library only and valid for Python 3.11, so that the serving environment can grade with it.
"""

import ast
import re
from collections import Counter
from fractions import Fraction

from jsft.data.thinking import final_answer

MAX_EXPRESSION = 500  # characters; keeps a runaway answer from costing time
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_LATEX = {
    r"\left": "",
    r"\right": "",
    r"\times": "*",
    r"\cdot": "*",
    r"\div": "/",
    r"\,": "",
    r"\ ": "",
    r"\!": "",
    "×": "*",
    "·": "*",
    "÷": "/",
    "−": "-",
    "–": "-",
    "[": "(",
    "]": ")",
    "{": "(",
    "}": ")",
    "$": "",
}
_ALLOWED = re.compile(r"[0-9+\-*/() \t\n]+")


def extract_answer(response: str) -> str | None:
    r"""The content of the last `\boxed{...}` after the thinking, or None.

    A response whose `<think>` is never closed has no answer; one without any thinking is searched whole.
    """
    response = final_answer(response)
    start = response.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for end in range(start, len(response)):
        depth += {"{": 1, "}": -1}.get(response[end], 0)
        if depth == 0:
            return response[start:end].strip()
    return None


def evaluate(expression: str) -> tuple[Fraction, list[int]] | None:
    r"""Value of an arithmetic expression and the integers it is made of; None when it is not one.

    Allowed: non-negative integers, + - * /, unary signs, parentheses, and the LaTeX or Unicode spellings of
    these (`\times`, `\frac{a}{b}`, `÷`, ...). Not allowed: powers, decimals, names, division by zero."""
    if len(expression) > MAX_EXPRESSION:
        return None
    previous = None
    while previous != expression:
        previous, expression = expression, _FRACTION.sub(r"((\1)/(\2))", expression)
    for written, meant in _LATEX.items():
        expression = expression.replace(written, meant)
    if not _ALLOWED.fullmatch(expression) or "**" in expression or "//" in expression:
        return None
    used: list[int] = []
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    return value, used


def check(expression: str, numbers: list[int], target: int, *, use_all: bool = True) -> bool:
    """Whether `expression` makes `target` out of `numbers`, each used exactly once (`use_all=False`: at most once).

    An answer written as an equation (`3 * 8 = 24`) is right when its right-hand side is the target too.
    """
    left, equals, right = expression.partition("=")
    if equals:
        stated = evaluate(right)
        if stated is None or stated[0] != target:
            return False
    result = evaluate(left)
    if result is None or result[0] != target:
        return False
    used, given = Counter(result[1]), Counter(int(n) for n in numbers)
    return used == given if use_all else used <= given


def _value(node: ast.AST, used: list[int]) -> Fraction:
    match node:
        case ast.Constant(value=int(number)):
            used.append(number)
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, used)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, used)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _value(left, used), _value(right, used)
            match op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.Div():
                    return a / b
    raise ValueError("not arithmetic")
