"""What a response does, told from its text: the patterns in English and Chinese, loops, mixed languages, parts."""

import json
import re

import pytest

from jsft.data import behaviours

SHOWS = {
    "backtracking": [
        "x = 3. Wait, that is 4.",
        "But wait, 5 is odd.",
        "Hmm, wait no.",
        "\nWait.\n",
        "**Wait**, is it?",
        "Hold on, we forgot a case.",
        "Alternatively, use symmetry.",
        "5 * 3 = 15: no.\nBack to 3, 4, 5.",
        "Let me reconsider the first case.",
        "I need to start over.",
        "We should try a different value.",
        "Let's try another approach.",
        "On second thought, x is 2.",
        "No, scratch that.",
        "This is a dead end.",
        "That's not right.",
        "That\u2019s not right.",
        "This isn't correct.",
        "So that doesn't work.",
        "I must have made a small mistake.",
        "I was wrong about n.",
        "等等,这里应该是3。",
        "所以是5。等一下,",
        "让我重新考虑这个问题。",
        "我们换一种思路。",
        "另一种方法是归纳。",
        "我算错了。",
        "嗯,这样不对,",
        "回到前面的方程。",
        "之前的假设有误。",
    ],
    "verification": [
        "Let me double-check.",
        "I'll re-check it.",
        "Let me verify that 3 works.",
        "Let's quickly check: 3 + 4 = 7.",
        "To verify, put x = 2.",
        "Checking the answer gives 7.",
        "We verify this result.",
        "A sanity check: 2 < 3.",
        "Check: 2 * 3 = 6.",
        "Plug x = 2 back into it.",
        "Does that make sense?",
        "Everything checks out.",
        "我们来验证一下。",
        "检验:代入x=2。",
        "检查一下答案。",
        "把x代回原方程。",
        "再检查每一步。",
        "这个结果是否正确?",
    ],
    "subgoals": [
        "Step 1: find x.",
        "## Step 2\nSolve.",
        "**Step 3:** add.",
        "First, let's find a.",
        "Next, we compute b.",
        "Now I need the sum.",
        "Let's break this down.",
        "Break the problem into two cases.",
        "The first step is to factor.",
        "A subproblem is to count.",
        "My plan is simple.",
        "To do this, we factor.",
        "首先,设x为边长。",
        "第一步:求a。",
        "步骤 2:代入。",
        "可以分为两个步骤。",
        "我们先求导数。",
        "把问题拆分成三部分。",
    ],
}
SHOWS_NOT = {
    "backtracking": [
        "They wait for the bus.",
        "Wait for the light, said Tom.",
        "The waiter waits.",
        "You cannot wait here.",
        "Hold on to the rope.",
        "He went back to school.",
        "The right answer is 4.",
        "Is it another number?",
        "每个等级的学生数相等。",
        "不对称的图形。",
        "比赛等待时间为3小时。",
    ],
    "verification": [
        "The cheque is 5 dollars.",
        "A checkerboard has 64 squares.",
        "Let us check all primes below 10.",
        "Jo paid by check.",
        "We use the alternating series test.",
        "零假设检验的结果。",
    ],
    "subgoals": [
        "He was the first to arrive.",
        "The steps of the ladder are 1 m apart.",
        "She broke the record.",
        "前三名首先到达者获奖。",
        "Now or never.",
    ],
}


@pytest.mark.parametrize("name", behaviours.PATTERNS)
def test_each_behaviour_is_found_by_its_words_and_by_no_others(name):
    missed = [text for text in SHOWS[name] if not behaviours.counts(text)[name]]
    wrong = [text for text in SHOWS_NOT[name] if behaviours.counts(text)[name]]
    assert not missed and not wrong


@pytest.mark.parametrize("name", behaviours.PATTERNS)
def test_every_pattern_has_an_example(name):
    for patterns in behaviours.PATTERNS[name].values():
        for pattern in patterns:
            finder = re.compile(pattern.replace("@", behaviours._START), re.IGNORECASE)
            assert any(finder.search(text.replace("\u2019", "'")) for text in SHOWS[name]), pattern


