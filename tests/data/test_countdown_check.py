"""The Countdown grader: exact, strict about the numbers, safe on anything a model may write."""

import pytest

from jsft.data.countdown_check import check, evaluate, extract_answer


@pytest.mark.parametrize(
    "expression, numbers, target, right",
    [
        ("(1 + 2) * 8", [1, 2, 8], 24, True),
        ("8*(2+1)", [8, 1, 2], 24, True),
        ("8 / (3 - 8 / 3)", [3, 3, 8, 8], 24, True),  # only exact arithmetic says so
        (r"\frac{8}{3 - \frac{8}{3}}", [3, 3, 8, 8], 24, True),
        (r"\left(1 + 2\right) \times 8", [1, 2, 8], 24, True),
        ("(1 + 2) × 8 = 24", [1, 2, 8], 24, True),
        ("(1 + 2) * 8 = 25", [1, 2, 8], 24, False),
        ("3 * 8", [1, 2, 8], 24, False),  # 3 is not given
        ("24", [1, 2, 8], 24, False),
        ("8 * 3", [3, 8, 8], 24, False),  # one 8 is left over
        ("1 + 2 * 8", [1, 2, 8], 24, False),
        ("8 / (1 - 1)", [1, 1, 8], 24, False),
        ("2 ** 3", [2, 3], 8, False),
        ("7 // 2", [7, 2], 3, False),
        ("24.0", [24], 24, False),
        ("__import__('os')", [1], 1, False),
        ("", [1], 1, False),
        ("(" * 400, [1], 1, False),
        ("1+" * 5000 + "1", [1], 1, False),
        ("1 2", [1, 2], 12, False),
    ],
)
def test_check(expression, numbers, target, right):
    assert check(expression, numbers, target) is right


def test_numbers_may_be_left_out_only_when_asked():
    assert not check("3 * 8", [3, 8, 8], 24)
    assert check("3 * 8", [3, 8, 8], 24, use_all=False)
    assert not check("3 * 8 * 1", [3, 8, 8], 24, use_all=False)


def test_evaluate_lists_the_numbers_in_order():
    assert evaluate("12 - (3 + 4)") == (5, [12, 3, 4])


@pytest.mark.parametrize(
    "response, answer",
    [
        ("<think>\\boxed{1}</think>\n\nSo \\boxed{(1 + 2) * 8}", "(1 + 2) * 8"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{\\frac{8}{2}}", "\\frac{8}{2}"),
        ("<think>\\boxed{1}", None),
        ("<think>\\boxed{1}</think> none", None),
        ("\\boxed{1", None),
        ("", None),
    ],
)
def test_extract_answer(response, answer):
    assert extract_answer(response) == answer
