"""Which rank died, and in which step: a pulse that every rank leaves at torchrun's store.

A process that is killed says nothing, and those that wait for it in a collective know only that it
does not come: gloo reports a closed connection without a name, NCCL waits. So every rank has a
thread that writes a pulse (a count, the step, who it is) each second and reads that of its
neighbour, the next rank. A neighbour whose pulse stands still is announced as lost under a key that
all read, and every rank ends with exit code 1; the first one says why, or its neighbour where the
first is the lost one.

Silence is forgiven for a minute, since a process may be held up; for ten seconds once there is a
sign of trouble, which is a failed collective or torchrun's SIGTERM. It is counted in beats of the
listener's own, so that a job that was suspended is not taken for dead. An error of one rank alone
is announced likewise, with its sentence; the others get some seconds to meet it themselves, because
most errors meet all ranks.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is documented

from bioinstruct.synth.console import note

BEAT_S = 1.0
SILENCE_S = 60.0
TROUBLED_SILENCE_S = 10.0
GRACE_S = 5.0
_ADVICE = "start again with --resume to go on from the newest state"


class Watch:
    """The pulse of this rank, and an ear for its neighbour's.

    Args:
        rank: this process.
        size: processes.
        end: ends the process; called from the watching thread.
    """

    def __init__(self, rank: int, size: int, end: Callable[[int], Any] = os._exit) -> None:
        self.rank, self.size, self.step, self._end = rank, size, 0, end
        self._store = _own_store()
        # a restarted job finds the keys of its last attempt in the same store
        self._prefix = f"bioinstruct/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._is_over = threading.Event()
        self._troubled = False
        self._beats = 0
        self._beat()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def begin_step(self, number: int) -> None:
        """Say which step this rank is in."""
        self.step = number
        self._beat()

    def trouble(self) -> None:
        """Be less patient from now on: something has gone wrong somewhere."""
        self._troubled = True

    def close(self) -> None:
        """Stop watching, and being watched."""
        self._is_over.set()
        self._thread.join()
        self._store.set(self._key("pulse", self.rank), json.dumps({"over": True}))

    def announce(self, sentence: str) -> None:
        """Tell all ranks why this one ends."""
        self._lose(f"rank {self.rank} failed in step {self.step}: {sentence}", self.rank)

    def verdict(self) -> str | None:
        """Wait, for as long as a silence is forgiven, for the news which rank is lost."""
        self.trouble()
        end_s = time.monotonic() + 2 * TROUBLED_SILENCE_S + 5 * BEAT_S
        while time.monotonic() < end_s:
            if lost := self._lost():
                return str(lost["why"])
            time.sleep(BEAT_S / 4)
        return None

    def _watch(self) -> None:
        neighbour = (self.rank + 1) % self.size
        pulse: dict[str, Any] = {}
        silent_beats = 0
        while not self._is_over.wait(BEAT_S):
            try:
                self._beat()
                if lost := self._lost():
                    self._follow(lost)
                heard = self._read(self._key("pulse", neighbour))
            except RuntimeError:
                # a store that is gone takes the whole job with it, and torchrun reports that
                return
            silent_beats += 1
            if heard != pulse or heard.get("over"):
                pulse, silent_beats = heard, 0
            silence_s = silent_beats * BEAT_S
            if silence_s > (TROUBLED_SILENCE_S if self._troubled else SILENCE_S):
                self._lose(_death(neighbour, pulse, silence_s), neighbour)

    def _follow(self, lost: dict[str, Any]) -> None:
        """End this process after the lost one, if it does not end by itself."""
        if lost["rank"] == self.rank or self._is_over.wait(GRACE_S):
            return
        speaker = 0 if lost["rank"] else lost["by"]
        if self.rank == speaker:
            note(f"error: {lost['why']}")
        self._end(1)

    def _beat(self) -> None:
        self._beats += 1
        pulse = {
            "beats": self._beats,
            "step": self.step,
            "host": socket.gethostname(),
            "process": os.getpid(),
        }
        self._store.set(self._key("pulse", self.rank), json.dumps(pulse))

    def _lose(self, why: str, rank: int) -> None:
        news = json.dumps({"why": why, "rank": rank, "by": self.rank})
        # the first news stands
        self._store.compare_set(self._key("lost"), "", news)

    def _lost(self) -> dict[str, Any]:
        return self._read(self._key("lost"))

    def _read(self, key: str) -> dict[str, Any]:
        if not self._store.check([key]):
            return {}
        found: dict[str, Any] = json.loads(self._store.get(key))
        return found

    def _key(self, *names: object) -> str:
        return "/".join([self._prefix, *map(str, names)])


def _own_store() -> Any:
    """A connection of the watch's own: a long wait on the group's must not hold up a pulse."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60))


def _death(rank: int, pulse: dict[str, Any], silence_s: float) -> str:
    who = f"process {pulse['process']} on {pulse['host']}" if pulse else "never heard of"
    step = f"in step {pulse['step']}" if pulse else "before its first step"
    return f"rank {rank} ({who}) died {step}, silent for {silence_s:.0f} s; {_ADVICE}"
