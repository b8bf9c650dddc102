"""What stops a run: one sentence, the right exit code, nothing lost, and the same command goes on.

Every run is a process of its own; after each stop it is carried to its end, and the records must be
those of a run that nothing stopped.
"""

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bioinstruct.synth import generate
from bioinstruct.synth.generation import RECORDS
from bioinstruct.synth.journal import NAME
from bioinstruct.synth.totals import read_totals

N = 120
Command = Callable[..., list[str]]
End = Callable[[Path], bytes]


@pytest.fixture
def command(server: Any, seeds: Path) -> Command:
    def make(out: Path, *more: object, url: str = "") -> list[str]:
        args = ["generate", "--out", out, "--n", N, "--base-url", url or server.url]
        args += ["--seeds", seeds, "--price-in", 1, "--price-out", 2, "--budget", "none"]
        model = [] if "--model" in more else ["--model", "local"]
        line = [sys.executable, "-m", "bioinstruct.synth.cli", *args, *model, *more]
        return [str(arg) for arg in line]

    return make


@pytest.fixture
def end(server: Any, seeds: Path) -> End:
    """Carry a run to its end; return its records."""

    def make(out: Path) -> bytes:
        generate(
            out=out,
            n=N,
            base_url=server.url,
            seeds=seeds,
            model="local",
            price_in=1.0,
            price_out=2.0,
            budget=float("inf"),
        )
        return (out / RECORDS).read_bytes()

    return make


@pytest.fixture
def whole(end: End, tmp_path: Path) -> bytes:
    """The records of a run that nothing stops."""
    return end(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", "size=40k", "none", str(folder)]
    if subprocess.run(line, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def stopped(line: list[str], code: int, **more: Any) -> str:
    """Run a command that must stop; return its last sentence, the only one beside progress."""
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, **more)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    assert done.stdout == ""
    said = done.stderr.splitlines()
    assert sum(text.startswith(("error:", "stopped")) or "budget of" in text for text in said) == 1
    return said[-1]


@pytest.mark.parametrize(("size", "name"), [("40k", NAME), ("96k", RECORDS)])
def test_a_full_disk(
    command: Command, small_disk: Path, whole: bytes, end: End, size: str, name: str
) -> None:
    out = small_disk / "run"
    subprocess.run(["mount", "-o", f"remount,size={size}", str(small_disk)], check=True)
    said = stopped(command(out), 1)
    assert said == f"error: No space left on device: {out / name}"
    received = read_totals(out / NAME).received
    assert received > 0
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    assert end(out) == whole
    assert read_totals(out / NAME).received >= received


def test_a_file_that_may_grow_no_further(
    command: Command, tmp_path: Path, whole: bytes, end: End
) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    out = tmp_path / "run"
    said = stopped(command(out), 1, preexec_fn=limit)
    assert said.startswith("error: ")
    assert said.endswith(f": {out / NAME}")
    assert end(out) == whole


def test_a_read_only_folder(
    command: Command, server: Any, small_disk: Path, whole: bytes, end: End
) -> None:
    sent = len(server.seen)
    out = small_disk / "run"
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert stopped(command(out), 1) == f"error: Read-only file system: {out}"
    assert len(server.seen) == sent
    subprocess.run(["mount", "-o", "remount,rw,size=9m", str(small_disk)], check=True)
    assert end(out) == whole


@pytest.mark.parametrize(("field", "value", "said"), [
    ("key", "another", "refuses the key (HTTP 401"),
    ("error", (404, {"message": "no model 'local'"}), "knows no model 'local'"),
    ("error", (429, {"code": "insufficient_quota", "message": "pay"}), "has no credit left"),
    ("content", " ", "nothing was kept of 64 answers in a row"),
    ("usage_extra", 50_000, "does not keep to the output cap"),
])  # fmt: skip
def test_an_endpoint_that_is_no_use(
    command: Command,
    server: Any,
    tmp_path: Path,
    end: End,
    field: str,
    value: object,
    said: str,
) -> None:
    out = tmp_path / "run"
    before = getattr(server.behaviour, field)
    setattr(server.behaviour, field, value)
    assert said in stopped(command(out), 1)
    setattr(server.behaviour, field, before)
    if field in ("key", "error"):  # the other answers were bought, and stay
        assert end(out).count(b"\n") == N
    totals = read_totals(out / NAME)
    assert totals.received == sum(server.bought().values())
    assert not totals.open


def test_nothing_listens(command: Command, tmp_path: Path, whole: bytes, end: End) -> None:
    out = tmp_path / "run"
    said = stopped(command(out, url="http://127.0.0.1:1/v1"), 1)
    assert said.startswith("error: cannot reach http://127.0.0.1:1/v1: ")
    assert read_totals(out / NAME).spent == 0
    assert end(out) == whole


def test_a_host_that_no_name_server_knows(
    command: Command, tmp_path: Path, whole: bytes, end: End
) -> None:
    out = tmp_path / "run"
    said = stopped(command(out, "--api-key-env", "PATH", url="https://nowhere.invalid/v1"), 1)
    assert said.startswith("error: cannot reach https://nowhere.invalid/v1: ")
    assert end(out) == whole


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--base-url", "http://127.0.0.1:99999/v1"], "--base-url must be like"),
        (["--base-url", "http://127.0.0.1:port/v1"], "--base-url must be like"),
        (["--base-url", "http://[::1/v1"], "--base-url must be like"),
        (["--base-url", "ftp://127.0.0.1/v1"], "--base-url must be like"),
        (["--base-url", "https://a.invalid/v1?version=1"], "--base-url must be like"),
        (["--base-url", "https://a .invalid/v1"], "--base-url must be like"),
        (["--base-url", "https://me:sesame@a.invalid/v1"], "--base-url must hold no password"),
        (["--base-url", "http://127.0.0.1/v1/chat/completions"], "ends before /chat/completions"),
        (["--out", "{file}"], "--out needs a folder, and {file} is a file; choose another --out"),
        (["--out", "{file}/a/b"], "--out needs a folder, and {file} is a file"),
        (["--cache", "{file}"], "--cache needs a folder, and {file} is a file"),
        (["--seeds", "{folder}"], "Is a directory: {folder}"),
        (["--seeds", "{file}"], "{file} is empty"),
        (["--seeds", "{folder}/none"], "No such file or directory: {folder}/none"),
    ],
    ids=lambda value: value if isinstance(value, str) else "=".join(value),
)
def test_what_a_user_may_get_wrong(
    command: Command, server: Any, tmp_path: Path, option: list[str], said: str
) -> None:
    (tmp_path / "file").touch()
    places = {"file": tmp_path / "file", "folder": tmp_path}
    line = command(tmp_path / "run", *(part.format(**places) for part in option))
    assert said.format(**places) in stopped(line, 1)
    assert server.seen == []


