r"""Made-up responses, about 60 a task, that our scores and those of math-verify and lm-eval are compared on.

Each is (gold, response, why): `why` is None where the scores must agree, else the reason in docs/evaluation.md why they
must not.
"""

# math500: gold answer, worked solution, other spellings that math-verify reads, wrong answers.
_MATH = [
    ("\\frac{1}{2}", "Half: $\\boxed{\\frac{1}{2}}$.", ["0.5", "\\dfrac12", "1/2"], ["2", "\\frac13"]),
    ("1000", "So $\\boxed{1000}$.", ["1,000", "1{,}000", "10^3"], ["100", "1001"]),
    ("(-2, 2)", "$x \\in \\boxed{(-2, 2)}$", ["(-2,2)", "\\left(-2, 2\\right)"], ["[-2,2]", "(2,-2)"]),
    ("x^2+2x+1", "$\\boxed{x^2+2x+1}$", ["(x+1)^2", "1+2x+x^2"], ["x^2+1", "(x-1)^2"]),
    ("\\{1, 2\\}", "$\\boxed{\\{1, 2\\}}$", ["\\{2,1\\}", "1, 2"], ["\\{1,3\\}", "12"]),
    ("90^\\circ", "$\\boxed{90^\\circ}$", ["90", "90^{\\circ}"], ["45", "9"]),
    ("\\text{Evelyn}", "$\\boxed{\\text{Evelyn}}$", ["Evelyn", "\\textbf{Evelyn}"], ["\\text{Carla}", "E"]),
    ("\\sqrt{2}", "$\\boxed{\\sqrt{2}}$", ["\\sqrt2", "2^{1/2}"], ["1.41", "2"]),
    ("18", "It costs $\\boxed{18}$ dollars.", ["\\$18.00", "18 \\text{ dollars}"], ["81", "18.5"]),
]
_MATH_SAID = [
    "So $\\boxed{%s}$.",
    "<think>Is it 7?</think>\n**Final Answer**\n\\[\\boxed{%s}\\]",
    "The final answer is $%s$.",
]
MATH500 = (
    [
        ({"answer": answer, "solution": solution}, said % form, None)
        for answer, solution, right, wrong in _MATH
        for said, form in zip(_MATH_SAID * 3, [*right, *wrong, answer], strict=False)
    ]
    + [
        ({"answer": "7"}, response, None)
        for response in (
            "The answer is 7.",
            "<think>\\boxed{7}",
            "\\boxed{7}. No: \\boxed{3}",
            "\\boxed{3}. No, no, it is\n\n\\boxed{7}",
            "",
            "no idea",
            "7",
            "$7$ or $8$",
            "\\boxed{}",
            "\\boxed{7",
            "$\\boxed{7}$ and $\\boxed{8}$",
        )
    ]
    + [
        ({"answer": "1234"}, "\\boxed{1}, \\boxed{234}", "two boxes are no number"),
        ({"answer": "840841"}, "\\boxed{840} or\n\\boxed{841 \\text{ cm}}", "two boxes are no number"),
    ]
)

_INTEGERS = ["204", "73", "0", "999", "25"]
_AIME_SAID = [
    ("So $\\boxed{%s}$.", None),
    ("\\[\\boxed{%s}\\]", None),
    ("<think>1?</think>The answer is \\boxed{%s}.", None),
    ("\\boxed{1}, no: \\boxed{%s}", None),
    ("It is \\boxed{ %s }", None),
    ("Thus $m+n = \\boxed{%s}$ holds.", None),
    ("\\boxed{%s^\\circ}", None),
    ("\\boxed{\\text{none, not %s}}", None),
    ("", None),
    ("I do not know.", None),
    ("\\boxed{0%s}", "numbers are compared, not texts"),
    ("\\boxed{\\textbf{%s}}", "numbers are compared, not texts"),
    ("<think>\\boxed{%s}", "unclosed thinking has no answer"),
    ("Thus $%s$.", "an answer stands in a box"),
]
AIME24 = [({"answer": gold}, said.replace("%s", gold), why) for gold in _INTEGERS for said, why in _AIME_SAID]

