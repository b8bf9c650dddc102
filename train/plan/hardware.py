"""The hardware that a plan is made for: what is here, or a GPU named in its absence."""

import os
from dataclasses import dataclass

import torch

from bioinstruct.train.report.metrics import PEAK_BFLOAT16

GPUS = {
    "A100-40GB": ("A100", 39.4),
    "A100-80GB": ("A100", 79.1),
    "H100-80GB": ("H100", 79.1),
    "H200-141GB": ("H200", 139.8),
    "L40S-48GB": ("L40S", 44.4),
    "RTX4090-24GB": ("4090", 23.6),
}
"""Name -> its part of PEAK_BFLOAT16, and the GiB that its driver shows."""


@dataclass(frozen=True)
class Hardware:
    """One device, as a plan sees it."""

    name: str
    kind: str
    """cuda | cpu."""
    memory_bytes: int
    peak_flops: float | None
    """Dense bfloat16 FLOP/s of the vendor's sheet; None where it is not known."""
    is_here: bool
    """False for a GPU that was only named."""


def find(name: str, device: str) -> Hardware:
    """Look a device up.

    Args:
        name: plan.hardware: a name of GPUS, cpu, or auto.
        device: the run's device, which auto follows.

    Raises:
        ValueError: an unknown name, or auto with a GPU that is not here.
    """
    if name in GPUS:
        part, gib = GPUS[name]
        return Hardware(name, "cuda", int(gib * 2**30), PEAK_BFLOAT16[part], False)
    if name not in ("auto", "cpu"):
        raise ValueError(
            f"plan.hardware = {name!r} is unknown; allowed are auto, cpu, {', '.join(GPUS)}"
        )
    wants_gpu = device.startswith("cuda")
    if name == "auto" and torch.cuda.is_available() and device != "cpu":
        own = torch.cuda.get_device_properties(0)
        peaks = [peak for part, peak in PEAK_BFLOAT16.items() if part in own.name]
        return Hardware(own.name, "cuda", own.total_memory, peaks[0] if peaks else None, True)
    if name == "auto" and wants_gpu:
        raise ValueError(
            f"device = {device!r} is not here to plan for; name a GPU in plan.hardware: "
            f"{', '.join(GPUS)}"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Hardware("this machine's CPU", "cpu", memory, None, True)
