"""What the benches share: alternating timing, statistics, the machine's description, one JSON line.

The speed of a host drifts with its clock, its heat and its neighbours. So the variants take turns,
A B C A B C, and two of them are compared by the median of their ratios, round by round: what
drifts slower than a round cancels. Peak memory is a process's own and never falls, so whatever is
measured for memory runs in a process of its own, started while its parent is still small: Linux
lets a new process inherit the parent's peak at that moment.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bioinstruct.kernels.native import operations
from bioinstruct.synth.console import Progress
from bioinstruct.train.report.metrics import peak_memory_bytes
from bioinstruct.train.report.provenance import commit, cpu_info, package_version

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
"""What decides how fast a CPU multiplies, as Linux names it."""


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of at least one value, by name."""
    p20, median, p80 = (float(v) for v in np.percentile(values, (20, 50, 80)))
    return {"median": median, "p20": p20, "p80": p80}


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios round by round; both hold one value a round."""
    return float(np.median([a / b for a, b in zip(numerators, denominators, strict=True)]))


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's queue emptied before and after."""
    _synchronise(device)
    start_s = time.perf_counter()
    call()
    _synchronise(device)
    return time.perf_counter() - start_s


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    variants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Time the variants in turn, after one round that is not counted.

    Args:
        variants: what to call, by name.
        rounds: how often each is timed, at least 1.
        device: where they run.

    Returns:
        Seconds by name, one value a round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    progress = Progress("timing", rounds + 1)
    for done in range(rounds + 1):
        for name, call in variants.items():
            duration_s = seconds_of(call, device)
            if done > 0:
                seconds[name].append(duration_s)
        progress.update(done + 1)
    return seconds


def alone_row(
    tokens: int, seconds: Sequence[float], grad_norm: float, device: torch.device
) -> dict[str, Any]:
    """What a process reports that took one variant's steps and nothing else.

    Args:
        tokens: input tokens of a step.
        seconds: of each timed step.
        grad_norm: of the last step.
        device: where they ran.
    """
    return {
        "tokens_per_s": tokens / summary(seconds)["median"],
        "peak_rss_bytes": peak_memory_bytes(torch.device("cpu")),
        "peak_gpu_bytes": None if device.type == "cpu" else peak_memory_bytes(device),
        "grad_norm": grad_norm,
    }


def run_alone(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a script of ours in its own process and return the JSON object it prints last.

    Raises:
        ValueError: the process failed; what it said went to stderr.
    """
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"{shlex.join(command)} ended with exit code {done.returncode}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def describe(device: torch.device, packages: Sequence[str] = ()) -> dict[str, Any]:
    """What a figure depends on beside the code: machine, versions, commit, command, date."""
    cpu = cpu_info()
    flags = set(cpu.get("flags", "").split())
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in flags],
        "threads": torch.get_num_threads(),
        "operations": operations(device, torch.float32),
        "versions": {
            "python": platform.python_version(),
            **{name: package_version(name) for name in ("torch", "numpy", *packages)},
        },
        "commit": commit(),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


GPU_FIELDS = (
    "clocks.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "clocks_event_reasons.active",
    "driver_version",
)
"""What nvidia-smi is asked for beside every row."""


def gpu_state(device: torch.device) -> dict[str, str] | None:
    """Clocks, power, temperature and driver at this moment, as nvidia-smi writes them.

    Returns:
        None on a CPU, and where nvidia-smi is missing or fails.
    """
    if device.type != "cuda":
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            [*command, "-i", str(device.index or 0)], capture_output=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = done.stdout.decode(errors="replace").strip().split(", ")
    if done.returncode or len(values) != len(GPU_FIELDS):
        return None
    return dict(zip(GPU_FIELDS, values, strict=True))


def report(row: Mapping[str, Any], out: Path | None) -> None:
    """Print a row as one JSON line, and append a copy to out.

    Raises:
        ValueError: a value that JSON cannot hold (NaN, infinity).
        OSError: out cannot be written to; the line was printed.
    """
    line = json.dumps(row, allow_nan=False)
    print(line, flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        # one write of one line, so that two benches may share a file
        handle = os.open(out, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, line.encode() + b"\n")
        finally:
            os.close(handle)
