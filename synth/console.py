"""How every command of this project meets its user: exit codes, one-sentence errors, progress.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 stopped and resumable (Ctrl-C, SIGTERM).
Results go to stdout and files; progress, warnings and errors go to stderr.
"""

import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import click

PLAIN_EVERY_S = 10.0  # a line this often where stderr is no terminal


class Stopped(Exception):
    """Work was interrupted at a point from which it can go on; the text says how."""


def run(command: click.Command, args: Sequence[str] | None = None) -> NoReturn:
    """Run a click command and exit with the project's codes.

    ValueError and OSError are the user's to mend and become one sentence; any other exception is
    ours and is named as such. `--debug` anywhere among the arguments shows the traceback.
    """
    argv = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        sys.exit(command.main(argv, standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("stopped before the end; nothing half-written was left behind", 3)
    except Stopped as stop:
        _fail(str(stop), 3)
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away; python would complain once more at exit
        sys.exit(1)
    except (ValueError, OSError) as error:
        if debug:
            raise
        _fail(f"error: {_sentence(error)}", 1)
    except Exception as error:
        if debug:
            raise
        name = type(error).__name__
        _fail(f"internal error ({name}): {_sentence(error)}; --debug shows where", 1)


class _Voice:
    muted = False


def mute() -> None:
    """Print nothing from now on: of several processes that do one thing together, one speaks."""
    _Voice.muted = True


def note(text: str) -> None:
    """Print one line for the user to stderr."""
    if not _Voice.muted:
        print(text, file=sys.stderr, flush=True)


class Progress:
    """A bar on a terminal, a plain line now and then otherwise, both with the time left.

    Args:
        label: what is being done.
        total: how many units it takes, >= 0.
    """

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total = label, total
        self.start_s = self.printed_s = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def update(self, done: int, detail: str = "") -> None:
        """Show that done of total units are finished."""
        now_s = time.monotonic()
        wait_s = 0.1 if self.terminal else PLAIN_EVERY_S
        if done < self.total and now_s - self.printed_s < wait_s:
            return
        self.printed_s = now_s
        if _Voice.muted:
            return
        elapsed_s = now_s - self.start_s
        left_s = elapsed_s / done * (self.total - done) if done else None
        text = f"{self.label} {done}/{self.total} {_clock(elapsed_s)} gone, {_clock(left_s)} left"
        text = f"{text}  {detail}" if detail else text
        if not self.terminal:
            note(text)
            return
        filled = 24 * done // max(self.total, 1)
        bar = "#" * filled + "." * (24 - filled)
        end = "\n" if done >= self.total else ""
        print(f"\r\x1b[K[{bar}] {text}", end=end, file=sys.stderr, flush=True)


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    return str(error) or repr(error)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _fail(text: str, code: int) -> NoReturn:
    note(text)
    sys.exit(code)
