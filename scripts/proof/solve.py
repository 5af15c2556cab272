"""The problems that a model solves, sampled with transformers: for a machine without vLLM.

    python scripts/proof/solve.py MODEL OUT --task gsm8k --data_dir DATA --max_tokens 512 [--temperature 0]

The task's prompts, sampling, grading and files are those of jsft.evaluate, and OUT is its --out. All samples are one
batch, drawn from one seed: the same seeds as vLLM's would not give the same samples.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jsft.data.thinking import prompt_thinking
from jsft.errors import CheckpointError, run_command
from jsft.evaluation.models import model_digest
from jsft.evaluation.runner import Model, Options, run_tasks
from jsft.evaluation.sampling import Completion, Request
from jsft.evaluation.tasks import get_task


class TransformersEngine:
    """An engine of jsft.evaluation. All requests of a call have the same sampling."""

    def __init__(self, path: Path, seed: int):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(self.device).eval()
        self.facts = {"kind": "transformers", "dtype": "bfloat16", "device": self.device, "seed": seed}
        torch.manual_seed(seed)

    def sample(self, requests: list[Request], progress=lambda tokens: None):
        """Yields one completion per request."""
        sampling, ends = requests[0].sampling, self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        prompts = [
            self.tokenizer.apply_chat_template(request.messages, tokenize=False, add_generation_prompt=True)
            for request in requests
        ]
        inputs = self.tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt").to(self.device)
        drawn = {"do_sample": False}
        if sampling.temperature:
            # 0 top_k: all tokens, where transformers' own default is 50.
            drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        with torch.inference_mode():
            found = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=sampling.max_tokens,
                pad_token_id=ends[0],
                **drawn,
            )
        for request, prompt, row in zip(requests, prompts, found[:, inputs["input_ids"].shape[1] :].tolist()):
            ended = next((i for i, token in enumerate(row) if token in ends), None)
            tokens = row if ended is None else row[:ended]
            count, finish = (len(row), "length") if ended is None else (ended + 1, "stop")
            progress(count)
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            yield Completion(
                request.task, request.problem, request.sample, text, count, finish, prompt_thinking(prompt)
            )

    def close(self) -> None:
        """Frees the model."""
        del self.model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--max_tokens", type=int)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.perf_counter()
    fields = {
        name: getattr(args, name) for name in ("data_dir", "max_tokens", "temperature", "samples", "limit", "seed")
    }
    model = Model(args.model.name, None, str(args.model), model_digest(args.model))
    (outcome,) = run_tasks(
        [get_task(args.task)], model, args.out, Options(**fields), lambda: TransformersEngine(args.model, args.seed)
    )
    if outcome.error:
        raise outcome.error
    score, response = outcome.results["score"], outcome.results["response"]
    low, high = score["ci95"] or (float("nan"),) * 2
    print(
        f"{args.model}: {args.task} {100 * score['mean']:.1f} % [{100 * low:.1f}, {100 * high:.1f}], "
        f"{outcome.results['problems']} problems x {args.samples}, {response['tokens']['mean']:.0f} tokens, "
        f"{100 * response['share_cut']:.1f} % cut, {time.perf_counter() - began:.0f} s"
    )
    return 0


if __name__ == "__main__":
    run_command(main, CheckpointError)
