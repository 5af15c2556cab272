r"""What a response does, told from its text alone: backtracking, verification, sub-goals, loops, mixed languages.

The patterns below are the whole definition: a response shows a behaviour where one of them matches, in English or in
Chinese, in its thinking or its answer. They find words, not deeds: a check in formulas alone is missed, and a pattern
that is quoted counts. Standard library only and valid for Python 3.11, so that the serving environment can use it.
"""

import re
from collections import Counter

from jsft.data.thinking import CLOSE, OPEN, ends_inside

VERSION = 1  # of the patterns: counts of other versions are not compared

# `@` is the start of a sentence.
PATTERNS: dict[str, dict[str, tuple[str, ...]]] = {
    "backtracking": {
        "English": (
            r"@(?:but |hmm+,? |oh,? |no,? |ah,? |okay,? |actually,? )*wait\b(?! for\b| until\b)",
            r"@(?:but )?hold on\b(?! to\b)",
            r"@alternatively\b",
            r"@back to\b",
            r"\b(?:let me|let's|let us|I'll|I will|I should|I need to|I have to|we should|we need to|we have to) "
            r"(?:re-?think|re-?consider|re-?examine|re-?start|re-?do|start (?:over|again|afresh)|go back|back ?track"
            r"|try (?:again|another|a different|something else))\b",
            r"\b(?:try|use|consider|think of|look for) (?:another|a different|an alternative) "
            r"(?:approach|way|method|idea|route|strategy|path)\b",
            r"\bon second thought\b",
            r"\bscratch that\b",
            r"\bdead end\b",
            r"\b(?:that|this|it)(?:'s| is| was| seems| looks) (?:not (?:right|correct|working)|wrong|incorrect)\b",
            r"\b(?:that|this|it|which) (?:isn't|wasn't) (?:right|correct|working)\b",
            r"\b(?:that|this|it|which) (?:doesn't|does not|didn't|did not|won't|can't|cannot) (?:seem to )?work\b",
            r"\b(?:I|we)(?:'ve| have| must have| may have| might have)? made (?:a|an|some) (?:\w+ )?(?:mistake|error|slip)",
            r"\bI was wrong\b",
        ),
        "Chinese": (
            r"@(?:等等|等一下|等下|且慢|慢着)",
            r"重新(?:思考|考虑|审视|来过|再来|想|开始|分析)",
            r"(?:换|另)(?:一个|一种|一|个|种)?(?:思路|方法|角度|方式|办法)",
            r"(?:弄|搞|算|想|看|理解)错了",
            r"@(?:但|可|哦|嗯)?(?:是)?(?:这|那)?(?:样)?(?:不对|不行|行不通|走不通)(?=[,,。.!!??;;\s了]|$)",
            r"回过头|(?:回到|退回)(?:前面|之前|上一步|原点)",
            r"(?:之前|前面|上面)的?(?:想法|假设|计算|推导)?(?:有误|不对|错了)",
        ),
    },
    "verification": {
        "English": (
            r"\b(?:double|cross|re)[- ]?check(?:s|ed|ing)?\b",
            r"\b(?:let me|let's|let us|I'll|I will|I should|I can|we can|we should) (?:\w+ )?"
            r"(?:check|verify|confirm|validate|test)\b(?! (?:all|every|each)\b)",
            r"\bto (?:verify|be sure|be safe|make sure)\b",
            r"\b(?:check|checking|verify|verifying|confirm|confirming) (?:this|that|it|my|our|the) ?"
            r"(?:answer|result|solution|calculation|computation|arithmetic|work|math|reasoning|steps?)?\b",
            r"\bsanity[- ]check",
            r"@(?:quick )?(?:check|verification):",
            r"\b(?:plug|plugging|substitute|substituting)\b[^.\n]{0,40}\bback\b",
            r"\bdoes (?:this|that|it) (?:make sense|hold|work)\b",
            r"\b(?:this|that|it|which|everything|all) checks out\b",
        ),
        "Chinese": (
            r"验证|验算|核对|核实|复查|复核|(?<!假设)检验",
            r"检查(?:一下|一遍|是否|答案|结果|计算|上述|这个)|(?:再|重新|仔细)检查",
            r"代(?:入|回)(?:原|检|验|回|进去)",
            r"确认(?:一下|答案|结果|是否)|是否(?:正确|合理)",
        ),
    },
    "subgoals": {
        "English": (
            r"@(?:[#*> ]*)step \d+\b",
            r"@(?:first|next|then|now|second|finally)(?:ly)?,? "
            r"(?:let's|let us|let me|we|I|I'll|we'll|find|compute|calculate|determine|solve)\b",
            r"\bbreak (?:this|it|that|things|the \w+) (?:down|up|into)\b",
            r"\bthe (?:first|second|third|next|last|final) step (?:is|will be|would be)\b",
            r"\b(?:sub-?(?:goal|problem|task)|intermediate (?:goal|step|target|result))s?\b",
            r"\b(?:my|the|our) plan (?:is|would be)\b",
            r"\bto (?:do|find|get|solve|show|prove) (?:this|that|it), (?:let|we|I)\b",
        ),
        "Chinese": (
            r"第[一二三四五六七八九十\d]+步|步骤\s*[一二三四五六七八九十\d]+",
            r"@(?:首先|接下来|接着|然后|下一步|最后)",
            r"分(?:成|为)?(?:以下)?(?:几|两|三|四|五|多|\d+)个?步",
            r"(?:先|首先)(?:来)?(?:求|算|计算|找|考虑|确定|分析|看)",
            r"(?:分解|拆分|拆解)(?:成|为|这个|问题)|子(?:目标|问题|任务)|中间(?:步骤|目标|结果)",
        ),
    },
}
_START = r"(?:\A|(?<=\n)|(?<=[.!?:…] )|(?<=[。!?:;,,;]))[ \t]*[\"'(*“‘(]*"


