"""The process that holds vLLM: reads requests on stdin, writes completions on stdout, both as JSON lines.

A separate process contains a crash, an out-of-memory kill or a long log of vLLM, and its GPU memory is free again when
it ends. First line in: the engine's settings; first line out: `ready` or `error`. Then batches of requests, each closed
by an empty line; out: `done` (one finished sample), `tokens` (progress), and `end` after each batch.
"""

import json
import os
import sys
import time
from typing import Any

from jsft.data.thinking import prompt_thinking

PROGRESS_SECONDS = 0.5


def main() -> None:
    # vLLM and its libraries print to stdout: keep the real one for the protocol and send theirs to the log.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    settings = json.loads(sys.stdin.readline())
    try:
        engine = Engine(settings)
    except BaseException as error:  # of any kind; the parent reports it in one line
        say(error=f"{type(error).__name__}: {error}")
        raise
    say(ready=engine.facts)
    batch: list[dict[str, Any]] = []
    for line in sys.stdin:
        if line.strip():
            batch.append(json.loads(line))
            continue
        engine.run(batch, say)
        say(end=True)
        batch = []


class Engine:
    """vLLM's engine with one request per sample, so that each is reported when it is finished."""

    def __init__(self, settings: dict[str, Any]):
        import vllm
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        options: dict[str, Any] = dict(
            model=settings["model"],
            dtype=settings["dtype"],
            tensor_parallel_size=settings["tp"],
            max_model_len=settings["max_model_len"],
            seed=settings["seed"],
            trust_remote_code=settings["trust_remote_code"],
            gpu_memory_utilization=settings["gpu_memory"] or (0.3 if on_cpu else 0.85),
            # Graph capture pays off over a long evaluation on a GPU; on CPU it is compile time for nothing.
            enforce_eager=on_cpu,
            disable_log_stats=True,
        )
        if on_cpu:
            # A prompt in two chunks rewinds the generator of a seeded request; torch's CPU generator cannot do that.
            options["enable_chunked_prefill"] = False
        self.llm = vllm.LLM(**options)
        self.tokenizer = self.llm.get_tokenizer()
        self.max_model_len = self.llm.llm_engine.model_config.max_model_len
        self.facts = {
            "version": vllm.__version__,
            "max_model_len": self.max_model_len,
            "device": current_platform.get_device_name() or "cpu",
            "dtype": str(self.llm.llm_engine.model_config.dtype).removeprefix("torch."),
        }

    def run(self, batch: list[dict[str, Any]], say) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        texts: dict[str, list[str]] = {}
        endings: list[str] = []
        counts: dict[str, int] = {}
        for number, request in enumerate(batch):
            prompt = self.tokenizer.apply_chat_template(request["messages"], tokenize=False, add_generation_prompt=True)
            endings.append(prompt_thinking(prompt))
            ids = self.tokenizer.encode(prompt, add_special_tokens=False)
            room = self.max_model_len - len(ids)
            if room <= 0:
                say(done=number, error=f"prompt of {len(ids)} tokens, context of {self.max_model_len}")
                continue
            sampling = request["sampling"]
            engine.add_request(
                str(number),
                {"prompt_token_ids": ids},
                SamplingParams(
                    temperature=sampling["temperature"],
                    top_p=sampling["top_p"],
                    top_k=sampling["top_k"],
                    max_tokens=min(sampling["max_tokens"], room),
                    presence_penalty=sampling["presence_penalty"],
                    frequency_penalty=sampling["frequency_penalty"],
                    stop=sampling["stop"],
                    seed=request["seed"],
                    output_kind=RequestOutputKind.DELTA,
                ),
            )
            texts[str(number)], counts[str(number)] = [], 0
        fresh, said = 0, time.monotonic()
        while engine.has_unfinished_requests():
            for output in engine.step():
                piece = output.outputs[0]
                name = output.request_id
                texts[name].append(piece.text)
                counts[name] += len(piece.token_ids)
                fresh += len(piece.token_ids)
                if output.finished:
                    finish = "length" if piece.finish_reason == "length" else "stop"
                    text, tokens = "".join(texts.pop(name)), counts.pop(name)
                    ending = endings[int(name)]
                    say(done=int(name), text=text, tokens=tokens, finish=finish, prompt_thinking=ending)
            if time.monotonic() - said > PROGRESS_SECONDS:
                say(tokens=fresh)
                fresh, said = 0, time.monotonic()
        say(tokens=fresh)


if __name__ == "__main__":
    main()
