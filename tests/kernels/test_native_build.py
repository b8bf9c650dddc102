"""The library in C is made, kept and found again, whatever compiler and cache there are."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bioinstruct.kernels import dispatch, linear_cross_entropy, native, rmsnorm, swiglu

COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
CPU, FLOAT = torch.device("cpu"), torch.float32


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache and a folder for temporary files of the test's own, and no library loaded yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("BIOINSTRUCT_CACHE", str(folder))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.delenv("CC", raising=False)
    return folder


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    return tmp_path / "temporary"


Script = Callable[[str], Path]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Make $CC a shell script."""

    def write(text: str) -> Path:
        path = tmp_path / "own cc"
        path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec {COMPILER} --version\n{text}\n')
        path.chmod(0o755)
        monkeypatch.setenv("CC", f"'{path}'")
        return path

    return write


def results() -> list[torch.Tensor]:
    """What some operations give, gradients included."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 34, generator=generator).requires_grad_()
    w, head = torch.randn(34, generator=generator), torch.randn(9, 17, generator=generator)
    h = swiglu(rmsnorm(x, w))
    loss = linear_cross_entropy(h, head, torch.tensor([0, 3]), torch.tensor([8, 1]))
    return [h.detach(), loss.detach(), *torch.autograd.grad(loss, x)]


def assert_in_c() -> None:
    with dispatch.forced("reference"):
        wanted = results()
    library, told = native.loaded(FLOAT)
    assert library is not None
    assert native.operations(CPU, FLOAT) == native.used() == f"C ({told})"
    assert native.why_slower(CPU, FLOAT) is None
    for mine, theirs in zip(results(), wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def assert_in_torch(capfd: pytest.CaptureFixture[str], reason: str) -> None:
    """Everything runs, by torch's own operations, and none of them says anything."""
    with dispatch.forced("reference"):
        wanted = results()
    found = results()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))
    assert capfd.readouterr() == ("", "")
    library, told = native.loaded(FLOAT)
    assert library is None and told == reason
    assert native.operations(CPU, FLOAT) == native.used() == f"torch ({reason})"
    assert native.why_slower(CPU, FLOAT) == reason


# ---- compilers ----------------------------------------------------------------------------------


def test_no_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_in_torch(capfd, "there is no cc, gcc or clang, and $CC names no other")


@pytest.mark.parametrize("name", ["icc-of-long-ago", "/no/such/cc", "'half a quotation"])
def test_a_compiler_that_is_not_there(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC", f"{name}")
    assert_in_torch(capfd, f"there is no {name}, which $CC asks for")


@needs_compiler
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("exit 7", "{} failed: exit code 7"),
        ("echo In file: >&2; echo 'error: too old' >&2; exit 1", "{} failed: error: too old"),
        ("exit 0", "{} made no library (No such file or directory)"),
        ("exec sleep 60", "{} failed: no answer within 1 s"),
        ("kill -SEGV $$", "{} failed: exit code -11"),
    ],
)
def test_a_compiler_that_fails(
    text: str,
    reason: str,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    cache: Path,
) -> None:
    monkeypatch.setattr(native, "COMPILE_S", 1.0)
    assert_in_torch(capfd, reason.format(script(text)))
    assert not list(cache.glob("*"))


@needs_compiler
def test_a_program_that_is_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cc"
    path.write_bytes(b"\0no program")
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    assert_in_torch(capfd, f"{path} failed: Exec format error")