_GSM8K_SAID = [
    ("She has %s.", None),
    ("The answer is \\boxed{%s}", None),
    ("\\boxed{3}", None),
    ("It is 4.", None),
    ("3 + 4 is not it.\nThe answer is $%s", None),
    ("So\n#### %s", None),
    ("\\[\\boxed{%s}\\]", None),
    ("It was 5 and then 6. So it is %s in all.", None),
    ("Nobody knows.", None),
    ("\\boxed{%s} of the 12 apples", "a box goes before the last number"),
    ("\\boxed{%s.00}", "numbers are compared, not texts"),
]
GSM8K = [
    ({"answer": gold}, said.replace("%s", gold), why)
    for gold in ["18", "240", "1050", "72", "64", "35", "960"]
    for said, why in _GSM8K_SAID
]

_CHOICE_SAID = [
    ("The answer is (%s).", None),
    ("the answer is %s", None),
    ("So the answer is (%s), not (K).", None),
    ("I do not know.", None),
    ("The answer is (%s). Or the answer is (A)?", None),
    ("<think>the answer is (%s)</think>Yes.", None),
    ("", None),
    ("Carbon", None),
    ("The answer is z.", None),
    ("**The answer is (%s)**", None),
    ("\\boxed{%s}", "a box counts"),
    ("So $\\boxed{\\textbf{(%s)}}$.", "a box counts"),
]
MMLU_PRO = [({"answer": gold}, said.replace("%s", gold), why) for gold in "ABDHJ" for said, why in _CHOICE_SAID]
_GPQA_SAID = [
    ("It must be (%s)", None),
    ("Options (A) and (B) fail. The answer is (%s)", None),
    ("The answer is (%s).", None),
    ("", None),
    ("<think>(A)?</think>So the answer is (%s)", None),
    ("hm", None),
    ("The answer is: (%s)", None),
    ("**The answer is (%s)**", None),
    ("The answer is %s", "a letter needs no parentheses after a phrase or in a box"),
    ("So \\boxed{%s}", "a letter needs no parentheses after a phrase or in a box"),
    ("The answer is (%s), because (A) and (B) fail in the end of (A).", "the phrase goes before the last letter"),
    ("The answer is (%s): option (A) has no mass", "the phrase goes before the last letter"),
]
GPQA_DIAMOND = (
    [
        (
            {"answer": gold},
            said.replace("%s", gold),
            "a phrase or a box is needed" if said.startswith("It must") else why,
        )
        for gold in "BCD"
        for said, why in _GPQA_SAID
    ]
    + [
        ({"answer": gold}, f"{start} the answer is ({gold}){end}", None)
        for gold in "ABCD"
        for start in ("So", "(B)? No:")
        for end in (".", "")
    ]
    + [({"answer": gold}, f"The answer is ({said}).", None) for gold in "ABCD" for said in "ABCD" if said != gold]
)

_INSTRUCTIONS = [
    ("punctuation:no_comma", {}),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 12}),
    ("keywords:existence", {"keywords": ["rain"]}),
    ("keywords:frequency", {"keyword": "rain", "frequency": 2, "relation": "at least"}),
    ("keywords:forbidden_words", {"forbidden_words": ["cloud"]}),
    ("keywords:letter_frequency", {"letter": "e", "let_frequency": 9, "let_relation": "at least"}),
    ("language:response_language", {"language": "de"}),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "rain"}),
    ("detectable_content:number_placeholders", {"num_placeholders": 1}),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}),
    ("detectable_format:constrained_response", {}),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}),
    ("detectable_format:multiple_sections", {"section_spliter": "PART", "num_sections": 2}),
    ("detectable_format:json_format", {}),
    ("detectable_format:title", {}),
    ("combination:two_responses", {}),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Rain falls from grey clouds"}),
    ("startend:end_checker", {"end_phrase": "Any questions?"}),
    ("change_case:english_capital", {}),
    ("change_case:english_lowercase", {}),
    ("startend:quotation", {}),
]
_IFEVAL_SAID = [
    "Rain falls from grey clouds and the rain does not end before evening\n\n***\n\n"
    "<<Rain>> and [place] more rain\n\nP.S. No end.",
    '"der regen fällt heute und morgen aus den wolken in das grüne tal"',
    '* one\n* two *marked* words\nPART 1\n{"a": 1}\nPART 2\n******\nMy answer is yes.\nAny questions?',
]
IFEVAL = [
    (
        {
            "key": i,
            "prompt": f"prompt {i}",
            "instruction_id_list": [name, "punctuation:no_comma"],
            "kwargs": [arguments, {}],
        },
        said,
        None,
    )
    for i, (name, arguments) in enumerate(_INSTRUCTIONS)
    for said in _IFEVAL_SAID
] + [
    (
        {"key": 99, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        "<think>a, b</think>none",
        "thinking is no answer",
    ),
]
