"""AdamW over one flat float32 buffer, with the gradient's global norm and clipping.

    m <- b1 m + (1-b1) g,   v <- b2 v + (1-b2) g^2
    p <- p - lr ( wd p + (m / (1-b1^k)) / (sqrt(v / (1-b2^k)) + eps) )
                                                    (Loshchilov & Hutter 2019, arXiv 1711.05101)

All adapters lie in one buffer, so the norm, the finiteness check and the update are each a few
passes over contiguous memory, whatever the number of layers.

Shapes   P = trainable parameters.
"""

import torch
from torch import Tensor


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
    grad_factor: float = 1.0,
) -> None:
    """Update parameters and moments in place.

    Args:
        p_P: (P,) float32 masters.
        g_P: (P,) gradient; it is scaled in place by grad_factor.
        m_P: (P,) first moment.
        v_P: (P,) second moment.
        lr: learning rate of this step.
        step: number of this update, counted from 1.
        betas: decay of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, in units of the learning rate.
        grad_factor: what clipping multiplies the gradient by.
    """
    b1, b2 = betas
    if grad_factor != 1.0:
        g_P.mul_(grad_factor)
    m_P.lerp_(g_P, 1 - b1)
    v_P.mul_(b2).addcmul_(g_P, g_P, value=1 - b2)
    if weight_decay:
        p_P.mul_(1 - lr * weight_decay)
    root_P = v_P.sqrt().div_((1 - b2**step) ** 0.5).add_(eps)
    p_P.addcdiv_(m_P, root_P, value=-lr / (1 - b1**step))


def clip_factor(grad_norm: float, max_norm: float) -> float:
    """Return the factor that brings a gradient of this norm down to max_norm; 0 is no limit."""
    return max_norm / grad_norm if max_norm and grad_norm > max_norm else 1.0


def global_norm(g_P: Tensor) -> float:
    """Euclidean norm of the whole gradient; not finite exactly when an element is not finite."""
    return float(torch.linalg.vector_norm(g_P, dtype=torch.float64))
