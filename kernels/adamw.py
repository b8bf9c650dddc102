"""AdamW over one flat float32 buffer, with the gradient's global norm and clipping.

    g <- clip g
    m <- b1 m + (1-b1) g,   v <- b2 v + (1-b2) g^2
    p <- p - rate ( wd p + (m / (1-b1^k)) / (sqrt(v / (1-b2^k)) + eps) )
                                                    (Loshchilov & Hutter 2019, arXiv 1711.05101)

All adapters lie in one buffer, so the norm with the finiteness check is one pass over contiguous
memory and the update another, whatever the number of layers. The kernel's update also rounds what
it wrote into the masters' copies, wherever they are (mirror.py). Stretches of the buffer may learn
at rates of their own: all B of LoRA+ (Hayou et al. 2024, arXiv 2402.12354) are one.

Shapes   P = trainable parameters.
Numerics float32. The norm's squares are summed in float64 in torch; the kernel's parts are float32,
         so an element beyond 1e19 counts as not finite there.
Bound    Memory: the norm reads 4*P bytes; the update reads 16*P and writes 12*P, and 2*P more of
         copies in bfloat16.
"""

import math

import torch
from torch import Tensor

from bioinstruct.kernels.dispatch import cdiv, jit, launch, tl, uses_triton
from bioinstruct.kernels.mirror import BLOCK as BLOCK_P
from bioinstruct.kernels.mirror import Mirror

CHUNK_P = 1 << 16
"""Numbers that torch's operations update at a time on a CPU: 1 MB of masters and moments."""
NORM_PARTS = 1024
"""Programs of the norm, so that the order of the sum depends on nothing but P."""
NORM_PIECE = 1 << 24
"""Elements that torch's norm widens at a time."""

# ---- kernels -----------------------------------------------------------------------------------


@jit
def _square_sums(g_ptr, sums_ptr, P, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, P, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        g = tl.load(g_ptr + i, mask=i < P, other=0.0)
        total += g * g
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, axis=0))


