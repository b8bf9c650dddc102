"""A model with its adapters added in, one tensor or one layer after the other.

    W' = W + scale * B A

Nothing here has the model in memory a second time; streamed_logits not even once.
Letters as in llama.py, A and B as in adapters.py.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from bioinstruct.kernels import Heads, attention, rmsnorm
from bioinstruct.model.adapters import Adapters
from bioinstruct.model.augmented_layers import Residual
from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.llama import Block, Llama, Pack, inverse_frequency, rotation_at

HEAD_ROWS = 8192
"""Rows of the head that streamed_logits widens at a time."""


@torch.no_grad()
def merged_tensors(model: Llama, adapters: Adapters | None) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors by Hugging Face name, one after the other, the adapters added."""
    return merged(model.destinations().items(), adapters)


@torch.no_grad()
def merged(
    weights: Iterable[tuple[str, Tensor]], adapters: Adapters | None
) -> Iterator[tuple[str, Tensor]]:
    """Add the adapters to the weights that they adapt, one after the other.

    The sum is taken in at least float32 and rounded once, to the weight's own dtype.

    Args:
        weights: by Hugging Face name.
        adapters: what to add, or None.
    """
    modules = {} if adapters is None else {m.name: m for m in adapters.modules}
    for name, weight in weights:
        if name not in modules:
            yield name, weight
            continue
        module = modules[name]
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        a_RK, b_NR = module.a_RK.to(wide), module.b_NR.to(wide)
        yield name, wide.addmm_(b_NR, a_RK, alpha=module.scale).to(weight)


@torch.inference_mode()
def streamed_logits(
    config: LlamaConfig,
    weights: Callable[[str], Tensor],
    pack: Pack,
    adapters: Adapters | None = None,
) -> Tensor:
    """Logits of a model that is never in memory whole: one layer after the other, on the CPU.

    Args:
        config: the model's shape.
        weights: gives a tensor by its Hugging Face name; asked for each once, in order.
        pack: tokens.
        adapters: LoRA branches to add, or None.

    Returns:
        (T, V) float32.
    """
    cpu, wide = torch.device("cpu"), torch.float32

    def attend(layer: int, heads: Heads) -> Tensor:
        return attention(*heads, pack.documents, "sdpa")

    embedding_VD = weights("model.embed_tokens.weight")
    residual = Residual(embedding_VD[pack.ids_T].to(wide))
    rotation = rotation_at(pack.positions_T, inverse_frequency(config, cpu), wide)
    for layer in range(config.num_layers):
        block = Block(config, layer, cpu, wide)
        for name, place in block.destinations().items():
            place.copy_(weights(f"model.layers.{layer}.{name}"))
        residual = block(residual, rotation, attend, adapters)
    h_TD = rmsnorm(residual.added(), weights("model.norm.weight").to(wide), config.norm_eps)
    head_VD = embedding_VD if config.tied_embeddings else weights("lm_head.weight")
    return torch.cat([h_TD @ rows.to(wide).T for rows in head_VD.split(HEAD_ROWS)], dim=1)
