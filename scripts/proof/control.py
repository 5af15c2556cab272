"""The control of a run: the same rows, hyperparameters and order in plain torch and transformers.

    python scripts/proof/control.py RUN OUT MODEL     (a Python with torch, transformers and pyarrow)

RUN is the directory of a jsft run; its config.json says what to repeat; MODEL is the base model as
transformers reads it. Nothing of jsft is imported: tokenising, batches, schedule, loss and update are written
again, with padded rows instead of packed ones, transformers' model and torch's AdamW. For runs of
`fidelity=best` without shuffling. OUT gets metrics.jsonl and heldout.jsonl.
"""

import json
import math
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MICRO_BATCH = 24  # padded rows


def documents(file: str, tokenizer, longest: int) -> list[tuple[list[int], int]]:
    """(token ids, length of the prompt) of each row; the response ends with EOS."""
    found = []
    for row in pq.read_table(file).to_pylist():
        text = tokenizer.apply_chat_template(row["message"], add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        found.append(([*prompt, *response, tokenizer.eos_token_id][:longest], len(prompt)))
    return found


def micro_batches(batch, device):
    """Padded token ids and targets [R, T], -100 where nothing is trained; rows of like length together."""
    batch = sorted(batch, key=lambda document: -len(document[0]))
    for start in range(0, len(batch), MICRO_BATCH):
        rows = batch[start : start + MICRO_BATCH]
        longest = max(len(ids) for ids, _ in rows)
        tokens = torch.zeros(len(rows), longest, dtype=torch.long)
        targets = torch.full((len(rows), longest), -100)
        for i, (ids, prompt) in enumerate(rows):
            tokens[i, : len(ids)] = torch.tensor(ids)
            targets[i, prompt - 1 : len(ids) - 1] = torch.tensor(ids[prompt:])
        yield tokens.to(device), targets.to(device)


def nll_sum(model, tokens, targets):
    """Sum of -log p over the targets. Padding stands behind each row, so causal attention needs no mask."""
    trained = targets != -100
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[trained])
    return torch.nn.functional.cross_entropy(logits.float(), targets[trained], reduction="sum")


@torch.no_grad()
def heldout_loss(model, batch, device) -> float:
    total = count = 0
    for tokens, targets in micro_batches(batch, device):
        total += nll_sum(model, tokens, targets).item()
        count += int((targets != -100).sum())
    return total / count


def learning_rate(step: int, steps: int, peak: float, warmup_ratio: float) -> float:
    """Of update `step`, from 0: linear warm-up from 0, then a cosine to 0."""
    warmup = int(warmup_ratio * steps)
    if step < warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def main(run: Path, out: Path, base: Path) -> None:
    config = json.loads((run / "config.json").read_text())["config"]
    if config["fidelity"] != "best" or config["data.shuffle"] or config["optimizer.schedule"] != "cosine":
        sys.exit(f"control: {run} is not of the kind that is repeated here: best, not shuffled, cosine")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compute = getattr(torch, config["precision.compute"])
    longest = config["data.max_length"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = documents(config["data.train"], tokenizer, longest)
    (heldout,) = (documents(file, tokenizer, longest) for file in config["data.eval"].values())
    model = AutoModelForCausalLM.from_pretrained(base, dtype=compute).to(device).train()
    working = list(model.parameters())
    exact = [p.detach().float().clone() for p in working]  # the weights that the optimizer keeps
    optimizer = torch.optim.AdamW(
        exact,
        lr=0.0,
        betas=(config["optimizer.b1"], config["optimizer.b2"]),
        eps=config["optimizer.eps"],
        weight_decay=config["optimizer.weight_decay"],
        foreach=True,
    )
    size = config["train.global_batch"]
    an_epoch = len(rows) // size
    steps = math.ceil(config["train.epochs"] * an_epoch)
    steps = min(steps, config.get("train.max_steps") or steps)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "metrics.jsonl").open("w") as metrics, (out / "heldout.jsonl").open("w") as held:
        for step in range(steps + 1):
            if step % config["eval.every"] == 0 or step == steps:
                record = {"step": step, "heldout/loss": heldout_loss(model, heldout, device)}
                print(json.dumps(record), file=held, flush=True)
                print(f"control: {record}", flush=True)
            if step == steps:
                return
            began = time.perf_counter()
            first = step % an_epoch * size
            batch = list(micro_batches(rows[first : first + size], device))
            count = sum(int((targets != -100).sum()) for _, targets in batch)
            loss = 0.0
            for gradient in exact:
                gradient.grad = None
            for tokens, targets in batch:
                part = nll_sum(model, tokens, targets) / count
                part.backward()
                loss += part.detach()
                for master, p in zip(exact, working, strict=True):
                    master.grad = p.grad.float() if master.grad is None else master.grad + p.grad
                    p.grad = None
            clip = config["optimizer.clip_norm"]
            norm = torch.nn.utils.clip_grad_norm_(exact, clip if clip else math.inf)
            rate = learning_rate(step, steps, config["optimizer.learning_rate"], config["optimizer.warmup_ratio"])
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            with torch.no_grad():
                for master, p in zip(exact, working, strict=True):
                    p.copy_(master)
            record = {"step": step + 1, "loss": float(loss), "grad_norm": float(norm), "lr": rate}
            print(json.dumps(record | {"seconds": time.perf_counter() - began}), file=metrics, flush=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
