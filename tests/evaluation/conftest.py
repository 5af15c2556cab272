"""A fake OpenAI-compatible server on loopback: answers from a script, counts, misbehaves on demand."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROWS = Path(__file__).parent / "rows"


class FakeOpenAI:
    """`answer(body)` makes the text of a completion; `trouble` is a list of what to do instead, used up in
    order.

    A trouble is an HTTP status, 'hang', 'drop' (close the connection), 'rubbish' (200 and no JSON), bytes (200 and
    these), a dictionary (200 and this), or a function of the request's handler that answers by itself.
    """

    def __init__(self, answer=lambda body: "ok", model="fake-model", context=32768):
        self.answer, self.model, self.context = answer, model, context
        self.trouble: list = []
        self.requests: list[tuple[str, dict]] = []
        self.keys: list[str | None] = []  # that came with any request
        self.served = None  # what /v1/models says, in place of the model
        self.finish = "stop"
        self.device = "cuda"
        self.owner = None  # 'vllm' and 'llamacpp' say how a prompt is rendered
        self.opening = "<think>\n"  # what such a server's chat template ends with
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                fake.keys.append(self.headers["Authorization"])
                if self.path == "/server_info":
                    return self.reply(200, {"vllm_config": f"device_config={fake.device}, seed=0"})
                if fake.served is not None:
                    return self.reply(200, fake.served)
                models = [{"id": fake.model, "root": "weights", "max_model_len": fake.context}]
                if fake.owner:
                    models[0]["owned_by"] = fake.owner
                self.reply(200, {"object": "list", "data": models})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.requests.append((self.path, body))
                fake.keys.append(self.headers["Authorization"])
                trouble = fake.trouble.pop(0) if fake.trouble else None
                if trouble == "hang":
                    time.sleep(3)
                if trouble in ("hang", "drop"):
                    self.close_connection = True
                elif callable(trouble):
                    trouble(self)
                elif isinstance(trouble, (bytes, dict)):
                    self.reply(200, trouble)
                elif trouble == "rubbish":
                    self.reply(200, "<html>")
                elif trouble:
                    self.reply(trouble, {"error": {"message": f"scripted {trouble}"}})
                else:
                    self.reply(200, fake.complete(self.path, body))

            def reply(self, status, body, **headers):
                data = body
                if not isinstance(data, bytes):
                    data = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def complete(self, path, body):
        if path == "/apply-template" and self.owner == "llamacpp":
            return {"prompt": f"user\n{body['messages'][-1]['content']}\nassistant\n{self.opening}"}
        if path == "/tokenize" and self.owner == "vllm":
            text = f"user\n{body['messages'][-1]['content']}\nassistant\n{self.opening}"
            return {"tokens": [ord(character) for character in text]}
        if path == "/detokenize" and self.owner == "vllm":
            return {"prompt": "".join(map(chr, body["tokens"]))}
        said = self.answer(body)
        if path == "/pooling":
            return {"data": [{"data": said}]}
        usage = {"completion_tokens": len(str(said).split())}
        choice = {"finish_reason": self.finish, "index": 0}
        choice |= {"text": said} if path == "/v1/completions" else {"message": {"role": "assistant", "content": said}}
        return {"choices": [choice], "usage": usage}


@pytest.fixture
def fake_openai():
    """Makes fake servers; they end with the test."""
    made = []

    def make(*arguments, **options):
        made.append(FakeOpenAI(*arguments, **options))
        return made[-1]

    yield make
    for fake in made:
        fake.server.shutdown()
        fake.server.server_close()


@pytest.fixture
def rows() -> Path:
    """Folder of hand-made rows, a file per task."""
    return ROWS
