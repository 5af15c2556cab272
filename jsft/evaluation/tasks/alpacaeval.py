"""AlpacaEval: 805 instructions; the mean raw score of a reward model for the answer (no win rate)."""

from typing import Any

from jsft.evaluation import thinking
from jsft.evaluation.data import Source
from jsft.evaluation.fields import Fields
from jsft.evaluation.sampling import Sampling
from jsft.evaluation.tasks.base import GENERAL, Grade, Problem, Task


class AlpacaEval(Task):
    name, title, group = "alpacaeval", "AlpacaEval (reward)", GENERAL
    source = Source("tatsu-lab/alpaca_eval", ("alpaca_eval.json",), ("instruction",))
    sampling = Sampling(
        temperature=0.7, top_p=0.9, top_k=50, presence_penalty=0.1, frequency_penalty=0.1, max_tokens=16384
    )
    metrics = {"reward": "raw score of the reward model; higher is better, the scale is the model's own"}
    primary = "reward"
    share = False
    judges = ("reward",)

    def problem(self, row: dict[str, Any], index: int) -> Problem:
        instruction = Fields(self.name, index, row).text("instruction")
        return Problem(str(index), [{"role": "user", "content": instruction}], {"instruction": instruction})

    def judge(self, gold: dict[str, Any], response: str, judges: dict[str, Any]) -> Grade:
        conversation = [
            {"role": "user", "content": gold["instruction"]},
            {"role": "assistant", "content": thinking.after_thinking(response)},
        ]
        return Grade({"reward": judges["reward"].reward(conversation)})
