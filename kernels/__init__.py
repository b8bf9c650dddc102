"""Packed-sequence ops of LLaMA LoRA training, one file an op, each with its reference."""

from bioinstruct.kernels.attention import attention
from bioinstruct.kernels.cross_entropy import linear_cross_entropy
from bioinstruct.kernels.documents import Documents
from bioinstruct.kernels.dropout import Dropout
from bioinstruct.kernels.lora import Branch, lora_linear
from bioinstruct.kernels.lora_copied import Copies, Frozen, copied_linear
from bioinstruct.kernels.rmsnorm import add_rmsnorm, rmsnorm
from bioinstruct.kernels.rope import Heads, Rotation, rope, split_rope
from bioinstruct.kernels.sublayers_copied import Gain, copied_norm_linear, copied_norm_mlp
from bioinstruct.kernels.swiglu import swiglu

__all__ = [
    "Branch",
    "Copies",
    "Documents",
    "Dropout",
    "Frozen",
    "Gain",
    "Heads",
    "Rotation",
    "add_rmsnorm",
    "attention",
    "copied_linear",
    "copied_norm_linear",
    "copied_norm_mlp",
    "linear_cross_entropy",
    "lora_linear",
    "rmsnorm",
    "rope",
    "split_rope",
    "swiglu",
]
