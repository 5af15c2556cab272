"""IFEval: 541 prompts with instructions that a program can check; lm-eval's checkers.

Scores of a prompt (all its instructions followed) and of single instructions, strict and loose.
"""

import random
from typing import Any

from jsft.errors import DataError, describe
from jsft.evaluation.data import Source
from jsft.evaluation.fields import Fields, shown
from jsft.evaluation.sampling import Sampling
from jsft.evaluation.tasks.base import GENERAL, Problem
from jsft.evaluation.tasks.harness import HarnessTask

# Instructions whose checkers split text with NLTK's data.
NEEDS_PUNKT = ("length_constraints:number_sentences", "change_case:capital_word_frequency")


class IfEval(HarnessTask):
    name, title, group = "ifeval", "IFEval", GENERAL
    source = Source("google/IFEval", ("*.jsonl",), ("prompt", "instruction_id_list", "kwargs"), ("input_data",))
    version = 2
    sampling = Sampling(temperature=0.6, max_tokens=32768)
    metrics = {
        "prompt_strict": "all instructions of the prompt are followed",
        "prompt_loose": "the same, forgiving first and last lines and asterisks",
        "instruction_strict": "share of instructions followed",
        "instruction_loose": "the same, forgiving first and last lines and asterisks",
    }
    primary = "prompt_strict"
    config = {
        "doc_to_text": "Question: {{prompt}}\nAnswer:",  # how the reference wraps it
        "doc_to_target": 0,
    }
    scores = {
        "prompt_strict": ("none", "prompt_level_strict_acc", "after"),
        "prompt_loose": ("none", "prompt_level_loose_acc", "after"),
        "instruction_strict": ("none", "inst_level_strict_acc", "after"),
        "instruction_loose": ("none", "inst_level_loose_acc", "after"),
    }

    def lm_eval_config(self) -> dict[str, Any]:
        from lm_eval.tasks.ifeval import utils

        mean = {"aggregation": "mean", "higher_is_better": True}
        of_lists = {"aggregation": utils.agg_inst_level_acc, "higher_is_better": True}
        names = [metric for _, metric, _ in self.scores.values()]
        metrics = [{"metric": name, **(of_lists if name.startswith("inst") else mean)} for name in names]
        return {**self.config, "process_results": check_instructions, "metric_list": metrics}

    def problems(self, rows: list[dict[str, Any]]) -> list[Problem]:
        # This imports lm-eval's checkers, which fetch NLTK's data where they can.
        problems = super().problems(rows)
        for p in problems:
            _check_arguments(p)
        needed = {i for p in problems for i in p.gold["instruction_id_list"] if i in NEEDS_PUNKT}
        if needed and not _has_punkt():
            raise DataError(
                f"ifeval: {' and '.join(sorted(needed))} need NLTK's sentence splitter; in the serving environment "
                "run: python -m nltk.downloader punkt_tab"
            )
        return problems

    def warm_up(self) -> None:
        import lm_eval.tasks.ifeval.utils  # noqa: F401

    def document(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        fields = Fields(self.name, index, row)
        names, arguments = fields.items("instruction_id_list"), fields.items("kwargs")
        if not all(isinstance(name, str) for name in names):
            raise fields.wrong("instruction_id_list", names, "a list of names")
        if len(arguments) != len(names) or not all(a is None or isinstance(a, dict) for a in arguments):
            raise fields.wrong("kwargs", arguments, f"{len(names)} objects, one an instruction")
        return {
            "key": fields.get("key", default=index),
            "prompt": fields.text("prompt"),
            "instruction_id_list": names,
            "kwargs": [_given(a or {}) for a in arguments],
        }

    def identity(self, row: dict[str, Any], index: int) -> str:
        return str(Fields(self.name, index, row).get("key", default=index))


def check_instructions(document: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """lm-eval's check of one response, the same each time: strict and loose, per prompt and per instruction.

    A checker draws arguments that are missing at random: three prompts ask for '!' or '#', and their letter is drawn.
    Language detection is random too. Both get a fixed seed here, the same for strict and loose.
    """
    import langdetect
    from lm_eval.tasks.ifeval import utils

    example = utils.InputExample(**{k: document[k] for k in ("key", "instruction_id_list", "prompt", "kwargs")})
    langdetect.DetectorFactory.seed = 0
    state = random.getstate()
    scores: dict[str, Any] = {}
    try:
        for way in ("strict", "loose"):
            random.seed(document["prompt"].encode(errors="surrogatepass"))
            outcome = getattr(utils, f"test_instruction_following_{way}")(example, results[0])
            scores[f"prompt_level_{way}_acc"] = outcome.follow_all_instructions
            scores[f"inst_level_{way}_acc"] = outcome.follow_instruction_list
    finally:
        random.setstate(state)
    return scores


def _check_arguments(problem: Problem) -> None:
    """Raises DataError where lm-eval knows no such instruction, or not with these arguments."""
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    state = random.getstate()
    for name, arguments in zip(problem.gold["instruction_id_list"], problem.gold["kwargs"], strict=True):
        try:
            INSTRUCTION_DICT[name](name).build_description(**arguments)
        except Exception as error:  # checkers raise what their arguments lead to
            reason = "lm-eval does not know it" if name not in INSTRUCTION_DICT else describe(error)
            raise DataError(
                f"ifeval: prompt {problem.id}: instruction '{name[:60]}' with {shown(arguments)}: {reason}"
            ) from None
        finally:
            random.setstate(state)


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that have a value. Tables store whole numbers as 4.0 where other rows have none."""
    whole = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in arguments.items()}
    return {k: v for k, v in whole.items() if v is not None and v == v}


def _has_punkt() -> bool:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True
