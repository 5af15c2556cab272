"""The published runs' training loop, rebuilt from its description as a yardstick: torch and padded rows.

    python reference_loop.py JOB.json OUT.npz        (in an environment with torch and transformers)

It shares nothing with jsft but the model directory and the data file: transformers' model and tokenizer,
torch's sampler, clipping, AdamW and scheduler; one process takes the ranks in turn.

JOB: model, data, ranks, micro_batch, global_batch, max_length, epochs, learning_rate, schedule ("cosine" or
"constant"), clip_norm, dtype; reverse, to add the micro batches in the opposite order. OUT: arrays over the
updates (loss, entropy, token_entropy, token_accuracy, token_loss, grad_norm, clipped, update_ratio, lr),
`parameters/NAME` after the last one, and, for each of `objectives`, the gradient of the first batch, whole
and unpacked, as `gradient/OBJECTIVE/NAME`.
"""

import json
import math
import sys

import numpy as np
import torch
from torch.utils.data.distributed import DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer


def read_rows(job):
    """Padded rows (ids, attention mask, mask of positions whose next token is trained), and advantages."""
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    rows, advantages = [], []
    for line in open(job["data"], encoding="utf-8"):
        row = json.loads(line)
        text = tokenizer.apply_chat_template(row["message"], add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        ids = [*prompt, *response, tokenizer.eos_token_id][: job["max_length"]]
        trained = [len(prompt) - 1 <= i < len(ids) - 1 for i in range(job["max_length"])]
        padding = [tokenizer.pad_token_id] * (job["max_length"] - len(ids))
        rows.append((ids + padding, [1] * len(ids) + [0] * len(padding), trained))
        advantages.append(row["advantage"])
    return [torch.tensor(column) for column in zip(*rows)], torch.tensor(advantages)


def token_numbers(model, rows):
    """float32 [B, T-1], for each next token: -log p, entropy of p, whether it is the likeliest; mask."""
    ids, attention, trained = rows
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False).logits
    logp = torch.log_softmax(logits[:, :-1].float(), -1)
    nll = -logp.gather(-1, ids[:, 1:, None])[..., 0]
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
        correct = (logp.argmax(-1) == ids[:, 1:]).float()
    return nll, entropy, correct, trained[:, :-1].float()


def masked_mean(values, mask):
    return (values * mask).sum() / mask.sum()


def whole_batch_loss(objective, nll, mask, advantage, entropy):
    """An objective in one expression over the unpacked batch [B, T-1]."""
    if objective.endswith("+advantage"):
        return whole_batch_loss(objective.removesuffix("+advantage"), nll * advantage[:, None], mask, None, entropy)
    if objective.endswith("*dft"):
        return whole_batch_loss(objective.removesuffix("*dft"), nll * (-nll).exp().detach(), mask, None, entropy)
    if objective.endswith("*eaft"):
        factor = (entropy / math.log(20)).clamp(max=1)
        return whole_batch_loss(objective.removesuffix("*eaft"), nll * factor, mask, None, entropy)
    if objective == "token_mean":
        return masked_mean(nll, mask)
    assert objective == "sequence_mean"
    return ((nll * mask).sum(1) / mask.sum(1)).mean()


def gradient(model, loss):
    """The gradient of `loss` at the model's parameters, a list of arrays in their dtype."""
    return torch.autograd.grad(loss, list(model.parameters()))


def main(job, out):
    torch.set_num_threads(1)  # tiny arrays: threads would only wait for each other
    dtype = getattr(torch, job["dtype"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, attn_implementation="sdpa")
    parameters = list(model.parameters())
    names = [name for name, _ in model.named_parameters()]
    rows, advantages = read_rows(job)
    ranks, micro, batch = job["ranks"], job["micro_batch"], job["global_batch"]
    results = {}

    first = [column[:batch] for column in rows]
    for objective in job.get("objectives", ()):
        nll, entropy, _, mask = token_numbers(model, first)
        loss = whole_batch_loss(objective, nll, mask, advantages[:batch], entropy)
        for name, g in zip(names, gradient(model, loss)):
            results[f"gradient/{objective}/{name}"] = g.float().numpy()

    samplers = [DistributedSampler(advantages, ranks, r, shuffle=False, drop_last=True) for r in range(ranks)]
    order = [torch.tensor(list(sampler)) for sampler in samplers]
    each = batch // ranks
    per_epoch = len(order[0]) // each
    total = math.ceil(job["epochs"] * per_epoch)
    warmup = int(0.1 * total)

    def factor(s):
        if s < warmup:
            return s / max(1, warmup)
        if job["schedule"] == "constant":
            return 1.0
        return max(0.0, 0.5 + 0.5 * math.cos(math.pi * (s - warmup) / max(1, total - warmup)))

    optimizer = torch.optim.AdamW(parameters, job["learning_rate"], (0.9, 0.999), 1e-8, 0.01, foreach=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    log = []
    for step in range(total):
        start = step % per_epoch * each
        optimizer.zero_grad()
        seen, logged = [], []
        for t in range(each // micro)[:: -1 if job.get("reverse") else 1]:
            summed = [torch.zeros(p.shape) for p in parameters]
            for r in range(ranks):
                index = order[r][start + t * micro : start + (t + 1) * micro]
                nll, entropy, correct, mask = token_numbers(model, [column[index] for column in rows])
                loss = masked_mean(nll, mask)
                for total_, g in zip(summed, gradient(model, loss)):
                    total_ += g.float() / ranks
                logged.append([loss.item(), masked_mean(entropy, mask).item()])
                seen.append([(x * mask).sum().item() for x in (nll, entropy, correct)] + [mask.sum().item()])
            # Ranks are averaged in float32, micro batches added in the weights' dtype.
            for p, g in zip(parameters, summed):
                p.grad = g.to(dtype) if p.grad is None else p.grad + g.to(dtype)
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters))
        torch.nn.utils.clip_grad_norm_(parameters, job["clip_norm"])
        before = [p.detach().double().clone() for p in parameters]
        rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        moved = sum(float((p.detach().double() - b).square().sum()) for p, b in zip(parameters, before))
        size = sum(float(b.square().sum()) for b in before)
        loss, entropy = np.mean(logged, 0)
        sums = np.sum(seen, 0)
        log.append(
            {
                "loss": loss,
                "entropy": entropy,
                "token_loss": sums[0] / sums[3],
                "token_entropy": sums[1] / sums[3],
                "token_accuracy": sums[2] / sums[3],
                "grad_norm": norm,
                "clipped": norm > job["clip_norm"],
                "update_ratio": math.sqrt(moved / size),
                "lr": rate,
            }
        )
    for key in log[0]:
        results[key] = np.array([record[key] for record in log], np.float64)
    for name, p in model.named_parameters():
        results[f"parameters/{name}"] = p.detach().float().numpy()
    np.savez(out, **results)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        main(json.load(file), sys.argv[2])