@needs_compiler
def test_a_compiler_whose_work_cannot_be_loaded(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    junk = 'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo junk > "$2"; shift; done'
    path = script(junk)
    library, told = native.load(FLOAT)
    assert library is None and told.startswith(f"what {path} made cannot be loaded (")


REFUSES = """for option; do
[ "$option" = %s ] && {{ echo "error: unsupported option $option" >&2; exit 1; }}
done
exec {} "$@"
"""


@needs_compiler
@pytest.mark.parametrize("option", ["-fopenmp", "-march=native"])
def test_a_compiler_that_refuses_an_option(option: str, script: Script) -> None:
    script((REFUSES % option).format(COMPILER))
    assert_in_c()
    told = native.loaded(FLOAT).told
    assert told.endswith(" without OpenMP, so one thread") == (option == "-fopenmp")


@needs_compiler
def test_a_launcher_before_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    launcher = tmp_path / "my ccache"
    launcher.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/asked"\nexec "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setenv("CC", f'"{launcher}" {COMPILER} -DTHIS_TOO')
    assert_in_c()
    asked = (tmp_path / "asked").read_text().splitlines()
    assert all(line.startswith(f"{COMPILER} -DTHIS_TOO ") for line in asked)
    assert any(" -march=native " in line for line in asked) and len(list(cache.iterdir())) == 1


# ---- the cache ----------------------------------------------------------------------------------


@needs_compiler
def test_a_library_is_compiled_once(script: Script, tmp_path: Path, temporary: Path) -> None:
    script(f'echo once >> "{tmp_path}/count"\nexec {COMPILER} "$@"')
    for _ in range(3):
        assert native.load(FLOAT).library is not None
    assert (tmp_path / "count").read_text() == "once\n" * (len(native.SOURCES) + 1)
    assert not list(temporary.iterdir())


@needs_compiler
@pytest.mark.parametrize("keep", [0, 5000, -1])
def test_what_is_broken_in_the_cache_is_made_anew(keep: int, cache: Path) -> None:
    native.load(FLOAT)
    (path,) = cache.glob("*.so")
    whole = path.read_bytes()
    # a new file: the old one is in use
    path.unlink()
    path.write_bytes(whole[:keep])
    assert_in_c()
    assert [p.read_bytes() for p in cache.iterdir()] == [whole]


@needs_compiler
@pytest.mark.parametrize("place", ["a file", "below a file", "without rights", "nowhere"])
def test_a_cache_that_cannot_be_written_to(
    place: str, cache: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library serves this process alone, and leaves nothing behind."""
    if place == "without rights":
        cache.mkdir(mode=0o500)
        if os.access(cache, os.W_OK):
            pytest.skip("this user may write anywhere")
    elif place == "nowhere":

        def homeless() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(native, "cache_folder", homeless)
    else:
        cache.write_text("a file")
        monkeypatch.setenv("BIOINSTRUCT_CACHE", str(cache if place == "a file" else cache / "x"))
    assert_in_c()
    assert not list(temporary.iterdir())


@needs_compiler
def test_no_place_for_temporary_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def folder(prefix: str) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix=prefix, dir=tmp_path / "gone")

    monkeypatch.setattr(native, "tempfile", SimpleNamespace(TemporaryDirectory=folder))
    assert_in_torch(capfd, f"{COMPILER} made no library (No such file or directory)")


@needs_compiler
def test_folders_with_spaces_and_accents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ein Zwischenspeicher für C [1]", "vorläufig 'x'"):
        (tmp_path / name).mkdir()
    cache, temporary = sorted(tmp_path.glob("*vor*")), sorted(tmp_path.glob("ein*"))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary[0]))
    monkeypatch.setenv("BIOINSTRUCT_CACHE", str(cache[0]))
    assert_in_c()
    assert len(list(cache[0].iterdir())) == 1
    assert_in_c()


# ---- processes ----------------------------------------------------------------------------------

LOAD = """
import torch
from bioinstruct.kernels import native
loaded = native.load(torch.float32)
print(loaded.library is not None, native._processor())
"""


def start(**environment: str) -> subprocess.Popen[str]:
    """A process of its own group that loads the library."""
    return subprocess.Popen(
        [sys.executable, "-c", LOAD],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@needs_compiler
def test_two_processes_compile_at_once(script: Script, tmp_path: Path, cache: Path) -> None:
    # each waits for the other to have begun
    script(f"""touch "{tmp_path}/begun.$PPID"
for round in $(seq 600); do
[ $(ls "{tmp_path}" | grep -c begun) -ge 2 ] && break
sleep 0.1
done
exec {COMPILER} "$@"
""")
    processes = [start(), start()]
    told = [process.communicate() for process in processes]
    assert told[0] == told[1] == (f"True {native._processor()}\n", "")
    assert len(list(cache.iterdir())) == 1
    assert_in_c()
    assert len(list(cache.iterdir())) == 1


@needs_compiler
def test_a_killed_compilation_breaks_nothing(
    script: Script, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = script(f'touch "{tmp_path}/begun"; sleep 600')
    process = start(TMPDIR=str(tmp_path / "temporary"))
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    path.write_text(f'#!/bin/sh\nexec {COMPILER} "$@"\n')
    assert_in_c()
    assert len(list(cache.iterdir())) == 1


THREADS = """
import os, pathlib, torch
from bioinstruct.kernels import native, swiglu
torch.set_num_threads(3)
x = torch.ones(300, 600)
(x + 1).exp().sum()  # torch's own threads are there now
before = len(os.listdir("/proc/self/task"))
swiglu(x)
assert native.loaded(torch.float32).library is not None
maps = pathlib.Path("/proc/self/maps").read_text().split()
runtimes = {p for p in maps if any(n in p for n in ("libgomp", "libomp", "libiomp"))}
print(before >= 3, len(os.listdir("/proc/self/task")) - before, len(runtimes))
"""


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_its_threads_are_those_of_torch() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    done = subprocess.run(
        [sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("True 0 1\n", "")


# ---- processors ---------------------------------------------------------------------------------

X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC 9R14
cpu MHz\t\t: {mhz}
flags\t\t: fpu sse2 {flags}
bogomips\t: {mhz}

"""
ARM = "processor\t: 0\nBogoMIPS\t: {mhz}\nFeatures\t: fp {flags}\nCPU part\t: 0xd0c\n"
POWER = "processor\t: 0\ncpu\t\t: {flags}\nclock\t\t: {mhz}MHz\n"


@pytest.mark.parametrize("text", [X86, ARM, POWER], ids=["x86", "arm", "power"])
def test_a_processor_is_known_by_what_it_can(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(native, "CPUINFO", info)

    def known(mhz: float, flags: str, cores: int = 2) -> str:
        info.write_text(text.format(mhz=mhz, flags=flags) * cores)
        return native._processor()

    assert known(2595.1, "avx512f") == known(3103.7, "avx512f", 1) != known(2595.1, "avx2")
    assert "2595" not in known(2595.1, "avx512f")


@pytest.mark.parametrize("text", ["", "something else altogether\n", None])
def test_a_processor_that_says_nothing_is_known_by_its_kind(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "CPUINFO", tmp_path / "cpuinfo")
    if text is not None:
        native.CPUINFO.write_text(text)
    assert native.platform.machine() in native._processor()


def test_other_dtypes_and_choices_have_no_library() -> None:
    assert native.load(torch.float64) == (None, "there are none in float64")
    x = torch.zeros(2)
    with dispatch.forced("reference"):
        assert native.native(x) is None and native.operations(CPU, FLOAT) == "torch"
        assert native.why_slower(CPU, FLOAT) is None
    assert native.why_slower(CPU, torch.float64) is None and native.used() == ""
    assert native.native(x.double()) is None and native.native(x.to("meta")) is None
