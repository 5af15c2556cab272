"""A client for OpenAI-compatible servers: bounded retries, time limits, one-line errors.

`busy` (429) and server errors (5xx), time-outs and broken connections are tried again with growing pauses (or
the server's Retry-After); everything else is an error at once.
"""

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from typing import Any

from jsft.data.thinking import CLOSE, OPEN
from jsft.errors import ConfigError, JsftError

ATTEMPTS = 6
LONGEST_PAUSE = 60.0  # seconds


class ServerError(JsftError):
    """A server does not answer, refuses, or answers what is not understood."""


class OpenAIClient:
    """Posts to one server. Thread-safe."""

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 120.0, pause: float = 1.0):
        """`url`: with or without /v1. `timeout`, `pause`: seconds for one answer, and of the first pause."""
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"'{url}' is no URL; it must begin with http:// or https://")
        self.url = url.rstrip("/")
        if not self.url.endswith("/v1"):
            self.url += "/v1"
        self.pause = pause
        self.timeout = timeout
        self._headers = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {key}"} if key else {}),
        }

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Posts JSON to /v1/<path>. Raises ServerError after the last attempt."""
        return self._ask("POST", f"{self.url}/{path}", body)

    def post_root(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Posts JSON to /<path>, beside /v1 (vLLM's own end points)."""
        return self._ask("POST", f"{self.url.removesuffix('/v1')}/{path}", body)

    def get_root(self, path: str) -> dict[str, Any]:
        """Gets /<path>, beside /v1."""
        return self._ask("GET", f"{self.url.removesuffix('/v1')}/{path}", None)

    def models(self) -> list[dict[str, Any]]:
        """What the server serves (/v1/models)."""
        answer = self._ask("GET", f"{self.url}/models", None)
        return [m for m in answer.get("data") or [] if isinstance(m, dict) and "id" in m]

    def _ask(self, method: str, url: str, body: dict[str, Any] | None) -> dict[str, Any]:
        problem = ""
        for attempt in range(ATTEMPTS):
            wait = min(self.pause * 2**attempt, LONGEST_PAUSE) * random.uniform(0.8, 1.2)
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(url, data, self._headers, method=method)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    text = response.read()
                answer = json.loads(text or b"{}")  # some end points only say that it is done
                if isinstance(answer, dict):
                    return answer
                problem = "an answer that is no JSON object"
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} {_said(error)}".strip()
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    raise ServerError(f"{url}: {problem}") from None
                try:
                    wait = min(float(error.headers.get("Retry-After", wait)), LONGEST_PAUSE)
                except ValueError:
                    pass
            except TimeoutError:
                problem = f"no answer within {self.timeout:g} s"
            except ValueError:
                problem = "an answer that is no JSON object"
            except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
                reason = getattr(error, "reason", error)
                timed_out = isinstance(reason, TimeoutError)
                problem = f"no answer within {self.timeout:g} s" if timed_out else f"no connection ({reason})"
            if attempt + 1 < ATTEMPTS:
                time.sleep(wait)
        raise ServerError(f"{url}: {problem}, {ATTEMPTS} times")


def _said(error: urllib.error.HTTPError) -> str:
    """The server's own words about an error, in one short line."""
    try:
        text = error.read().decode("utf-8", "replace")
    except OSError:
        return ""
    try:
        body = json.loads(text)
        inner = body.get("error", body)
        text = inner.get("message", inner) if isinstance(inner, dict) else inner
    except (ValueError, AttributeError):
        pass
    return " ".join(str(text).split())[:200]


def api_key(role: str | None = None) -> str | None:
    """The key from the environment: JSFT_KEY_<ROLE>, else OPENAI_API_KEY."""
    named = os.environ.get(f"JSFT_KEY_{role.upper()}") if role else None
    return named or os.environ.get("OPENAI_API_KEY")


def message_text(answer: dict[str, Any]) -> str:
    """Text of the first choice of a chat completion; thinking split off by the server is put back. Where nothing
    follows it, it was never closed: a server that found its end gives an answer too."""
    try:
        message = answer["choices"][0]["message"]
        text = message.get("content") or ""
        thoughts = message.get("reasoning") or message.get("reasoning_content")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ServerError(f"a chat completion without choices[0].message ({error})") from None
    if not thoughts:
        return text
    return f"{OPEN}{thoughts}{CLOSE}{text}" if text.strip() else f"{OPEN}{thoughts}"
