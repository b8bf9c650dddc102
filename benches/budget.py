"""Whether an op is right, before it is timed or trusted: its error against float64.

An op and its reference are called on the same inputs, which are first rounded to the dtype. Output
and all gradients of the reference in float64 are the truth; the reference in the dtype itself
(eager) shows what rounding costs. Ours may be off by twice eager's error plus one rounding at the
scale of all of them: a tensor that is exactly zero has no scale of its own.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Op = Callable[..., Tensor]


def normal(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Standard normal float64 tensors on the CPU, the same ones on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def outputs(
    op: Op, inputs: Sequence[Tensor], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """The op's output and the gradient of every input, for one fixed gradient of the output."""
    leaves = [x.detach().to(device, dtype, copy=True).requires_grad_() for x in inputs]
    y = op(*leaves)
    (dy,) = normal(tuple(y.shape), seed=7)
    y.backward(dy.to(device, y.dtype))
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    return [y.detach(), *grads]


def check(
    ours: Op,
    reference: Op,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device,
    roundings: int = 1,
) -> float:
    """Compare an op with its reference.

    Args:
        ours: takes the inputs in dtype.
        reference: the same in plain operations; float64 in, float64 out.
        inputs: float64.
        dtype: float32, float16 or bfloat16.
        device: where both run.
        roundings: allowed beside twice eager's error, in units of the dtype's eps at scale.

    Returns:
        The largest share of its allowance that any tensor used, at most 1.

    Raises:
        ValueError: shape, dtype or values of a tensor are off; the text says which and by how much.
    """
    inputs = [x.to(dtype).double() for x in inputs]
    exact = outputs(reference, inputs, torch.float64, device)
    eager = outputs(reference, inputs, dtype, device)
    scale = max([float(x.abs().max()) for x in exact if x.numel()], default=1.0)
    used = 0.0
    for i, (y, e, x) in enumerate(
        zip(outputs(ours, inputs, dtype, device), eager, exact, strict=True)
    ):
        name = "the output" if i == 0 else f"the gradient of input {i - 1}"
        if y.shape != x.shape or y.dtype != e.dtype:
            raise ValueError(
                f"{name} is {tuple(y.shape)} {y.dtype}, not {tuple(x.shape)} {e.dtype}"
            )
        if not y.numel():
            continue
        allowed = 2 * float((e - x).abs().max()) + roundings * torch.finfo(dtype).eps * scale
        error = float((y - x).abs().max())
        if not error <= allowed:
            raise ValueError(f"{name} is off by {error:.2e}, where {allowed:.2e} is allowed")
        used = max(used, error / allowed if allowed else 0.0)
    return used