@jit
def _adamw(
    p_ptr, g_ptr, m_ptr, v_ptr, table_ptr, factors_ptr, some_ptr, clip_ptr, P, base,
    lr, decay, clip, b1, rest1, b2, rest2, unbias1, unbias2, eps,
    COPY: tl.constexpr, LATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if COPY:
        # a tile of a place; base is the number of the stretch's first master
        row = table_ptr + tl.program_id(0) * 6
        k = tl.load(row + 1) + tl.arange(0, BLOCK)
        i = tl.load(row) - base + k
        mask = k < tl.load(row + 2)
    else:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = i < P
    if LATE:
        clip = tl.load(clip_ptr)
        # of a bad gradient, NaN: nothing is written
        mask = mask & (clip + 0.0 * i == clip)
    p = tl.load(p_ptr + i, mask=mask, other=0.0)
    g = tl.load(g_ptr + i, mask=mask, other=0.0) * clip
    m = b1 * tl.load(m_ptr + i, mask=mask, other=0.0) + rest1 * g
    v = b2 * tl.load(v_ptr + i, mask=mask, other=0.0) + rest2 * g * g
    step = (m * unbias1) / (tl.sqrt(v * unbias2) + eps)
    p -= lr * (decay * p + step)
    tl.store(p_ptr + i, p, mask=mask)
    tl.store(m_ptr + i, m, mask=mask)
    tl.store(v_ptr + i, v, mask=mask)
    if COPY:
        # a place is smaller than 2^31, and divisions by 64 bits are slow
        k, columns = k.to(tl.int32), tl.load(row + 3).to(tl.int32)
        stride, address = tl.load(row + 4), tl.load(row + 5)
        narrow = some_ptr.dtype.element_ty
        place = address.to(tl.pointer_type(narrow)) + k // columns * stride + k % columns
        copy = (p * tl.load(factors_ptr + tl.program_id(0))).to(narrow)
        tl.store(place, copy, mask=mask & (address + 0 * k != 0))


# ---- public ------------------------------------------------------------------------------------


def adamw_(
    p_P: Tensor,
    g_P: Tensor,
    m_P: Tensor,
    v_P: Tensor,
    *,
    lr: float,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_factor: float | Tensor = 1.0,
    mirror: Mirror | None = None,
) -> None:
    """Update parameters and moments in place.

    Args:
        p_P: (P,) float32 masters.
        g_P: (P,) gradient; its values are not defined afterwards.
        m_P: (P,) first moment.
        v_P: (P,) second moment.
        lr: learning rate of this step.
        step: number of this update, counted from 1.
        betas: decay of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, in units of the learning rate.
        grad_factor: what clipping multiplies the gradient by; as a tensor (clip_factor_tensor) it
            is not waited for, and where it is NaN nothing changes.
        mirror: copies of a flat buffer of which p_P is a stretch. The kernel writes them too, if
            they are those of the masters as they are; torch's operations leave them as they are.
    """
    b1, b2 = betas
    if uses_triton(p_P, g_P, m_P, v_P):
        late = grad_factor if isinstance(grad_factor, Tensor) else None
        clip = 1.0 if isinstance(grad_factor, Tensor) else grad_factor
        decays = b1, 1 - b1, b2, 1 - b2, 1 / (1 - b1**step), 1 / (1 - b2**step)
        numbers = lr, weight_decay, clip, *decays, eps
        _launch((p_P, g_P, m_P, v_P), numbers, late, mirror)
        return
    grad_factor = float(grad_factor)
    if math.isnan(grad_factor):
        return
    if p_P.numel() > CHUNK_P and not p_P.is_cuda:
        # all passes over a chunk while it is in cache
        rest = {"lr": lr, "step": step, "betas": betas, "eps": eps}
        rest |= {"weight_decay": weight_decay, "grad_factor": grad_factor}
        for parts in zip(*(x.split(CHUNK_P) for x in (p_P, g_P, m_P, v_P)), strict=True):
            adamw_(*parts, **rest)  # type: ignore[arg-type]
        return
    if grad_factor != 1.0:
        g_P.mul_(grad_factor)
    m_P.lerp_(g_P, 1 - b1)
    v_P.mul_(b2).addcmul_(g_P, g_P, value=1 - b2)
    root_P = v_P.sqrt().div_((1 - b2**step) ** 0.5).add_(eps)
    p_P.mul_(1 - lr * weight_decay)
    p_P.addcdiv_(m_P, root_P, value=-lr / (1 - b1**step))


def _launch(
    vectors: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    late: Tensor | None,
    mirror: Mirror | None,
) -> None:
    """Launch the update, and keep the versions of the masters and their copies in step."""
    p_P, P = vectors[0], vectors[0].numel()
    base, blocks, tiles = int(p_P.storage_offset()), cdiv(P, BLOCK_P), (p_P, p_P, p_P)
    copies = mirror is not None and bool(mirror.places) and mirror.version == p_P._version
    if mirror is not None and copies:
        table, factors, some = mirror.tiles(base, base + P)
        blocks, tiles = len(table), (table, factors, some)
    launch(
        _adamw, (blocks,), *vectors, *tiles, p_P if late is None else late, P, base, *numbers,
        COPY=copies, LATE=late is not None, BLOCK=BLOCK_P, num_warps=4,
    )  # fmt: skip
    # torch does not see what a kernel writes, and copies of the masters are made by version
    torch.autograd.graph.increment_version(p_P)
    if mirror is not None and copies:
        mirror.version = p_P._version


def clip_factor(grad_norm: float, max_norm: float) -> float:
    """Return the factor that brings a gradient of this norm down to max_norm; 0 is no limit."""
    return max_norm / grad_norm if max_norm and grad_norm > max_norm else 1.0


def clip_factor_tensor(norm: Tensor, max_norm: float) -> Tensor:
    """Return clip_factor of a norm that is still on its way, float32; NaN where it is not finite.

    So a bad step is skipped on the device. Whoever wants to know of it reads the norm later, and
    then counts that update as not made.
    """
    factor = (max_norm / norm).clamp(max=1.0) if max_norm else torch.ones_like(norm)
    return factor.masked_fill(~norm.isfinite(), math.nan).float()


def global_norm(g_P: Tensor) -> Tensor:
    """Euclidean norm of the whole gradient; not finite exactly when an element is not finite.

    Returns:
        A float64 scalar on the gradient's device; who reads it waits for the device.
    """
    if uses_triton(g_P):
        sums = g_P.new_zeros(NORM_PARTS)
        launch(_square_sums, (NORM_PARTS,), g_P, sums, g_P.numel(), BLOCK=BLOCK_P, num_warps=4)
        return sums.sum(dtype=torch.float64).sqrt()
    return wide_norm(g_P)


def wide_norm(x_P: Tensor) -> Tensor:
    """Norm in float64, piece by piece: PyTorch widens what it is given as a whole first."""
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in x_P.split(NORM_PIECE)]
    norm: Tensor = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    return norm
