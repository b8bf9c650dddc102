"""Rates, pauses and concurrency, on a clock of the test's own."""

import time
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bioinstruct.synth import pace
from bioinstruct.synth.pace import Gate, duration_s, retry_after_s


@given(
    st.integers(1, 3000), st.lists(st.floats(0, 0.4), min_size=1, max_size=300), st.integers(1, 9)
)
def test_no_minute_holds_more_than_the_limit(rpm: int, gaps: list[float], per: int) -> None:
    gate = Gate(10**6, rpm, None)
    now_s, sent = 1000.0, []
    for gap in gaps:
        for _ in range(per):
            now_s += gate.wait_s(now_s) or 0.0
            gate.enter(now_s, 1)
            sent.append(now_s)
        now_s += gap
    slack = 1 + pace.SLACK_S * rpm / 60
    for start in sent:
        assert sum(start <= s < start + 60 - 1e-6 for s in sent) <= rpm + slack


def test_tokens_are_settled() -> None:
    gate = Gate(10, None, 60.0)
    gate.enter(100.0, 30)
    assert gate.wait_s(100.0) == pytest.approx(30 - pace.SLACK_S)
    gate.tokens.take(100.0, -20)
    assert gate.wait_s(100.0) == pytest.approx(10 - pace.SLACK_S)


def test_concurrency_halves_once_a_wave_and_grows_by_one_a_round() -> None:
    gate = Gate(8, None, None)
    sent_s = time.monotonic()
    assert gate.slower(sent_s)
    assert not gate.slower(sent_s)
    assert gate.limit == 4
    for _ in range(5):
        gate.faster()
    assert 5 < gate.limit < 5.3
    for _ in range(100):
        gate.faster()
    assert gate.limit == 8
    for _ in range(10):
        gate.slower(time.monotonic())
    assert gate.limit == 1
    gate.enter(0.0, 1)
    assert gate.wait_s(0.0) is None


def test_headers_are_heeded() -> None:
    gate = Gate(8, None, 100.0)
    limits = {"x-ratelimit-limit-requests": "600", "x-ratelimit-limit-tokens": "5"}
    gate.heed(limits)
    assert (gate.requests.per_minute, gate.tokens.per_minute) == (600, 100.0)  # a flag wins
    before_s = time.monotonic()
    left = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m2s"}
    gate.heed(limits | left)
    assert gate.paused_until_s >= before_s + 62


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("6m0s", 360),
        ("20ms", 0.02),
        ("1.5s", 1.5),
        ("1h2m", 3720),
        ("", 0),
        ("soon", 0),
        ("-1s", 0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "2"}, 2),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(headers) == seconds


def test_retry_after_as_a_date() -> None:
    told_s = retry_after_s({"retry-after": formatdate(time.time() + 30, usegmt=True)})
    assert told_s is not None
    assert 28 < told_s <= 30
    assert retry_after_s({"retry-after": formatdate(0, usegmt=True)}) == 0
