#!/usr/bin/env python
"""The torch peer of scripts/bench_step.py: transformers + Liger kernels + packed flash attention + fused AdamW.

What a user would pick instead for full-parameter fine-tuning on one GPU: bfloat16 weights and states, FlashAttention-4's
packed kernel where it imports, else torch's own (FlashAttention-2). Same documents, same definition of MFU. Without
activation checkpointing if that fits, else with it. Run by `bench_step.py --peer torch`; needs a Python with torch,
transformers and liger-kernel, and nothing of jsft. The last line is the result as JSON.

With --float8 RECIPE (`bench_step.py --peer torch_fp8`) torchao makes the linears of the layers float8. Each layer is then
compiled, which fuses the quantisation with its neighbours; of Liger only the loss is used, of attention the same kernel.
"""

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # else 8B finds no room without recompute

import numpy as np
import torch
from liger_kernel.transformers import apply_liger_kernel_to_qwen3
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM
from transformers.masking_utils import AttentionMaskInterface

PEAK_FLOPS = 989e12
# hidden, layers, heads, intermediate, tied; all have 8 key/value heads of width 128
SIZES = {
    "qwen3_1_7b": (2048, 28, 16, 6144, True),
    "qwen3_4b": (2560, 36, 32, 9728, True),
    "qwen3_8b": (4096, 36, 32, 12288, False),
    "qwen3_14b": (5120, 40, 40, 17408, False),
}
FLOAT8_RECIPES = ("rowwise", "tensorwise", "rowwise_with_gw_hp")  # the last: weight gradients in bfloat16
DOCUMENTS = {}  # of the row in work: cumulative lengths and the longest


def parse():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", choices=SIZES, required=True)
    add("--layers", type=int)
    add("--tokens", type=int, default=16384)
    add("--micro_batches", type=int, default=2)
    add("--steps", type=int, default=8)
    add("--median", type=float, default=6000)
    add("--float8", choices=FLOAT8_RECIPES, help="recipe of torchao.float8; the layers are compiled")
    add("--recompute", choices=("auto", "on", "off"), default="auto", help="activation checkpointing")
    return parser.parse_args()


def attention_kernel():
    """(name, function of q, k, v [T, heads, width]) of the best packed kernel there is."""
    try:
        from flash_attn.cute import flash_attn_varlen_func

        def fa4(q, k, v):
            cu, longest = DOCUMENTS["cu"], DOCUMENTS["longest"]
            out = flash_attn_varlen_func(
                q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest, causal=True
            )
            return out[0] if isinstance(out, tuple) else out

        return "FlashAttention-4", fa4
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn

        def fa2(q, k, v):
            cu, longest = DOCUMENTS["cu"], DOCUMENTS["longest"]
            return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0))

        return "FlashAttention-2", fa2


def document_lengths(total: int, median: float, seed: int) -> list[int]:
    """The same documents as scripts/bench_step.py makes from this seed."""
    rng, lengths, left = np.random.default_rng(seed), [], total
    while left:
        length = min(int(np.clip(rng.lognormal(np.log(median), 0.6), min(512, total), total)), left)
        lengths.append(length)
        left -= length
    return lengths


def build(options, recompute: bool, attend):
    hidden, layers, heads, intermediate, tied = SIZES[options.model]
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        num_hidden_layers=options.layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=intermediate,
        tie_word_embeddings=tied,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )

    def packed(module, query, key, value, mask, **unused):
        batch, _, length, width = query.shape
        flat = [t.transpose(1, 2).reshape(batch * length, -1, width) for t in (query, key, value)]
        return attend(*flat).reshape(batch, length, -1, width), None

    AttentionInterface.register("packed", packed)
    AttentionMaskInterface.register("packed", lambda *a, **k: None)
    config._attn_implementation = "packed"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.train()
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if options.float8:
        make_float8(model, options.float8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
    return config, model, optimizer


def make_float8(model, recipe: str) -> None:
    """The linears of the layers in float8, not the output matrix; every layer compiled."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(recipe)
    convert_to_float8_training(model.model.layers, config=config)
    for layer in model.model.layers:
        layer.compile(dynamic=False)


def measure(options, recompute: bool) -> dict:
    name, attend = attention_kernel()
    layers = not options.float8  # compiled layers have no need of Liger's kernels
    apply_liger_kernel_to_qwen3(
        rope=layers, rms_norm=layers, swiglu=layers, cross_entropy=False, fused_linear_cross_entropy=True
    )
    if options.float8:
        attend = torch.compiler.disable(attend)
    config, model, optimizer = build(options, recompute, attend)
    rows = []
    for micro in range(options.micro_batches):
        lengths = document_lengths(options.tokens, options.median, micro * 1000)
        ids = torch.randint(0, config.vocab_size, (1, options.tokens), device="cuda")
        labels, starts = ids.clone(), np.cumsum([0, *lengths])
        labels[0, starts[:-1]] = -100
        positions = torch.cat([torch.arange(n) for n in lengths])[None].cuda()
        rows.append((ids, labels, positions, torch.tensor(starts, dtype=torch.int32, device="cuda"), lengths))

    def step():
        for ids, labels, positions, cu, lengths in rows:
            DOCUMENTS.update(cu=cu, longest=max(lengths))
            model(input_ids=ids, labels=labels, position_ids=positions, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()

    seconds = []
    for i in range(options.steps + 2):
        started = time.perf_counter()
        step()
        if i >= 2:
            seconds.append(time.perf_counter() - started)
    took = statistics.median(seconds)
    lengths = [n for row in rows for n in row[4]]
    count = sum(p.numel() for p in model.parameters())
    count -= 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * sum(n * n for n in lengths)
    flops = 6 * count * sum(lengths) + 6 * attention
    return {
        "who": "torch",
        "model": options.model,
        "layers": config.num_hidden_layers,
        "params": "bfloat16",
        "matmul": f"torchao {options.float8}" if options.float8 else "bfloat16",
        "remat": "full" if recompute else "none",
        "device": torch.cuda.get_device_name(),
        "devices": 1,
        "tokens_per_second": sum(lengths) / took,
        "mfu": flops / took / PEAK_FLOPS,
        "seconds": took,
        "spread": (max(seconds) - min(seconds)) / took,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "version": f"torch {torch.__version__}, {name}",
    }


def main() -> None:
    options = parse()
    if options.recompute == "auto":
        try:
            result = measure(options, recompute=False)
        except torch.cuda.OutOfMemoryError:
            result = None
        if result is None:  # outside the handler, so that the failed attempt's memory is free again
            torch.cuda.empty_cache()
            result = measure(options, recompute=True)
    else:
        result = measure(options, recompute=options.recompute == "on")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
