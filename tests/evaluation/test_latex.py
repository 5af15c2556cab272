r"""Spellings of answers: what `strict` grading of mathematics reads, and what it must not take for something else."""

import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jsft.evaluation.latex import spelled
from jsft.evaluation.tasks.math500 import Math500

SAME = [  # gold, boxed
    ("5/2", "2 1/2"),
    ("5/2", "2\\frac12"),
    ("5/2", "2\\frac{1}{2}"),
    ("5/2", "2~1/2"),
    ("5/2", "2\\,\\tfrac{1}{2}"),
    ("-5/2", "-2 1/2"),
    ("8/3", "2 2/3"),
    ("71/6", "11 5/6 \\text{ cups}"),
    ("5/2", "2½"),
    ("1/2", "½"),
    ("1000", "1\\,000"),
    ("1000", "1\\;000"),
    ("1000", "1~000"),
    ("1000", "1 000"),
    ("1000", "1{,}000"),
    ("1000", "1{\\,}000"),
    ("1000", "1,\\!000"),
    ("1000", "1\u202f000"),
    ("1000", "\\$1\\,000"),
    ("11111111100", "11,\\! 111,\\! 111,\\! 100"),
    ("1000000", "1\\,000{,}000"),
    ("12345.678", "12\\,345.678"),
    ("0.0001", "0.000\\,1"),
    ("1000", "1\\,000\\,\\text{cm}"),
    ("33", "33."),
    ("33", "33 ."),
    ("71/6", "11\\text{ }5/6"),
    ("33", "~33"),
    ("33", "$33$."),
    ("33", "\\(33\\)"),
    ("33.5", "33.5."),
    ("33", "33\\\\"),
    ("2", "2 seconds."),
    ("1200", "1.2e3"),
    ("1.2e3", "1200"),
    ("1200", "1.2E+3"),
    ("0.0012", "1.2e-3"),
    ("1200", "1.2·10^3"),
    ("5", "\\boldsymbol{5}"),
    ("5", "\\mathsf{\\bm{5}}"),
    ("5", "\\textbf{\\text{5}}"),
    ("5", "{\\bf 5}"),
    ("5", "\\text{5 cm}"),
    ("73", "\\textbf{(073)}"),
    ("1/2", "\\boldsymbol{\\dfrac{1}{2}}"),
    ("x^2", "\\mathsf{x^2}"),
    ("\\text{east}", "\\textsf{east}"),
    ("\\text{(E)}", "\\mathsf{E}"),
    ("5", "5\\text{ N}"),
    ("6", "3!"),
    ("\\{1,2\\}", "1,\\,2"),
    ("\\{1,234\\}", "1,\\,234"),
    ("(1,2)", "(1,~2)"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    ("(-\\infty,3]", "\\left(-\\infty,3\\right]"),
]
DIFFERENT = [
    ("2", "2 2/3"),
    ("10", "4 10/3"),
    ("3/2", "2 1/2"),
    ("1", "2\\frac{1}{2}"),
    ("3", "3!"),
    ("1234", "1,\\,234"),
    ("1234", "1\\quad 234"),
    ("11", "1,1"),
    ("2e3", "2e^3"),
    ("\\text{east}", "\\textsf{seat}"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}"),
]


def strict(gold: str, boxed: str) -> bool:
    return bool(Math500().grade({"answer": gold}, f"so \\boxed{{{boxed}}}").scores["strict"])


@pytest.mark.parametrize("gold, boxed", SAME)
def test_another_spelling_is_the_same_answer(gold, boxed):
    assert strict(gold, boxed)


@pytest.mark.parametrize("gold, boxed", DIFFERENT)
def test_another_answer_is_not_read_as_the_gold_one(gold, boxed):
    assert not strict(gold, boxed)


def test_plain_answers_are_left_as_they_are():
    for answer in ("5", "\\frac{5}{6}", "(-2, 2)", "x^2+2x+1", "\\sqrt{2}", "2e^3", "1,234", "10\\%", "0.5", "a_1 1/2"):
        assert spelled(answer) == answer


@given(
    st.integers(1, 10**12), st.sampled_from(["\\,", "\\;", "\\:", "~", "{,}", "{\\,}", ",\\!", " ", "\u2009", "\u202f"])
)
def test_any_separator_of_thousands(number, separator):
    assert spelled(f"{number:,}".replace(",", separator)) == str(number)


@given(st.integers(1, 10**6), st.integers(1, 98), st.integers(2, 99), st.sampled_from([" ", "~", "\\ ", "\\,", "  "]))
def test_any_mixed_number(whole, top, bottom, space):
    top = 1 + top % (bottom - 1) if bottom > 2 else 1
    assert spelled(f"{whole}{space}{top}/{bottom}") == f"{whole}\\frac{{{top}}}{{{bottom}}}"


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 200), st.integers(1, 19), st.integers(2, 20), st.booleans())
def test_a_mixed_number_is_the_sum_of_its_parts(whole, top, bottom, negative):
    top = 1 + top % (bottom - 1) if bottom > 2 else 1
    sign, value = ("-", -whole - Fraction(top, bottom)) if negative else ("", whole + Fraction(top, bottom))
    assert strict(f"{value.numerator}/{value.denominator}", f"{sign}{whole} {top}/{bottom}")
    assert not strict(str(sign + str(whole)), f"{sign}{whole} {top}/{bottom}")


@given(st.text("12 ,.~\\{}$/xbfq;:!-", max_size=40))
def test_no_digit_of_any_text_is_lost_or_moved(text):
    assert re.sub(r"\D", "", spelled(text)) == re.sub(r"\D", "", text)


@given(st.integers(-(10**9), 10**9), st.integers(-300, 300))
def test_exponents(number, power):
    assert spelled(f"{number}e{power}") == f"{number}\\times10^{{{power}}}"
