"""What a run writes down: metrics.jsonl, loss.svg, FLOPs and peak memory.

FLOP convention, per step: 4 for every weight of the frozen linears and token (forward and input
gradient), 4 for every weight of the head and supervised token, 3.5 times the forward FLOPs of
causal attention, 6 for every adapter weight and token; 6 instead of the 4 where all weights train.
Recomputation is not counted. MFU is these FLOPs over seconds and the vendor's dense bfloat16 peak.
"""

import json
import math
import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bioinstruct.model.adapters import projection_shapes
from bioinstruct.model.config import LlamaConfig

PEAK_BFLOAT16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16 FLOP/s of the vendor's sheet, by a part of the device's name."""


class MetricsLog:
    """Appends one JSON object a line, flushed at once, so that a killed run keeps its history."""

    def __init__(self, path: Path, also: Callable[[Mapping[str, Any]], None] | None = None) -> None:
        self.path, self.also = path, also
        self.file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row, and hand it to `also`; numbers that JSON cannot hold become null."""
        safe = _fit_for_json(row)
        self.file.write(json.dumps(safe, allow_nan=False) + "\n")
        self.file.flush()
        if self.also is not None:
            self.also(safe)

    def sync(self) -> None:
        """Make the rows so far survive a loss of power, as the state after them will."""
        if self.path.is_file():
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _fit_for_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _fit_for_json(inner) for key, inner in value.items()}
    return [_fit_for_json(inner) for inner in value] if isinstance(value, list) else value


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of allocated GPU memory, or of the process's resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def step_flops(
    config: LlamaConfig,
    num_adapter_weights: int | None,
    lengths: Sequence[int],
    supervised_tokens: int,
) -> float:
    """Model FLOPs of a step over documents of these lengths, by the convention above.

    Args:
        config: the model's shape.
        num_adapter_weights: what trains; None for all weights.
        lengths: tokens of each document.
        supervised_tokens: rows of the head.
    """
    tokens = sum(lengths)
    linears = config.num_layers * sum(N * K for N, K, _ in projection_shapes(config).values())
    head = config.vocab_size * config.hidden_size
    pairs = sum(n * (n + 1) / 2 for n in lengths)
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * pairs
    passes = 6 if num_adapter_weights is None else 4
    base = passes * (linears * tokens + head * supervised_tokens)
    return base + 3.5 * attention + 6 * (num_adapter_weights or 0) * tokens


def mfu(flops: float, seconds: float, device: torch.device) -> float | None:
    """Share of the GPU's dense bfloat16 peak; None on a CPU or an unlisted GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = [peak for part, peak in PEAK_BFLOAT16.items() if part in name]
    return flops / seconds / peaks[0] if peaks else None


def loss_svg(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw training loss (line) and validation loss (dots) over steps.

    Args:
        rows: of metrics.jsonl; `loss` and `val_loss` by `step`.
    """
    train = _points(rows, "loss")
    validation = _points(rows, "val_loss")
    both = train + validation
    last = max((step for step, _ in both), default=1)
    low = math.floor(min((v for _, v in both), default=0.0) * 10) / 10
    high = math.ceil(max((v for _, v in both), default=1.0) * 10) / 10
    high = high if high > low else low + 0.1

    def x(step: float) -> float:
        return 56 + 560 * step / max(last, 1)

    def y(value: float) -> float:
        return 24 + 276 * (high - value) / (high - low)

    parts = [_SVG_HEAD]
    for i in range(5):
        value = low + (high - low) * i / 4
        parts.append(
            f'<line x1="56" x2="616" y1="{y(value):.1f}" y2="{y(value):.1f}" class="grid"/>'
            f'<text x="50" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>'
        )
    for step in sorted({round(last * i / 4) for i in range(5)}):
        parts.append(f'<text x="{x(step):.1f}" y="318" text-anchor="middle">{step}</text>')
    parts.append('<text x="336" y="338" text-anchor="middle">step</text>')
    line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in train)
    parts.append(f'<polyline class="train" points="{line}"/>')
    dots = (f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="4"/>' for s, v in validation)
    parts += [*dots, _legend(bool(validation)), "</svg>"]
    return "\n".join(parts) + "\n"


def _legend(validation: bool) -> str:
    parts = [
        '<line x1="430" x2="454" y1="14" y2="14" class="train"/>'
        '<text x="460" y="18">training loss</text>'
    ]
    if validation:
        parts.append('<circle cx="552" cy="14" r="4"/><text x="562" y="18">validation</text>')
    return "".join(parts)


_SVG_HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 348" role="img"
 aria-label="loss by step">
<style>
text { font: 12px sans-serif; fill: #444 }
.grid { stroke: #ddd } .train { fill: none; stroke: #1f6fb2; stroke-width: 1.5 }
circle { fill: #c8501e }
</style>
<rect width="640" height="348" fill="#fff"/>"""


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]
