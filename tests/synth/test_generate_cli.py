"""The commands that make records, as their user meets them; and the server that tests them."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bioinstruct.synth.cli import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(shell: Run) -> Run:
    return partial(shell, cli)


@pytest.fixture
def given(server: Any, seeds: Path, tmp_path: Path) -> list[object]:
    args = ["generate", "--out", tmp_path / "run", "--model", "local", "--base-url", server.url]
    return [*args, "--seeds", seeds, "--price-in", 1, "--price-out", 2]


def test_a_run_and_its_status(run: Run, given: list[object], tmp_path: Path) -> None:
    code, out, err = run(*given, "--n", 30, "--budget", "none")
    assert (code, out) == (0, "")
    assert "30 records in" in err
    assert "charged; dropped: " in err
    code, out, err = run("status", tmp_path / "run")
    assert (code, err) == (0, "")
    assert "records   30 of 30 (done)" in out
    assert "budget none" in out


def test_a_used_up_budget_is_exit_3(run: Run, given: list[object], tmp_path: Path) -> None:
    code, _, err = run(*given, "--n", 300, "--budget", "0.03")
    assert code == 3
    assert "the budget of $0.0300 leaves no room" in err
    assert "raise it with --budget, or choose --n" in err
    code, out, _ = run("status", tmp_path / "run")
    assert code == 0
    assert "of 300\n" in out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--n", "0"], "--n"),
        (["--n", "5", "--budget", "lots"], "neither an amount in USD nor"),
        (["--n", "5", "--budget", "-1"], "neither an amount"),
        (["--n", "5", "--budget", "nan"], "neither an amount"),
        (["--n", "5", "--format", "xml"], "--format"),
        (["--n", "5", "--dry-run", "--replay"], "exclude each other"),
        ([], "--n"),
    ],
)
def test_wrong_usage_is_exit_2(
    run: Run, given: list[object], server: Any, args: list[str], said: str
) -> None:
    code, _, err = run(*given, *args)
    assert code == 2
    assert said in err
    assert server.seen == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--temperature", "3"], "temperature must lie in 0 to 2, not 3.0"),
        (["--rouge", "0"], "0"),
        (["--concurrency", "0"], "concurrency must be positive, not 0"),
        (["--timeout", "nan"], "timeout_s must be positive, not nan"),
        (["--max-tokens", "0"], "max_tokens must lie in 1"),
        (["--seed", "-1"], "seed must lie in 0"),
        (["--prompt", "missing.txt"], "missing.txt"),
        (["--models", "missing.toml"], "missing.toml"),
        (["--replay"], "run.toml"),
    ],
)
def test_wrong_values_are_exit_1(
    run: Run, given: list[object], server: Any, args: list[str], said: str
) -> None:
    code, _, err = run(*given, "--n", "5", *args)
    assert code == 1
    assert said in err
    assert "internal error" not in err
    assert server.seen == []


def test_status_of_nothing(run: Run, tmp_path: Path) -> None:
    code, _, err = run("status", tmp_path)
    assert (code, err) == (1, f"error: No such file or directory: {tmp_path / 'run.toml'}\n")
    (tmp_path / "run.toml").write_text("a = 1")
    assert "was not written by bioinstruct-synth" in run("status", tmp_path)[2]


def test_estimate_uses_the_installed_seeds(run: Run) -> None:
    code, out, _ = run("estimate", "--n", 25_000, "--model", "gpt-4o-mini")
    assert code == 0
    assert out.startswith("25000 records: about 1731 requests")
    online, half = (float(line.split("written, $")[1].split(" ")[0]) for line in out.splitlines())
    assert half == pytest.approx(online / 2, abs=1e-4)
    assert "cap $" in out


def test_help_imports_no_client() -> None:
    code = (
        "import sys; from bioinstruct.synth.cli import cli; cli.main(['--help'], 'x', None, False)"
    )
    code += "; assert not {'aiohttp', 'asyncio', 'numpy', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_official_client_understands_the_server(server: Any) -> None:
    openai = pytest.importorskip("openai")
    server.behaviour.key = "sk-local-1"
    messages = [{"role": "user", "content": "hello"}]
    with openai.OpenAI(base_url=server.url, api_key="sk-local-1", max_retries=0) as client:
        made = client.chat.completions.create(model="m", messages=messages, max_tokens=5)
        assert made.choices[0].finish_reason == "length"
        assert made.usage.completion_tokens == 5
        whole = client.chat.completions.create(model="m", messages=messages, max_tokens=4000)
        assert len(json.loads(whole.choices[0].message.content)["tasks"]) == 17
        server.behaviour.faults = {"429": 1.0}
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="m", messages=messages, max_tokens=5)
        assert caught.value.response.headers["retry-after"] == "0.05"
    with (
        openai.OpenAI(base_url=server.url, api_key="sk-wrong-1", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.chat.completions.create(model="m", messages=messages, max_tokens=5)
