"""Counting the bytes of operations that run on the meta device, and attention's part of them.

On the meta device a tensor has a shape and no memory. A Tally follows every storage from its first
appearance to its end. Attention is stated by hand here, because its backends choose their own
workspace: what they hold for the backward pass, and what they hold meanwhile.

Shapes   T tokens of a pack, H and G query and key heads, E their width.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tally(TorchDispatchMode):
    """Follows the bytes of all storages that operations within it make.

    Attributes:
        live: bytes of the storages that are alive now.
        peak: the most that were alive at once.
    """

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        # those that were there before; views of them are no new memory
        self._sizes = {t.untyped_storage()._cdata: 0 for t in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._meet(leaf.untyped_storage())
        return out

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class AttentionBytes(torch.autograd.Function):
    """What a backend holds for the backward pass, and its workspace; no arithmetic."""

    @staticmethod
    def forward(ctx: Any, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, backend: str) -> Tensor:
        T, H, _ = q_THE.shape
        o_THE = torch.empty_like(q_THE, memory_format=torch.contiguous_format)
        # log-sum-exp in float32
        log_sums_HT = q_THE.new_empty((H, T), dtype=torch.float32)
        ctx.save_for_backward(q_THE, k_TGE, v_TGE, o_THE, log_sums_HT)
        ctx.backend = backend
        return o_THE

    @staticmethod
    def backward(ctx: Any, do_THE: Tensor) -> tuple[Tensor | None, ...]:
        q_THE, k_TGE, v_TGE, *_ = ctx.saved_tensors
        gradients = tuple(x.new_empty(x.shape) for x in (q_THE, k_TGE, v_TGE))
        if ctx.backend != "sdpa":
            # the gradient of the queries is summed in float32
            q_THE.new_empty(q_THE.shape, dtype=torch.float32)
        return (*gradients, None)
