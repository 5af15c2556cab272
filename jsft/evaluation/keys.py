"""Keys of servers: which key is sent where. No key is ever written.

OPENAI_API_KEY is for OpenAI's hosts, for the server of OPENAI_BASE_URL and for this machine. JSFT_KEY_URL is for
`--url`, JSFT_KEY_<ROLE> for that judge, on any host. A key is sent only over https or within this machine.
"""

import ipaddress
import os
import re

import httpx2

from jsft.errors import ConfigError

GENERAL = "OPENAI_API_KEY"
SHORTEST = 6  # characters of a secret; a shorter one (EMPTY, none) is a placeholder and may be a word of an answer
SHOWN = "[key]"
_LONE = re.compile("[\ud800-\udfff]")  # halves of surrogate pairs


def own_name(role: str) -> str:
    """The variable that holds the key of one server. role: 'url', or a judge's."""
    return f"JSFT_KEY_{role.upper()}"


def key_for(url: str, role: str) -> str | None:
    """The key to send to `url`, or None. Raises ConfigError for a key that no header can hold."""
    if not is_private(url):
        return None
    if own := _value(own_name(role)):
        return own
    return _value(GENERAL) if _is_general(url) else None


def missing_key(url: str, role: str) -> str:
    """How to give `url` a key, for messages about a server that may want one."""
    if not is_private(url):
        return "a key is only sent over https, or within this machine"
    if os.environ.get(GENERAL) and not _is_general(url):
        return f"{GENERAL} is not sent to this host: give its key in {own_name(role)}"
    return f"give its key in {own_name(role)}"


def is_private(url: str) -> bool:
    """Whether nobody in between can read what is sent."""
    return httpx2.URL(url).scheme == "https" or is_loopback(url)


def is_loopback(url: str) -> bool:
    """Whether `url` is this machine."""
    host = httpx2.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_openai(url: str) -> bool:
    """Whether `url` is OpenAI's own (api.openai.com, or that of a region)."""
    return f".{httpx2.URL(url).host}".endswith(".api.openai.com")


def hidden(text: str) -> str:
    """`text` without any key of the environment and valid in UTF-8. For everything that a server says."""
    for secret in _secrets():
        text = text.replace(secret, SHOWN)
    return _LONE.sub("\ufffd", text)


def _secrets() -> list[str]:
    """All keys, the longest first: one may be the beginning of another."""
    names = [name for name in os.environ if name == GENERAL or name.startswith("JSFT_KEY_")]
    values = {os.environ[name].strip() for name in names}
    return sorted((value for value in values if len(value) >= SHORTEST), key=len, reverse=True)


def _value(name: str) -> str | None:
    value = os.environ.get(name, "").strip()
    if not (value.isascii() and value.isprintable()) or " " in value:
        raise ConfigError(f"{name} holds characters that no key has (only visible ASCII); set it again")
    return value or None


def _is_general(url: str) -> bool:
    if is_loopback(url) or is_openai(url):
        return True
    base = os.environ.get("OPENAI_BASE_URL")
    try:
        return bool(base) and httpx2.URL(base).origin == httpx2.URL(url).origin
    except (httpx2.InvalidURL, ValueError):
        raise ConfigError("OPENAI_BASE_URL is no URL; it must begin with https://, or be unset") from None
