"""Answers that runs share: one file an answer, under the key of its request.

Any number of processes may use a folder at once: a file appears whole or not at all. The key leaves
out the endpoint's address, as in a journal: models that are not the same need names that differ.
"""

import contextlib
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from bioinstruct.synth.files import make_folder
from bioinstruct.synth.totals import Answer, answer_line, read_line


class Cache:
    """A folder of answers.

    Args:
        folder: it is made where missing.

    Raises:
        ValueError: it is a file.
        OSError: it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        make_folder(folder, "--cache")
        self.folder = folder

    def get(self, key: str) -> Answer | None:
        """Return an answer, marked as cached, or None.

        Raises:
            ValueError: its file is broken.
            OSError: its file cannot be read.
        """
        path = self._path(key)
        try:
            line = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            row, answer = read_line(line)
            whole = line.endswith(b"}\n") and answer is not None and answer.complete
            if answer is None or not whole or row["key"] != key:
                raise ValueError("no whole answer to this key")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: broken answer ({error}); remove the file") from error
        return replace(answer, cached=True)

    def put(self, answer: Answer) -> None:
        """Keep a whole answer, unless there is one already.

        Raises:
            OSError: it cannot be written.
        """
        path = self._path(answer.key)
        if path.exists():
            return
        path.parent.mkdir(exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(answer_line(f'{{"type":"answer","key":"{answer.key}"', answer))
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
