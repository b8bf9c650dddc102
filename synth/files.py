"""Files that are written whole or not at all: a temporary name beside the target, then a rename."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaces(path: Path) -> Iterator[Path]:
    """Yield a temporary path in path's folder; on success it takes path's place.

    The data are flushed to disk before the rename, so that a crash leaves the old file or the new
    one. On any error the temporary file is removed and an existing target stays as it was.

    Args:
        path: the file to write; its folder is created when missing.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # the writer may choose its format by suffix, so the temporary name keeps all of them
    handle, name = tempfile.mkstemp(prefix=".writing-", suffix="-" + path.name, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.filename is None:  # as with a full disk
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write text to path in UTF-8, whole or not at all.

    Raises:
        OSError: as for replaces.
    """
    with replaces(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def make_folder(folder: Path, option: str) -> None:
    """Make a folder and those above it, where missing.

    Args:
        folder: what option names.
        option: as a user gives it.

    Raises:
        ValueError: it, or one above it, is a file.
        OSError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        in_the_way = next(path for path in (folder, *folder.parents) if path.exists())
        raise ValueError(
            f"{option} needs a folder, and {in_the_way} is a file; choose another {option}"
        ) from error


def cache_folder() -> Path:
    """Where things that can be made again are kept: $BIOINSTRUCT_CACHE, else the user's cache."""
    if own := os.environ.get("BIOINSTRUCT_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # the XDG rules say that a relative path is to be ignored
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "bioinstruct"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