def _compiled(languages: dict[str, tuple[str, ...]]) -> list[re.Pattern]:
    """Finders in text of small letters. What patterns share stands before them: it is then tried once a place."""
    parts = [part.lower() for patterns in languages.values() for part in patterns]
    heads = {"@": _START, r"\b": r"\b", "": ""}
    found: dict[str, list[str]] = {head: [] for head in heads}
    for part in parts:
        head = next(head for head in heads if part.startswith(head))
        found[head].append(part.removeprefix(head))
    return [re.compile(heads[head] + f"(?:{'|'.join(bodies)})") for head, bodies in found.items() if bodies]


_FINDERS = {name: _compiled(languages) for name, languages in PATTERNS.items()}


def _small(text: str) -> str:
    return text.replace("\u2019", "'").lower()


LOOP_COPIES = 4  # a response loops where its end is this many copies of one text
LOOP_LENGTH = 200  # characters that they take, at least
_TAIL = 16_000  # characters at the end that are looked at
_NEEDLE = 32

SCRIPT_LETTERS = 5  # letters of another script than the prompt's that make a response mixed
_SCRIPTS = {
    "Han": r"[\u3400-\u4dbf\u4e00-\u9fff]",
    "Kana": r"[\u3040-\u30ff]",
    "Hangul": r"[\u1100-\u11ff\uac00-\ud7af]",
    "Cyrillic": r"[\u0400-\u04ff]",
    "Arabic": r"[\u0600-\u06ff]",
    "Hebrew": r"[\u0590-\u05ff]",
    "Thai": r"[\u0e00-\u0e7f]",
    "Devanagari": r"[\u0900-\u097f]",
    # Formulas of any language hold Latin letters: only English prose counts.
    "English": r"\b(?:the|is|are|of|and|to|that|this|we|so|then|but|wait|let|it|in|for)\b",
}
_SCRIPT_FINDERS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in _SCRIPTS.items()}


def counts(text: str) -> dict[str, int]:
    """How often each behaviour of PATTERNS is found."""
    text = _small(text)
    return {name: sum(len(finder.findall(text)) for finder in finders) for name, finders in _FINDERS.items()}


def reflective_turns(text: str) -> tuple[int, int]:
    """(turns that backtrack or verify, all turns). A turn is a paragraph."""
    turns = [turn for turn in re.split(r"\n\s*\n", _small(text)) if turn.strip()]
    finders = (*_FINDERS["backtracking"], *_FINDERS["verification"])
    return sum(any(finder.search(turn) for finder in finders) for turn in turns), len(turns)


def loops(text: str) -> bool:
    """Whether the end of a response repeats itself: LOOP_COPIES copies of one text or more, over at least LOOP_LENGTH
    characters; or one sentence of 20 characters or more that is half of the last 4,000, five times at least.
    """
    tail = text.rstrip()[-_TAIL:]
    if len(tail) < LOOP_LENGTH:
        return False
    place = len(tail) - _NEEDLE
    while (found := tail.rfind(tail[-_NEEDLE:], 0, place + _NEEDLE - 1)) >= 0:
        period = len(tail) - _NEEDLE - found
        length = max(LOOP_COPIES * period, LOOP_LENGTH)
        if length > len(tail):
            break
        if tail[-length:-period] == tail[period - length :]:
            return True
        place = found
    end = tail[-4000:]
    sentences = Counter(s.strip().lower() for s in re.split(r"[.!?。!?\n]+", end) if len(s.strip()) >= 20)
    ((sentence, times),) = sentences.most_common(1) or [("", 0)]
    return times >= 5 and 2 * times * len(sentence) >= len(end)


def mixed_scripts(prompt: str, response: str) -> list[str]:
    """Scripts with SCRIPT_LETTERS letters or more in the response, of which the prompt has none. Where the prompt is in
    another script, English counts from as many of its small words."""
    found = []
    for name, finder in _SCRIPT_FINDERS.items():
        absent = not (re.search(r"[a-z]{3}", prompt, re.IGNORECASE) if name == "English" else finder.search(prompt))
        if absent and sum(1 for _ in zip(range(SCRIPT_LETTERS), finder.finditer(response))) == SCRIPT_LETTERS:
            found.append(name)
    return found


def split(text: str) -> tuple[str, str]:
    """(thinking, answer) of a response: what stands before and after the last `</think>`. Without tags all is answer;
    thinking that is never closed has no answer."""
    if ends_inside(text):
        return text.removeprefix(OPEN), ""
    thinking, _, answer = text.rpartition(CLOSE)
    return thinking.removeprefix(OPEN), answer
