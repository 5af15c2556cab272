"""Run by test_against_transformers.py in the serving environment: logits of transformers in float32.

    python oracle_torch.py REQUEST.json: [{"model": DIR, "tokens": FILE.npy [n], "logits": FILE.npy to write}, ...]

transformers has no InternLM2: its weights are un-fused into the Llama model they are, in memory.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

NAMES = {
    "model.tok_embeddings": "model.embed_tokens",
    "output.weight": "lm_head.weight",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention.wo": "self_attn.o_proj",
}


def llama_of_internlm2(folder, config):
    heads, kv_heads, hidden = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    if scaling := config["rope_scaling"]:
        rope |= {"rope_type": scaling["type"], "factor": scaling["factor"]}
    keys = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
    )
    model = LlamaForCausalLM(
        LlamaConfig(**{k: config[k] for k in keys}, rope_parameters=rope, tie_word_embeddings=False)
    )
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("attention.wqkv.weight"):
            block = name.removesuffix("attention.wqkv.weight") + "self_attn."
            groups = tensor.view(kv_heads, heads // kv_heads + 2, hidden // heads, hidden)
            parts = {"q_proj": groups[:, :-2], "k_proj": groups[:, -2], "v_proj": groups[:, -1]}
            state |= {f"{block}{part}.weight": value.reshape(-1, hidden) for part, value in parts.items()}
        else:
            for old, new in NAMES.items():
                name = name.replace(old, new)
            state[name] = tensor
    model.load_state_dict({k: v.float() for k, v in state.items()}, strict=True)
    return model


for request in json.loads(Path(sys.argv[1]).read_text()):
    folder = Path(request["model"])
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "internlm2":
        model = llama_of_internlm2(folder, config)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model.eval()(torch.tensor(np.load(request["tokens"])[None]).long()).logits[0]
    np.save(request["logits"], logits.float().numpy())
