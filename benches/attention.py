"""Packed causal attention, forward and backward: every backend that runs here, and the formula.

    python benches/attention.py --dry-run
    python benches/attention.py --device cpu --tiny

`ours` is the backend that `auto` takes on this device. A pack is full of documents of one length.
FLOPs are those of the causal half, two products forward and five backward; a prediction takes them
at the rate of products, which no attention kernel reaches, so it is a bound.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bioinstruct.benches.budget import check, normal
from bioinstruct.benches.kernel_bench import Bench, Call, Shape, Work, main, passes
from bioinstruct.kernels import Documents, attention
from bioinstruct.kernels.attention import (
    BACKENDS,
    attention_reference,
    choose_backend,
    self_test,
    why_not,
)
from bioinstruct.synth.console import note

HEADS = (32, 32), (32, 8)


def work(shape: Shape, itemsize: int) -> Work:
    """Forward reads q, k, v and writes o; backward reads these and do, and writes three."""
    T, H, G, E = shape["T"], shape["H"], shape["G"], shape["E"]
    moved = (6 * H + 6 * G) * T * E * itemsize
    return Work(moved, 7 * T * (shape["length"] + 1) * H * E, 0)


def documents_of(shape: Shape, device: torch.device) -> Documents:
    """Documents of one length; the last takes what is left."""
    full, rest = divmod(shape["T"], shape["length"])
    return Documents.of_lengths([shape["length"]] * full + [rest] * (rest > 0), device)


def check_op(shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """The chosen backend on a short ragged pack of the same heads."""
    H, G, E = shape["H"], shape["G"], shape["E"]
    documents = Documents.of_lengths((5, 1, 70), device)
    backend = choose_backend("auto", device, dtype)
    return check(
        lambda q, k, v: attention(q, k, v, documents, backend),
        lambda q, k, v: attention_reference(q, k, v, documents),
        normal((76, H, E), (76, G, E), (76, G, E)),
        dtype,
        device,
        roundings=4,
    )


def backends(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Those that run here and are right; why the others are left out goes to stderr."""
    found = []
    for backend in BACKENDS:
        reason = why_not(backend, device, dtype)
        if reason is None:
            try:
                self_test(backend, device, dtype)
                found.append(backend)
            except ValueError as error:
                reason = str(error)
        if reason is not None:
            note(f"without {backend}: {reason}")
    return found


def variants(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Call]:
    """Ours, each backend by its name, and the formula."""
    T, H, G, E = shape["T"], shape["H"], shape["G"], shape["E"]
    documents = documents_of(shape, device)
    q, k, v = (
        torch.randn(T, heads, E, device=device, dtype=dtype).requires_grad_() for heads in (H, G, G)
    )

    def timed(op: Any) -> Call:
        return passes(op, q, k, v)

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_reference(q, k, v, documents)

    ours = choose_backend("auto", device, dtype)
    calls = {"ours": timed(partial(attention, documents=documents, backend=ours))}
    for backend in backends(device, dtype):
        calls[backend] = timed(partial(attention, documents=documents, backend=backend))
    return {**calls, "eager": timed(formula)}


BENCH = Bench(
    name="attention",
    shapes=[
        {"T": 8192, "H": H, "G": G, "E": 128, "length": length}
        for length in (256, 1024, 2048)
        for H, G in HEADS
    ],
    tiny=[{"T": 40, "H": 6, "G": 2, "E": 16, "length": 17}],
    work=work,
    check=check_op,
    variants=variants,
)

if __name__ == "__main__":
    main(BENCH)
