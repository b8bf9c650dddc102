"""Prices, reservations, the table of models, bodies and their keys."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bioinstruct.synth import models, money
from bioinstruct.synth.endpoint import Endpoint, open_endpoint, read_usage
from bioinstruct.synth.estimate import from_answers
from bioinstruct.synth.money import PICO, Ledger, Prices, Usage


def test_a_million_tokens_cost_their_price() -> None:
    prices = Prices(money.per_token(2.5), money.per_token(0.075))
    assert prices.cost(Usage(10**6, 0)) == 2.5 * PICO
    assert prices.cost(Usage(0, 10**6)) == 75 * PICO // 1000
    assert prices.worst(1000, 500) == 1064 * 2_500_000 + 500 * 75_000
    assert money.per_token(0.0000001) == 1  # up, never down
    assert money.shown(money.from_usd(1234.5)) == "$1,234.5000"


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), max_size=60), st.integers(0, 300))
def test_no_order_of_requests_passes_the_cap(requests: list[tuple[int, float]], cap: int) -> None:
    ledger, bill, held = Ledger(cap), 0, []
    for worst, part in requests:
        if ledger.fits(worst):
            ledger.reserve(worst)
            held.append((worst, int(worst * part)))
        elif held:
            reserved, cost = held.pop(0)
            bill += cost
            ledger.settle(reserved, cost)
        assert bill + sum(worst for worst, _ in held) <= cap
        assert ledger.charged == bill


def test_the_key_is_the_hash_of_the_canonical_body() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "\u00e9"}], "max_tokens": 5}
    request = models.Request(body, 5)
    assert request.key == hashlib.sha256(request.body).hexdigest()
    assert json.loads(request.body) == body
    turned = models.Request(dict(reversed(body.items())), 5)
    assert turned.key == request.key
    assert models.Request({**body, "max_tokens": 6}, 6).key != request.key


def test_every_listed_model_has_a_whole_price() -> None:
    for name in ("gpt-4o", "gpt-5-mini", "o4-mini"):
        model = models.read_model(name)
        assert model.price_in and model.price_out and model.price_in < model.price_out
        assert model.cap == "max_completion_tokens"
    own = models.read_model("my-llama")
    assert (own.price_in, own.cap, own.name) == (None, "max_tokens", "my-llama")


def test_the_table_decides_the_body() -> None:
    messages = [{"role": "user", "content": "hi"}]
    reasoning = models.read_model("gpt-5")
    body = models.body(reasoning, messages, cap_tokens=9, sampling={})
    assert body == {
        "model": "gpt-5",
        "messages": messages,
        "max_completion_tokens": 9,
        "reasoning_effort": "low",
    }
    with pytest.raises(ValueError, match="gpt-5 does not take temperature .*it takes: none"):
        models.body(reasoning, messages, cap_tokens=9, sampling={"temperature": 0.5})
    own = models.body(
        models.read_model("x"), messages, cap_tokens=9, sampling={"top_p": 0.5}, response_format={}
    )
    assert own == {"model": "x", "messages": messages, "max_tokens": 9, "top_p": 0.5}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = ", "broken TOML"),
        ("x = 1", "has no entries"),
        ("[models]\ndefault = 1", "must be a table"),
        ("[models.a]\nprice = 1", r"unknown field 'price'; known are price_in"),
        ("[models.a]\nprice_in = 1", "come together"),
        ("[models.a]\nprice_in = -1\nprice_out = 1", "must be USD per million tokens, not -1"),
        ("[models.a]\nprice_in = true\nprice_out = 1", "not True"),
        ("[models.a]\nprice_in = nan\nprice_out = 1", "not nan"),
        ('[models.a]\ncap = "tokens"', "cap must be max_tokens or max_completion_tokens"),
        ('[models.a]\nsampling = ["top_k"]', "sampling lists any of"),
        ("[models.a]\nsampling = 1", "sampling lists any of"),
        ("[models.a]\nreasoning_effort = 1", "must be text"),
        ("", "is empty"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "models.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        models.read_model("a", path)


@pytest.mark.parametrize(
    ("usage", "read"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}, (5, 7)),
        ({"prompt_tokens": 5, "completion_tokens": 7}, (5, 7)),
        # reasoning that stands only in the total is billed as completion
        ({"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 40}, (5, 35)),
        ({"prompt_tokens": 5}, None),
        ({"prompt_tokens": -1, "completion_tokens": 7}, None),
        ({"prompt_tokens": 5.0, "completion_tokens": 7}, None),
        ({"prompt_tokens": True, "completion_tokens": 7}, None),
        (None, None),
        ([], None),
    ],
)
def test_usage(usage: object, read: tuple[int, int] | None) -> None:
    assert read_usage({"usage": usage}) == (Usage(*read) if read else None)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("api.openai.com/v1", "must be like https://"),
        ("ftp://host/v1", "must be like https://"),
        ("https://", "must be like https://"),
        ("https://me:secret@host/v1", "must hold no password"),
        ("https://host/v1/chat/completions", "ends before /chat/completions"),
    ],
)
def test_wrong_addresses(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        open_endpoint(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.8.8", "[::1]"])
def test_this_machine_needs_no_key(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert open_endpoint(f"http://{host}:8000/v1/") == Endpoint(f"http://{host}:8000/v1", "", True)
    with pytest.raises(ValueError, match="no key for"):
        open_endpoint("http://10.0.0.1/v1")


def test_a_key_is_checked_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K", " sk-123456\n")
    endpoint = open_endpoint("https://host/v1", "K")
    assert endpoint.key == "sk-123456"
    assert "sk-1" not in repr(endpoint)
    assert endpoint.without_key(b"bad sk-123456!") == b"bad [key]!"
    monkeypatch.setenv("K", "sk-1\n23456")
    with pytest.raises(ValueError, match="characters that no key has") as caught:
        open_endpoint("https://host/v1", "K")
    assert "sk-1" not in str(caught.value)


def test_the_new_estimate_needs_twenty_answers() -> None:
    assert from_answers(n=100, accepted=50, requests=19, spent=19) is None
    assert from_answers(n=100, accepted=0, requests=30, spent=19) is None
    assert from_answers(n=1000, accepted=300, requests=20, spent=2000) == 6700
