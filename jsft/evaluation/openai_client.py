"""A client for OpenAI-compatible servers: httpx2 with bounded retries, a limit on the whole call, one-line errors.

Busy servers (429), server errors (5xx), time-outs, broken connections and broken answers are retried, after growing
pauses or the server's Retry-After. Everything else is an error at once. openai's own client would need the same loop:
it accepts answers of any shape, and limits neither the whole call nor where a key is sent.
"""

import asyncio
import email.utils
import functools
import json
import random
import ssl
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import httpx2

from jsft.errors import ConfigError
from jsft.evaluation import keys
from jsft.evaluation.shapes import BrokenAnswer, ModelList, ServedModel, ServerError, message_text

__all__ = ["BrokenAnswer", "OpenAIClient", "ServerError", "message_text"]

ATTEMPTS = 6
LONGEST_PAUSE = 60.0  # seconds
CONNECT_SECONDS = 30.0
FACTS_SECONDS = 60.0  # for answers that a server only looks up
LARGEST = 64 << 20  # bytes of an answer; a response of 32,768 tokens is far below one MiB
REDIRECTS = 5  # within one server
NO_JSON = "an answer that is no JSON object"
AGAIN = (408, 409, 425, 429)  # and all from 500

Read = TypeVar("Read")


class OpenAIClient:
    """Asks one server. Thread-safe; its connections live in a separate thread."""

    def __init__(self, url: str, *, role: str = "url", timeout: float = 120.0, pause: float = 1.0):
        """`url`: with or without /v1. `role`: 'url' or a judge's: whose key is sent. `timeout`, `pause`: seconds for
        one whole answer, and of the first pause. Raises ConfigError."""
        self.url = _checked(url).removesuffix("/v1") + "/v1"
        self.role, self.timeout, self.pause = role, timeout, pause
        key = keys.key_for(self.url, role)
        self._key_sent = key is not None
        try:
            self._http = httpx2.AsyncClient(
                headers={"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})},
                timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
                limits=httpx2.Limits(max_connections=None),
                verify=_certificates(),
                # For this machine no proxy of the environment is used: it would read the key.
                trust_env=not keys.is_loopback(self.url),
            )
        except (ImportError, ValueError, httpx2.InvalidURL) as error:  # SOCKS needs a package of its own
            reason = keys.hidden(str(error))
            raise ConfigError(
                f"the environment's proxy cannot be used for {self.url}: {reason}; see NO_PROXY"
            ) from None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)  # the thread ends with its client

    def post(self, path: str, body: dict[str, Any], read: Callable[[dict[str, Any]], Read] = dict) -> Read:
        """Posts JSON to /v1/<path> and returns what `read` makes of the answer. If `read` raises BrokenAnswer, the
        request is retried. Raises ServerError after the last attempt."""
        return self._ask("POST", f"{self.url}/{path}", body, read)

    def post_root(self, path: str, body: dict[str, Any], read: Callable[[dict[str, Any]], Read] = dict) -> Read:
        """Posts JSON to /<path>, outside /v1 (vLLM's own end points)."""
        return self._ask("POST", f"{self.url.removesuffix('/v1')}/{path}", body, read)

    def get_root(self, path: str) -> dict[str, Any]:
        """Gets /<path>, outside /v1."""
        return self._ask("GET", f"{self.url.removesuffix('/v1')}/{path}", None, dict)

    def models(self) -> list[ServedModel]:
        """What the server serves (/v1/models)."""
        return self._ask("GET", f"{self.url}/models", None, ModelList.read).data or []

    def _ask(self, method: str, url: str, body: dict[str, Any] | None, read: Callable[[dict[str, Any]], Read]) -> Read:
        seconds = self.timeout if body is not None else min(self.timeout, FACTS_SECONDS)
        kind, problem = ServerError, ""
        for attempt in range(ATTEMPTS):
            wait = min(self.pause * 2**attempt, LONGEST_PAUSE) * random.uniform(0.8, 1.2)
            kind = ServerError
            try:
                status, headers, content = self._exchange(method, url, body, seconds)
                if status < 300:
                    return read(_parsed(content))
                problem = f"HTTP {status} {_said(content)}".strip()
                if status not in AGAIN and status < 500:
                    raise ServerError(f"{url}: {problem}{self._hint(status)}", status)
                wait = _retry_after(headers.get("Retry-After", ""), wait)
            except TimeoutError:
                kind, problem = BrokenAnswer, f"no answer within {seconds:g} s"
            except BrokenAnswer as error:
                kind, problem = BrokenAnswer, str(error)
            except httpx2.ConnectTimeout:
                problem = f"no connection within {CONNECT_SECONDS:g} s"
            except (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError) as error:
                kind, problem = BrokenAnswer, f"the connection broke ({error or type(error).__name__})"
            except (httpx2.HTTPError, httpx2.InvalidURL, OSError, UnicodeError, OverflowError) as error:
                problem = f"no connection ({error or type(error).__name__})"
            if attempt + 1 < ATTEMPTS:
                time.sleep(wait)
        raise kind(f"{url}: {problem}, {ATTEMPTS} times")

    def _exchange(
        self, method: str, url: str, body: dict[str, Any] | None, seconds: float
    ) -> tuple[int, httpx2.Headers, bytes]:
        """One attempt: status, headers, body. Raises TimeoutError where all of it takes longer than `seconds`."""

        async def exchange() -> tuple[int, httpx2.Headers, bytes]:
            async with asyncio.timeout(seconds):  # httpx2's own limits are for the time between two pieces
                # json.dumps escapes what UTF-8 cannot hold (half a surrogate pair in a prompt); httpx2 does not.
                content = None if body is None else json.dumps(body).encode()
                request = self._http.build_request(method, url, content=content)
                for _ in range(REDIRECTS + 1):
                    response = await self._http.send(request, stream=True)
                    try:
                        if response.next_request is None:
                            return response.status_code, response.headers, await _whole(response)
                        if response.next_request.url.origin != request.url.origin:
                            where = f"{response.next_request.url.copy_with(query=None)}"
                            raise ServerError(f"{url}: it redirects to another server ({where}); name that one")
                        request = response.next_request
                    finally:
                        await response.aclose()
                raise ServerError(f"{url}: it redirects again and again")

        return asyncio.run_coroutine_threadsafe(exchange(), self._loop).result()

    def _hint(self, status: int) -> str:
        if status not in (401, 403) or self._key_sent:
            return ""
        return f"; {keys.missing_key(self.url, self.role)}"


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Cached: loading takes a quarter of a second."""
    return httpx2.create_ssl_context()


def _checked(url: str) -> str:
    """The URL without a slash at its end. What might be a secret is not shown."""
    try:
        parts = httpx2.URL(url)
        known = parts.scheme in ("http", "https") and bool(parts.host)
    except httpx2.InvalidURL:
        known = False
    if not known:
        raise ConfigError(f"'{keys.hidden(url)}' is no URL; it must begin with http:// or https://")
    if parts.userinfo or parts.query or parts.fragment:
        raise ConfigError(
            f"the URL of {parts.host} holds more than host, port and path; "
            "a key goes into the environment (docs/evaluation.md)"
        )
    return url.rstrip("/")


async def _whole(response: httpx2.Response) -> bytes:
    content = bytearray()
    try:
        async for piece in response.aiter_bytes():
            content += piece
            if len(content) > LARGEST:
                raise BrokenAnswer(f"an answer of more than {LARGEST >> 20} MiB")
    except httpx2.DecodingError:
        raise BrokenAnswer(NO_JSON) from None
    return bytes(content)


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(content or b"{}")  # some end points only say that it is done
    except (ValueError, RecursionError):
        raise BrokenAnswer(NO_JSON) from None
    if not isinstance(answer, dict):
        raise BrokenAnswer(NO_JSON)
    return answer


def _said(content: bytes) -> str:
    """The server's own words about an error, in one short line."""
    text = content.decode("utf-8", "replace")
    try:
        body = json.loads(text)
        inner = body.get("error", body)
        text = str(inner.get("message", inner) if isinstance(inner, dict) else inner)
    except (ValueError, AttributeError, RecursionError):
        pass
    return keys.hidden(" ".join(text.split()))[:200]


def _retry_after(said: str, otherwise: float) -> float:
    """Seconds to wait by a server's Retry-After (a number or a date), at most LONGEST_PAUSE; `otherwise` where it is
    missing or unusable."""
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(said).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return otherwise
    return min(seconds, LONGEST_PAUSE) if seconds > 0 else otherwise
