"""What vLLM makes of a model directory: log-probabilities of given prompts, and greedy continuations.

Runs in the serving environment; `python -m jsft.export --check` starts it. By hand:

    .venv-serve/bin/python jsft/hf/check_vllm.py MODEL_DIR REQUEST.json ANSWER.json

REQUEST: {"prompts": [[token ids], ...], "max_tokens": 8}, and if wanted "dtype" (float32) and "tp" (1: GPUs)
ANSWER:  {"log_probs": [[of tokens 1, 2, ...], ...], "generated": [[token ids], ...], "version": vLLM's}

No code of the directory is run: an InternLM2 directory is shown to vLLM with a config.json that needs none.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process: half the start-up time
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; without effect on a GPU
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # vLLM's float32 attention on a GPU; Triton's own default is TF32


def without_code(model_dir: Path, view: Path) -> Path:
    """`model_dir`; where its config needs code, a view of it that needs none.

    vLLM has InternLM2 built in; only transformers lacks its config class, and Llama's fits.
    """
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    if "auto_map" not in config and config.get("model_type") != "internlm2":
        return model_dir
    if config.get("architectures") != ["InternLM2ForCausalLM"]:
        raise SystemExit(f"{model_dir} needs code of its own to be read, and is no InternLM2 model")
    for file in model_dir.iterdir():
        if file.suffix != ".py" and file.name != "config.json":
            (view / file.name).symlink_to(file.resolve())
    config.pop("auto_map", None)
    config.pop("attn_implementation", None)
    config["model_type"] = "llama"
    if scaling := config.get("rope_scaling"):
        config["rope_scaling"] = {"rope_type": scaling["type"], **scaling} if "type" in scaling else scaling
    (view / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return view


def main(model_dir: str, request_file: str, answer_file: str) -> None:
    request = json.loads(Path(request_file).read_text())
    prompts, max_tokens = request["prompts"], request["max_tokens"]
    import torch
    import vllm

    longest = max(map(len, prompts)) + max_tokens
    with tempfile.TemporaryDirectory() as view:
        llm = vllm.LLM(
            model=str(without_code(Path(model_dir).resolve(), Path(view))),
            dtype=request.get("dtype", "float32"),
            tensor_parallel_size=request.get("tp", 1),
            max_model_len=longest,
            max_num_seqs=len(prompts),
            enforce_eager=True,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            gpu_memory_utilization=0.9 if torch.cuda.is_available() else 0.3,
        )
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            vllm.SamplingParams(temperature=0, max_tokens=max_tokens, prompt_logprobs=1, detokenize=False),
            use_tqdm=False,
        )
    answer = {
        "log_probs": [
            [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], ids[1:])]
            for output, ids in zip(outputs, prompts)
        ],
        "generated": [list(output.outputs[0].token_ids) for output in outputs],
        "version": vllm.__version__,
    }
    Path(answer_file).write_text(json.dumps(answer))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
