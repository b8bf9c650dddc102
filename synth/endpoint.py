"""An OpenAI-compatible chat endpoint: its address, its key, and what its responses mean.

The key is read from the environment, goes into one header and nowhere else: it is taken out of
every response before that is written or shown.
"""

import ipaddress
import json
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

from bioinstruct.synth.money import Prices, Usage, shown
from bioinstruct.synth.totals import Answer, Text

OPENAI = "https://api.openai.com/v1"
KEY_ENV = "OPENAI_API_KEY"
AUTHORITY = "SSL_CERT_FILE"  # OpenSSL's name for a file of authorities, and it ignores a wrong one
SAYS_SHOWN = 300  # characters of an endpoint's own words in our sentence
SHORT_KEY = 8  # characters
RETRIED = frozenset((408, 409, 425, 429))
FILTERED = frozenset(("content_filter", "content_policy_violation"))
QUOTA = frozenset(("insufficient_quota", "billing_hard_limit_reached", "billing_not_active"))


class Endpoint(NamedTuple):
    """Where requests go."""

    base_url: str
    key: str
    """Empty where none is needed."""
    local: bool
    """On this machine: nothing leaves it, and no proxy is asked."""

    @property
    def url(self) -> str:
        """The address of chat completions."""
        return f"{self.base_url}/chat/completions"

    def proxy(self) -> str | None:
        """Return the proxy that HTTPS_PROXY or HTTP_PROXY names, unless NO_PROXY excludes the host.

        It is looked up once: a client that trusts the environment looks for each request again, and
        may send a password from .netrc in place of the key.

        Raises:
            ValueError: it is no address; the text leaves it out, because it may hold a password.
        """
        parts = urlsplit(self.base_url)
        if self.local or proxy_bypass(parts.hostname or ""):
            return None
        proxy = getproxies().get(parts.scheme)
        if proxy and not _address(proxy):
            raise ValueError(
                f"{parts.scheme.upper()}_PROXY must be like http://host:3128, with http or https; "
                "correct or unset it, or name the endpoint's host in NO_PROXY"
            )
        return proxy

    def without_key(self, raw: bytes) -> bytes:
        """Return a response with the key taken out."""
        long = len(self.key) >= SHORT_KEY  # a shorter one is no secret, and stands in any text
        return raw.replace(self.key.encode(), b"[key]") if long else raw

    def __repr__(self) -> str:
        """Show the address only."""
        return f"Endpoint({self.base_url})"


def open_endpoint(base_url: str = OPENAI, key_env: str | None = None) -> Endpoint:
    """Check an address and find its key.

    Args:
        base_url: with /v1 or what stands in its place, without /chat/completions.
        key_env: the environment variable that holds the key. Default: OPENAI_API_KEY.

    Raises:
        ValueError: the address is none, or a remote endpoint has no key.
    """
    url = base_url.rstrip("/")
    parts = _address(url)
    if parts and "@" in parts.netloc:
        raise ValueError("--base-url must hold no password; pass the key with --api-key-env")
    if not parts or parts.query or parts.fragment or re.search(r"\s", url):
        raise ValueError(f"--base-url must be like {OPENAI}, not {base_url!r}")
    if url.endswith("/chat/completions"):
        raise ValueError(f"--base-url ends before /chat/completions, as in {OPENAI}")
    local = _loopback(parts.hostname or "")
    name = key_env or KEY_ENV
    key = os.environ.get(name, "").strip()
    if not key and (key_env or not local):
        raise ValueError(f"no key for {url}: set {name}, or name its variable with --api-key-env")
    if not key.isascii() or not key.isprintable():
        raise ValueError(f"the key in {name} holds characters that no key has; set it again")
    authority = os.environ.get(AUTHORITY)
    if authority and parts.scheme == "https" and not os.path.isfile(authority):
        raise ValueError(f"{AUTHORITY} names no file ({authority}); correct or unset it")
    return Endpoint(url, key, local)


