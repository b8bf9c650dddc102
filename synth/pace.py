"""When the next request may go: limits, requests and tokens per minute, pauses, requests in flight.

Rates are kept by virtual time: each request moves the moment from which the next may go by its
share of a minute, so that any window of a minute holds the limit and hardly more. Concurrency
follows AIMD: it halves once per wave of refusals and grows by one request per answered round.
"""

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

SLACK_S = 0.05  # lateness that may be caught up, so that a late timer costs no throughput
_PARTS = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s)")
_UNIT_S = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How hard the endpoint may be driven."""

    concurrency: int = 32
    """The most requests in flight."""
    rpm: float | None = None
    """Requests a minute. Default: what the endpoint's headers say."""
    tpm: float | None = None
    """Tokens a minute, likewise."""
    timeout_s: float = 600.0
    """How long a connection may take, and then each answer."""
    max_failures: int = 10
    """Failures in a row, requests in flight together counted once, that end the run."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "rpm", "tpm", "timeout_s", "max_failures"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e9:
                raise ValueError(f"{name} must be positive, not {value}")


class Pace:
    """At most per_minute units a minute, evenly spread; None for no limit."""

    def __init__(self, per_minute: float | None) -> None:
        self.per_minute, self.next_s = per_minute, 0.0

    def take(self, now_s: float, amount: float) -> None:
        """Use up amount units at a moment; negative amounts are given back."""
        if self.per_minute:
            floor_s = now_s - SLACK_S if amount > 0 else -math.inf
            self.next_s = max(self.next_s, floor_s) + amount * 60 / self.per_minute


class Gate:
    """What decides whether a request may go now.

    Args:
        concurrency: the most requests in flight, >= 1.
        rpm: requests a minute, or None to follow what the endpoint's headers say.
        tpm: tokens a minute, likewise.
    """

    def __init__(self, concurrency: int, rpm: float | None, tpm: float | None) -> None:
        self.most, self.limit = concurrency, float(concurrency)
        self.requests, self.tokens = Pace(rpm), Pace(tpm)
        self.follow_rpm, self.follow_tpm = rpm is None, tpm is None
        self.in_flight = 0
        self.paused_until_s = self.slowed_s = 0.0

    def wait_s(self, now_s: float) -> float | None:
        """Return how long to wait, 0.0 for not at all, None until something in flight ends."""
        if self.in_flight >= int(self.limit):
            return None
        next_s = max(self.paused_until_s, self.requests.next_s, self.tokens.next_s)
        return max(0.0, next_s - now_s)

    def enter(self, now_s: float, tokens: int) -> None:
        """Count a request as in flight."""
        self.in_flight += 1
        self.requests.take(now_s, 1)
        self.tokens.take(now_s, tokens)

    def pause(self, seconds: float) -> None:
        """Let nothing go for some seconds from now."""
        self.paused_until_s = max(self.paused_until_s, time.monotonic() + seconds)

    def slower(self, sent_s: float) -> bool:
        """Halve the concurrency after a refusal; False where its wave was counted already.

        Args:
            sent_s: when the refused request was sent; only what was sent after the last slowing
                says something new.
        """
        if sent_s < self.slowed_s:
            return False
        self.slowed_s = time.monotonic()
        self.limit = max(1.0, self.limit / 2)
        return True

    def faster(self) -> None:
        """Grow after an answer."""
        self.limit = min(float(self.most), self.limit + 1 / self.limit)

    def heed(self, headers: Mapping[str, str]) -> None:
        """Follow the endpoint's own account of its limits, where it gives one."""
        for name, pace, follow in (
            ("requests", self.requests, self.follow_rpm),
            ("tokens", self.tokens, self.follow_tpm),
        ):
            limit = headers.get(f"x-ratelimit-limit-{name}")
            if limit is None:
                continue
            if follow and limit.isdecimal() and int(limit) > 0:
                pace.per_minute = int(limit)
            if headers.get(f"x-ratelimit-remaining-{name}") == "0":
                self.pause(duration_s(headers.get(f"x-ratelimit-reset-{name}", "")))


def duration_s(text: str) -> float:
    """Return the seconds of a duration such as 6m0s, 20ms or 1.5s; 0 for anything else."""
    if _PARTS.sub("", text):
        return 0.0
    return sum(float(number) * _UNIT_S[unit] for number, unit in _PARTS.findall(text))


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return how long a refusal asks to wait: Retry-After in seconds or as a date, or in ms."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit_s
        except ValueError:
            continue
        if 0 <= seconds < math.inf:
            return seconds
    try:
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError, TypeError):
        return None