@pytest.mark.parametrize("ending", ["bom", "crlf"])
def test_seeds_as_other_systems_write_them(
    command: Command, seeds: Path, tmp_path: Path, whole: bytes, ending: str
) -> None:
    raw = seeds.read_bytes()
    seeds.write_bytes(b"\xef\xbb\xbf" + raw if ending == "bom" else raw.replace(b"\n", b"\r\n"))
    subprocess.run(command(tmp_path / "run"), check=True, capture_output=True)
    assert (tmp_path / "run" / RECORDS).read_bytes() == whole


def test_no_budget_at_all(command: Command, server: Any, tmp_path: Path) -> None:
    said = stopped(command(tmp_path / "run", "--budget", 0), 3)
    assert said.endswith("0 of 120 records are there; raise it with --budget")
    assert server.seen == []


def test_an_answer_of_a_megabyte(command: Command, server: Any, tmp_path: Path) -> None:
    long = {"instruction": "Summarise the long note.", "input": "a", "output": "b " * 2**19}
    server.behaviour.content = json.dumps({"tasks": [long]})
    out = tmp_path / "run"
    line = command(out, "--max-tokens", 400_000)
    line[line.index("--n") + 1] = "1"
    subprocess.run(line, check=True, capture_output=True)
    assert (out / RECORDS).stat().st_size > 2**20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals(
    command: Command, server: Any, tmp_path: Path, whole: bytes, end: End, number: signal.Signals
) -> None:
    out, sent = tmp_path / "run", len(server.seen)
    server.behaviour.latency_s = 2.0
    line = command(out, "--concurrency", 2)
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    while len(server.seen) < sent + 4:
        time.sleep(0.01)
    second = stopped(line, 1)
    assert second == (
        f"error: another process is working on {out}; wait for it to end, or choose another --out"
    )
    process.send_signal(number)
    said = process.communicate(timeout=20)[1].splitlines()[-1]
    if number != signal.SIGKILL:
        assert process.returncode == 3
        assert said.startswith("stopped with ")
        assert said.endswith("; the same command goes on")
        totals = read_totals(out / NAME)
        assert not totals.open
        assert totals.received == len(server.seen) - sent
    server.behaviour.latency_s = 0.0
    assert end(out) == whole