def _address(url: str) -> SplitResult | None:
    """Return the parts of an address on the web, or None where it is none."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        return None
    return parts if whole else None


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_response(key: str, status: int, raw: bytes) -> Answer:
    """Read the envelope of a response: usage, served model, whether it is a whole answer.

    An answer that the endpoint's content filter refused is whole too: asking again would give the
    same. Its text is not looked at here.
    """
    value = parsed(raw)
    if status != 200:
        complete = status == 400 and error_code(value) in FILTERED
        return Answer(key, status, raw, complete=complete)
    model, fingerprint = value.get("model"), value.get("system_fingerprint")
    text = _text(value)
    return Answer(
        key,
        status,
        raw,
        read_usage(value),
        model if isinstance(model, str) else "",
        fingerprint if isinstance(fingerprint, str) else "",
        complete=text is not None,
        text=text,
    )


def charge(answer: Answer, prices: Prices, worst: int) -> int:
    """Return what a response is charged, in picodollars: all that was reserved for it where its
    bill is unknown, nothing for an error."""
    if answer.status != 200:
        return 0
    return prices.cost(answer.usage) if answer.usage else worst


def overbilled(answer: Answer, cost: int, worst: int) -> ValueError | None:
    """Return what to raise where a bill is above its reservation, or None."""
    if cost <= worst or answer.usage is None:
        return None
    return ValueError(
        f"the endpoint billed {answer.usage.prompt_tokens} + {answer.usage.completion_tokens} "
        f"tokens, {shown(cost)}, for a request whose worst case was {shown(worst)}: it does not "
        "keep to the output cap, so no budget can be kept; correct `cap` in the model's entry "
        "(--models)"
    )


def read_usage(value: Mapping[str, Any]) -> Usage | None:
    """Return the tokens billed, or None where they are missing or make no sense.

    Endpoints that leave hidden reasoning out of completion_tokens still have it in the total.
    """
    usage = value.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt, completion = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    if prompt is None or completion is None:
        return None
    return Usage(prompt, max(completion, (_count(usage, "total_tokens") or 0) - prompt))


def text_of(answer: Answer) -> Text:
    """Return the text of a whole answer; a filtered one has none."""
    return answer.text or _text(parsed(answer.raw)) or Text("", "content_filter", "")


def _text(value: Mapping[str, Any]) -> Text | None:
    message = _message(value)
    if message is None:
        return None
    finish = value["choices"][0].get("finish_reason")
    content, refusal = message.get("content"), message.get("refusal")
    return Text(
        content if isinstance(content, str) else "",
        finish if isinstance(finish, str) else "",
        refusal if isinstance(refusal, str) else "",
    )


def _message(value: Mapping[str, Any]) -> dict[str, Any] | None:
    choices = value.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return None
    message = choices[0].get("message")
    return message if isinstance(message, dict) else None


def _count(usage: Mapping[str, object], name: str) -> int | None:
    value = usage.get(name)
    return value if type(value) is int and value >= 0 else None


def parsed(raw: bytes) -> dict[str, Any]:
    """Return a response's JSON object, or an empty one where it is none."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def error_code(value: Mapping[str, Any]) -> str:
    """Return the code, or else the type, of an error response; empty where it has none."""
    error = value.get("error")
    if not isinstance(error, dict):
        return ""
    return str(error.get("code") or error.get("type") or "")


def fatal(endpoint: Endpoint, model: str, answer: Answer) -> str | None:
    """Return why a response means that no other request can succeed either, or None."""
    status, value = answer.status, parsed(answer.raw)
    said = says(answer)
    if status == 401 or status == 403:
        return f"{endpoint.base_url} refuses the key (HTTP {status}: {said}); check it"
    if status == 402 or error_code(value) in QUOTA:
        return f"the account at {endpoint.base_url} has no credit left (HTTP {status}: {said})"
    if status == 404:
        return (
            f"{endpoint.base_url} knows no model {model!r}, or the address lacks its /v1 "
            f"(HTTP 404: {said}); correct --model or --base-url"
        )
    if status != 200 and status < 500 and status not in RETRIED:
        return f"{endpoint.base_url} refuses the request (HTTP {status}: {said})"
    return None


def says(answer: Answer) -> str:
    """Return the endpoint's own words about an error, on one line, not too long."""
    error = parsed(answer.raw).get("error")
    words = error.get("message") if isinstance(error, dict) else error
    text = words if isinstance(words, str) else answer.raw.decode("utf-8", "replace")
    text = " ".join(text.split())
    return text if len(text) <= SAYS_SHOWN else f"{text[:SAYS_SHOWN]}..."
