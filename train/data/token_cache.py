"""Token samples of a file, kept in a memory-mapped cache that any number of processes share.

An entry is a folder named by everything that determines its tokens: the file's bytes, the
tokenizer and the template, but no limit, weight or filter. It is written under another name,
flushed, and renamed, so an entry that is there is whole; what a killed process left half-written
is removed by the next that writes the same entry.

The processes of one machine (torchrun starts one a GPU) take turns at a lock file an entry: the
first tokenizes, the others wait and then read. The lock is the kernel's and ends with its holder,
however that ends. Where a file system has no locks, each process tokenizes for itself and the last
to rename finds the entry there.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bioinstruct.model.templates import Template
from bioinstruct.model.tokenizers.tokenizer import Tokenizer
from bioinstruct.synth.console import note
from bioinstruct.synth.files import cache_folder
from bioinstruct.synth.records import read_records
from bioinstruct.train.data.tokens import (
    Encoded,
    Labels,
    Limits,
    TokenSet,
    encode_all,
    limited,
    places_of,
)

FORMAT = 2
"""Of the entries; part of their key, so that older ones are not met."""
REPORT = "report.json"
_ARRAYS = "tokens", "sizes", "prompts", "lines", "records", "last", "empty", "sources", "categories"


def load_tokens(path: Path, template: Template, tokenizer: Tokenizer, limits: Limits) -> TokenSet:
    """Read and encode a file of records, or take its tokens from the cache; tell what is left out.

    Raises:
        ValueError: as for read_records, encode_all and limited.
        OSError: a file cannot be read, or the cache cannot be written.
    """
    tokens, notes = limited(load_encoded(path, template, tokenizer), limits)
    for line in notes:
        note(line)
    return tokens


def load_encoded(path: Path, template: Template, tokenizer: Tokenizer) -> Encoded:
    """Every sample of one file, before any limit.

    Raises:
        ValueError: as for read_records and encode_all.
        OSError: a file cannot be read, or the cache cannot be written.
    """
    folder = cache_folder() / "tokens" / _key(path, template, tokenizer)
    if not _whole(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _turn(folder.with_suffix(".lock")):
            if not _whole(folder):
                _store(folder, encode_all(read_records(path), template, tokenizer), path)
    return _open(folder, path)


def _key(path: Path, template: Template, tokenizer: Tokenizer) -> str:
    facts = [str(FORMAT), version("bioinstruct"), repr(template), tokenizer.fingerprint]
    digest = hashlib.sha256("\0".join(facts).encode())
    with path.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def _whole(folder: Path) -> bool:
    return (folder / REPORT).is_file()


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Hold the lock of an entry; wait for whoever holds it."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note("another process is tokenizing the same records; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            # no locks here: the rename at the end is safe without
            pass
        yield


def _store(folder: Path, encoded: Encoded, path: Path) -> None:
    tokens, name = encoded.samples, folder.name
    for left in folder.parent.glob(f".writing-{name}-*"):
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".writing-{name}-", dir=folder.parent))
    # an entry may serve a file of equal bytes and another name, so its name is left out
    own = str(path)
    report = {
        "sources": ["" if source == own else source for source in tokens.sources.names],
        "categories": tokens.categories.names,
        "lacking": encoded.lacking,
    }
    arrays: dict[str, NDArray[Any]] = {
        "tokens": tokens.arrays[0],
        "sizes": tokens.sizes,
        "prompts": tokens.prompts,
        "lines": np.array([_line(place, own) for place in tokens.places], dtype=np.int64),
        "records": tokens.records,
        "last": encoded.last,
        "empty": encoded.empty,
        "sources": tokens.sources.ids,
        "categories": tokens.categories.ids,
    }
    try:
        for array in _ARRAYS:
            with (temporary / f"{array}.npy").open("wb") as file:
                np.save(file, arrays[array])
                _flush(file)
        with (temporary / REPORT).open("w", encoding="utf-8") as text:
            json.dump(report, text)
            _flush(text)
        try:
            temporary.rename(folder)
        except OSError:
            # without locks another process may have been faster; its entry holds the same
            if not _whole(folder):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _line(place: str, path: str) -> int:
    return int(place[len(path) + 1 :].partition(" ")[0])


def _open(folder: Path, path: Path) -> Encoded:
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    found = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
    sources = tuple(source or str(path) for source in report["sources"])
    numbers, lines = np.array(found["records"]), found["lines"].tolist()
    tokens = TokenSet.laid(
        found["tokens"],
        np.array(found["sizes"]),
        np.array(found["prompts"]),
        places_of([str(path)] * len(lines), lines, numbers),
        numbers,
        Labels(sources, np.array(found["sources"])),
        Labels(tuple(report["categories"]), np.array(found["categories"])),
    )
    lacking = {int(sample): codes for sample, codes in report["lacking"].items()}
    return Encoded(tokens, np.array(found["last"]), np.array(found["empty"]), lacking)