def test_a_plain_solution_shows_nothing():
    text = "The sum of 3 and 4 is 7, so the area is $7 \\cdot 2 = 14$.\n\nThe answer is \\boxed{14}."
    assert behaviours.counts(text) == {"backtracking": 0, "verification": 0, "subgoals": 0}
    assert behaviours.reflective_turns(text) == (0, 2)


def test_worked_solutions_of_a_real_set_neither_go_back_nor_loop(shared_data):
    """GSM8K's solutions go straight to the answer; some name their steps ('First find the total')."""
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[::10]]
    found = [behaviours.counts(row["answer"]) for row in rows]
    shares = {name: sum(one[name] > 0 for one in found) / len(found) for name in behaviours.PATTERNS}
    assert shares["backtracking"] == 0 and shares["verification"] < 0.005 and 0.03 < shares["subgoals"] < 0.12
    assert not any(behaviours.loops(row["answer"]) for row in rows)
    assert not any(behaviours.mixed_scripts(row["question"], row["answer"]) for row in rows)


def test_turns_are_paragraphs_and_count_once():
    text = "It is 3.\n\nWait, let me check. Wait.\n\nSo 4.\n \nCheck: 4.\n"
    assert behaviours.reflective_turns(text) == (2, 4)
    assert behaviours.reflective_turns("") == (0, 0)


PARAGRAPH = "So we consider the case where n is %d, and then the next one follows. "
LOOPS = {
    "a word": ("It is fine. " + "no " * 100, True),
    "one letter": ("a" * 300, True),
    "a sentence, cut in the middle": ("Start. " + "But wait, let me check this again. " * 12 + "But wait, le", True),
    "long paragraphs": ("".join(PARAGRAPH % i for i in range(30)) * 4 + "So we", True),
    "a sentence among others": (
        "".join(f"Wait, I should check the answer again, once more. No: {i}. " for i in range(60)),
        True,
    ),
    "three copies": ("".join(PARAGRAPH % i for i in range(30)) * 3, False),
    "copies before an answer": ("no " * 200 + "".join(PARAGRAPH % i for i in range(60)), False),
    "numbers that grow": ("".join(PARAGRAPH % i for i in range(200)), False),
    "short": ("no no no no no no", False),
    "nothing": ("", False),
}


@pytest.mark.parametrize("text, expected", LOOPS.values(), ids=LOOPS)
def test_an_end_of_copies_is_a_loop(text, expected):
    assert behaviours.loops(text) is expected


MIXED = {
    "Chinese in an English answer": ("What is 2?", "It is two. 所以答案是二。", ["Han"]),
    "a single sign": ("What is 2?", "It is 二.", []),
    "asked for": ("Translate 你好 to English", "你好吗 我们 means hello", []),
    "English in a Chinese answer": ("求 x。", "The answer is 2, and so that is the end of it.", ["English"]),
    "formulas are no English": ("求 x。", "因此 $\\sin x + \\cos x = 1$, \\boxed{x}。", []),
    "Greek letters are mathematics": ("Find x.", "α β γ δ ε ζ η", []),
    "Russian": ("Find x.", "Ответ 2", ["Cyrillic"]),
}


@pytest.mark.parametrize("prompt, response, expected", MIXED.values(), ids=MIXED)
def test_scripts_that_the_prompt_has_not(prompt, response, expected):
    assert behaviours.mixed_scripts(prompt, response) == expected


def test_thinking_and_answer():
    assert behaviours.split("<think>ab</think>cd") == ("ab", "cd")
    assert behaviours.split("ab</think>cd") == ("ab", "cd")
    assert behaviours.split("<think>ab") == ("ab", "")
    assert behaviours.split("cd") == ("", "cd")
