"""Reading answers: tables of hand-made hard cases."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jsft.evaluation import answers, thinking
from jsft.evaluation.tasks.gpqa_diamond import _last_box, _phrase_then_box
from jsft.evaluation.tasks.livecodebench_v2 import same_output, same_value
from jsft.evaluation.tasks.mmlu_pro import MmluPro


@pytest.mark.parametrize(
    "text, last",
    [
        ("\\boxed{5}", "5"),
        ("first \\boxed{1}, then \\boxed{2}", "2"),
        ("\\boxed{\\boxed{7}}", "7"),
        ("\\boxed {a{b}c}", "a{b}c"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\text{a \\} b}}", "\\text{a \\} b}"),
        ("\\boxed{a\\\\}", "a\\\\"),
        ("\\boxed5", "5"),
        ("\\boxed 5", "5"),
        ("so $\\boxed 12$.", "12"),  # its first digit alone is never meant
        ("\\boxed 1,000.", "1,000"),
        ("\\boxed -5", "-5"),
        ("\\boxed~5", "5"),
        ("\\(\\boxed 5\\)", "5"),
        ("\\boxed 5\\text{ cm}", "5"),
        ("\\boxed 1{,}000", "1{,}000"),
        ("\\boxed (5)", "(5)"),
        ("\\boxed\\sqrt2", "\\sqrt2"),
        ("\\boxed 12\\pi", None),  # where it ends is a guess
        ("\\boxed 2x", None),
        ("\\boxed\\frac12", "\\frac12"),
        ("\\boxed\\frac{\\sqrt{2}}{2}", "\\frac{\\sqrt{2}}{2}"),
        ("$\\boxed C$", "C"),
        ("\\boxed\\text{C}", "\\text{C}"),
        ("\\boxed\n{5}", "5"),
        ("\\boxed{5}. I wrote it in \\boxed.", "5"),
        ("\\boxed{5}, as \\boxed notation asks", "5"),
        ("\\fbox{3}", "3"),
        ("{{ \\boxed{3}", "3"),
        ("}} \\boxed{3}", "3"),
        ("\\boxed{1} and \\boxed{2", "1"),  # the last one never closes
        ("\\boxed{}", ""),
        ("\\boxed{3", None),
        ("boxed{3}", None),
        ("\\boxedtext", None),
        ("", None),
    ],
)
def test_last_boxed(text, last):
    assert answers.last_boxed(text) == last


def test_boxes_without_end_cost_no_time():
    started = time.monotonic()
    assert answers.boxed("\\boxed{" * 100_000 + "7") == []
    assert len(answers.boxed("\\boxed{" * 100_000 + "7" + "}" * 100_000)) == 1
    assert time.monotonic() - started < 3


ONE_LETTER = [
    "C",
    "(C)",
    "[C]",
    "{C}",
    "C.",
    "C)",
    "C;",
    " C ",
    "C) x",
    "C: photon",
    "C. 42 m",
    "(C) photon",
    "C (photon)",
    "C - photon",
    "C = 42",
    "C, photon",
    "C, because A is wrong",
    "C. A decrease in price",
    "C. I and II only",
    "(C) - A photon",
    "\\text{C}",
    "\\text{ C }",
    "\\text{C: photon}",
    "\\text{C}\\text{. photon}",
    "$C$",
    "\\( C \\)",
    "$\\text{C}$",
    "\\textbf{(C)}",
    "\\textbf{(C) }12",
    "\\textbf{(C)}\\ 12",
    "\\mathsf{C}",
    "\\textit{C}",
    "\\mathcal{C}",
    "\\boldsymbol{\\mathrm{C}}",
    "\\textsf{\\textbf{\\text{C}}}",
    "{\\bf C}",
    "\\mathrm C",
    "\\left(C\\right)",
    "\\textcolor{red}{C}",
    "**C**",
    "~C",
    "C\\\\42",
    "Option C",
    "Answer: C",
    "The answer is (C)",
]
NO_LETTER = [
    "A, B",
    "A and B",
    "A or B",
    "A/B",
    "A & B",
    "A; C",
    "A|B",
    "AB",
    "A B",
    "A-D",
    "A to D",
    "A\\quad B",
    "A\\\\B",
    "A B C D E F G H I J",
    "A, B, C, D, E, F, G, H, I, J",
    "A \\text{ and } B",
    "\\text{A}, \\text{B}",
    "$A$ and $B$",
    "\\textbf{A}\\text{ or }\\textbf{B}",
    "\\{A, B\\}",
    "(A), (B)",
    "(A)(B)",
    "(A) (B)",
    "(A) or C",
    "A) or C)",
    "A. B",
    "A. B.",
    "A. photon, B. electron",
    "(A) photon and (B) electron",
    "A: yes; B: no",
    "A or (B)",
    "C or maybe D",
    "I am not sure",
    "\\text{I am not sure}",
    "I'm not sure",
    "I, too, am unsure",
    "I don't know",
    "I think C",
    "The answer is I am not sure",
    "A photon",
    "A 50 % chance",
    "Either A or C",
    "None",
    "DNA",
    "Carbon",
    "c",
    "(c)",
    "the photon",
    "K",
    "",
    "C" + " x" * 1000,
    None,
]


@pytest.mark.parametrize("text", ONE_LETTER)
def test_choice_reads_one_letter_in_any_wrapping(text):
    assert answers.choice(text, "ABCDEFGHIJ") == "C"


@pytest.mark.parametrize("text", NO_LETTER)
def test_choice_reads_no_letter_from_several_or_from_prose(text):
    assert answers.choice(text, "ABCDEFGHIJ") is None


FONTS = ["text", "textbf", "textit", "textrm", "mathrm", "mathbf", "mathsf", "mathtt", "boldsymbol", "underline"]
WRAPPINGS = ["$%s$", "\\(%s\\)", "(%s)", "{%s}", "~%s", "%s.", "**%s**"] + [f"\\{font}{{%s}}" for font in FONTS]


@given(st.sampled_from("ABCDEFGHIJ"), st.lists(st.sampled_from(WRAPPINGS), max_size=5, unique=True))
def test_wrappings_of_a_letter_may_nest(letter, wrappings):
    text = letter
    for wrapping in wrappings:
        text = wrapping % text
    assert answers.choice(answers.last_boxed(f"so $\\boxed{{{text}}}$"), "ABCDEFGHIJ") == letter


@given(
    st.lists(st.sampled_from("ABCDEFGHIJ"), min_size=2, max_size=10, unique=True),
    st.sampled_from([", ", " and ", " or ", "/", " ", "", "; ", "\\text{ and }", " \\& ", "\\quad ", "), ("]),
)
def test_several_letters_are_no_answer(letters, between):
    assert answers.choice(between.join(letters), "ABCDEFGHIJ") is None


@given(st.text("ABI .,()${}\\*abtex-", max_size=30))
def test_choice_answers_any_text(text):
    assert answers.choice(text, "ABI") in (None, "A", "B", "I")


@pytest.mark.parametrize(
    "text, reference, strict",
    [
        ("So the answer is (B).", "B", ""),
        ("The answer is: **C**", "C", ""),
        ("The answer is A? No: \\boxed{D}", "A", "D"),  # the phrase goes first, as in the reference
        ("\\boxed{A} or rather \\boxed{\\text{B}}", "B", "B"),
        ("Boron", "", ""),
        ("The answer is $\\textbf{C}$", "C", ""),
        ("The answer is a photon: \\boxed{\\mathsf{D}}", "D", "D"),
        ("\\boxed{A or B}", "", ""),
    ],
)
def test_gpqa_filters(text, reference, strict):
    assert _phrase_then_box([[text]], [{}]) == [reference]
    assert _last_box([[text]], [{}]) == [strict]


@pytest.mark.parametrize("box", ["C", "(C)", "\\text{C}", "\\textbf{(C)}", "$C$", "\\mathsf{\\text{C}}", "C. x"])
def test_mmlu_pros_first_box_may_stand_in_any_font(box):
    pattern = MmluPro.config["filter_list"][0]["filter"][0]["regex_pattern"]
    assert re.findall(pattern, f"so \\boxed{{{box}}} or \\boxed{{D}}")[0] == "C"


@pytest.mark.parametrize(
    "text, word",
    [
        ("Yes", "yes"),
        ("No... Yes.", "yes"),
        ("nobody knows", None),
        ("It is not. NO!", "no"),
        ("", None),
        ("yes/no", "no"),
        ("Yes, there is no support.", "yes"),
        ("Yes. No document supports it.", "yes"),
        ("Yes there is no support", "yes"),
        ("No, it is supported. The North Sea is meant, isn't it? yes", "no"),
        ("There is no support.", None),
        ("no support is given", None),
        ("**No**", "no"),
        ("Answer: no.", "no"),
        ("The answer is yes", "yes"),
        ("yes.", "yes"),
        ("YES", "yes"),
        ("Maybe No-one knows. Yes.", "yes"),
    ],
)
def test_last_yes_no(text, word):
    assert answers.last_yes_no(text) == word


@pytest.mark.parametrize(
    "text, word",
    [
        ("Yes.", "yes"),
        ("Yes, there is no support.", "yes"),
        ("No", "no"),
        ("Yes. No.", None),
        ("yes", None),
        ("", None),
        ("No, the North Sea.", "no"),
        ("Yes, the North Sea.", None),
    ],
)
def test_halu_evals_own_rule_counts_letters(text, word):
    assert answers.only_yes_no(text) == word


@pytest.mark.parametrize(
    "text, code",
    [
        ("```python\na\n```", "a\n"),
        ("```python\na\n```\nthen\n```python\nb\n```", "b\n"),
        ("```python\na\n```\noutput:\n```\n6\n```", "a\n"),  # a block without a language is no program here
        ("```\na\n```", "a\n"),
        ("```py\na\n```", "a\n"),
        ("``` python \na\n```", "a\n"),
        ("```python\na", None),
        ("a", None),
    ],
)
def test_last_code_block(text, code):
    assert answers.last_code_block(text) == code


@pytest.mark.parametrize(
    "response, after, final",
    [
        ("<think>a</think> b", "b", "b"),
        ("a</think>b</think>c", "c", "c"),
        ("<think>never closed", "<think>never closed", ""),
        ("no thinking at all", "no thinking at all", "no thinking at all"),
        ("<think>a</think>", "", ""),
    ],
)
def test_thinking(response, after, final):
    assert thinking.after_thinking(response) == after
    assert thinking.final_answer(response) == final


@pytest.mark.parametrize(
    "shown, expected, same",
    [
        ("1 2\n3", "1 2\n3\n", True),
        ("1 2 \n 3\n\n", "1 2\n3", True),
        ("0.50", "0.5", True),
        ("1 2.0", "1 2", True),
        ("YES", "yes", False),
        ("1\n2", "1 2", False),
        ("", "1", False),
        ("nan", "1", False),
    ],
)
def test_outputs(shown, expected, same):
    assert same_output(shown, expected) is same


@pytest.mark.parametrize(
    "shown, expected, same",
    [
        ("[1, 2]", "[1,2]", True),
        ("2.0", "2", True),
        ("true", "1", True),
        ("[1]", "[2]", False),
        ("", "[]", False),
    ],
)
def test_values(shown, expected, same):
    assert same_value(shown, expected) is same
