"""The whole LLaMA model (Touvron et al. 2023, arXiv 2302.13971) on packed tokens.

    x = embedding[ids]
    per layer:  x += o(attention(rope(q, k), v))   of  rmsnorm(x)
                x += down(swiglu(gate, up))        of  rmsnorm(x)
    logits = head(rmsnorm(x))

Two families differ: Qwen 2 adds a bias to q, k and v, Qwen 3 norms every head of q and k before it
is rotated.

There is no batch dimension and no padding: activations are (T, D), documents lie one after the
other, and positions restart with each of them. Projections that share their input are stored as one
matrix (q, k, v; gate, up). All weights are frozen and what trains are the adapters passed in,
unless the trainer unfreezes them.

Shapes   T packed tokens, D model width, H query heads, G key/value heads, E head width, F
         feed-forward width, V vocabulary, N = (H + 2G) * E.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from bioinstruct.kernels import (
    Documents,
    Dropout,
    Frozen,
    Gain,
    Heads,
    Rotation,
    add_rmsnorm,
    attention,
    copied_linear,
    copied_norm_linear,
    copied_norm_mlp,
    lora_linear,
    rmsnorm,
    split_rope,
    swiglu,
)
from bioinstruct.kernels.dispatch import uses_triton
from bioinstruct.model.adapters import GROUPS, Adapters
from bioinstruct.model.augmented_layers import AugmentedLayer, AugmentedLayers, Residual
from bioinstruct.model.config import LlamaConfig

Attend = Callable[[int, Heads], Tensor]
"""Attention of one layer: (layer number, its heads) -> (T, H, E)."""


class Pack(NamedTuple):
    """Token documents laid one after the other, without padding."""

    ids_T: Tensor
    """(T,) int64 token ids."""
    positions_T: Tensor
    """(T,) int64, counted from 0 within each document."""
    documents: Documents


def pack_documents(documents: list[list[int]], device: torch.device | str = "cpu") -> Pack:
    """Lay token id lists one after the other."""
    ids = [token for document in documents for token in document]
    positions = [position for document in documents for position in range(len(document))]
    return Pack(
        torch.tensor(ids, dtype=torch.int64, device=device),
        torch.tensor(positions, dtype=torch.int64, device=device),
        Documents.of_lengths([len(d) for d in documents], device),
    )


class Piece(NamedTuple):
    """A tensor of a checkpoint as rows of a parameter."""

    parameter: nn.Parameter
    start: int
    rows: int

    def view(self) -> Tensor:
        """These rows in the parameter's own memory."""
        return self.parameter.data[self.start : self.start + self.rows]


def _whole(parameter: nn.Parameter) -> Piece:
    return Piece(parameter, 0, len(parameter))


class Block(nn.Module):
    """One transformer layer; its attention is the caller's, so that a KV cache can stand in."""

    def __init__(self, config: LlamaConfig, layer: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.config, self.layer = config, layer
        D, F, E = config.hidden_size, config.intermediate_size, config.head_dim
        N = (config.num_heads + 2 * config.num_kv_heads) * E

        def frozen(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

        self.attention_norm_D, self.mlp_norm_D = frozen(D), frozen(D)
        self.qkv_ND, self.o_DM = frozen(N, D), frozen(D, config.num_heads * E)
        self.gate_up_2FD, self.down_DF = frozen(2 * F, D), frozen(D, F)
        self.bias_N = frozen(N) if config.qkv_bias else None
        self.q_norm_E = frozen(E) if config.qk_norm else None
        self.k_norm_E = frozen(E) if config.qk_norm else None

    def forward(
        self,
        residual: Residual,
        rotation: Rotation,
        attend: Attend,
        adapters: Adapters | None = None,
        dropout: Dropout | None = None,
    ) -> Residual:
        """Map the residual stream (T, D) to the next layer's."""
        weight, trains = self.qkv_ND, self.qkv_ND.requires_grad
        own_masks = adapters is not None and adapters.settings.dropout_per_module
        if trains or own_masks or uses_triton(weight, residual.x_TD):
            return Residual(self._by_op(residual.added(), rotation, attend, adapters, dropout))
        x_TD, delta_TD, _ = residual
        qkv, o, gate_up, down = (
            self._frozen(group, weight, adapters, dropout)
            for group, weight in self.matrices().items()
        )
        norm = Gain(self.attention_norm_D, self.config.norm_eps)
        x_TD, qkv_TN = copied_norm_linear(x_TD, delta_TD, norm, qkv, self.bias_N)
        heads = split_rope(self.normed_heads(qkv_TN), rotation, self.config.num_heads)
        o_TD = copied_linear(attend(self.layer, heads).flatten(1), o)
        norm = Gain(self.mlp_norm_D, self.config.norm_eps)
        return Residual(*copied_norm_mlp(x_TD, o_TD, norm, gate_up, down))

    def _frozen(
        self, group: str, weight: Tensor, adapters: Adapters | None, dropout: Dropout | None
    ) -> Frozen:
        if adapters is None:
            return Frozen(weight)
        copies = adapters.copies(self.layer, group, weight.dtype)
        return Frozen(weight, copies, dropout, self._site(group))

    def _site(self, group: str) -> int:
        return self.layer * len(GROUPS) + GROUPS.index(group)

    def _by_op(
        self,
        x_TD: Tensor,
        rotation: Rotation,
        attend: Attend,
        adapters: Adapters | None,
        dropout: Dropout | None,
    ) -> Tensor:
        """One operation after the other: where weights train, or a projection has its own mask."""

        def linear(group: str, x: Tensor, weight: Tensor) -> Tensor:
            if adapters is None:
                return lora_linear(x, weight)
            branches, scale = adapters.branches(self.layer, group), adapters.settings.scale
            return lora_linear(x, weight, branches, scale, dropout, self._site(group))

        h_TD = rmsnorm(x_TD, self.attention_norm_D, self.config.norm_eps)
        qkv_TN = linear("qkv", h_TD, self.qkv_ND)
        if self.bias_N is not None:
            qkv_TN = qkv_TN + self.bias_N
        heads = split_rope(self.normed_heads(qkv_TN), rotation, self.config.num_heads)
        o_THE = attend(self.layer, heads)
        o_TD = linear("o", o_THE.flatten(1), self.o_DM)
        x_TD, h_TD = add_rmsnorm(x_TD, o_TD, self.mlp_norm_D, self.config.norm_eps)
        h_TF = swiglu(linear("gate_up", h_TD, self.gate_up_2FD))
        return x_TD + linear("down", h_TF, self.down_DF)

    def matrices(self) -> dict[str, nn.Parameter]:
        """The frozen matrices that adapters may go with, by group."""
        weights = self.qkv_ND, self.o_DM, self.gate_up_2FD, self.down_DF
        return dict(zip(GROUPS, weights, strict=True))

    def pieces(self) -> dict[str, Piece]:
        """Which rows of which parameter hold each tensor of this layer, by its name's end."""
        config, E = self.config, self.config.head_dim
        q, kv, F = config.num_heads * E, config.num_kv_heads * E, config.intermediate_size
        rows = {"q": (0, q), "k": (q, kv), "v": (q + kv, kv)}
        found = {"input_layernorm.weight": _whole(self.attention_norm_D)}
        for name, place in rows.items():
            found[f"self_attn.{name}_proj.weight"] = Piece(self.qkv_ND, *place)
        if self.bias_N is not None:
            for name, place in rows.items():
                found[f"self_attn.{name}_proj.bias"] = Piece(self.bias_N, *place)
        if self.q_norm_E is not None and self.k_norm_E is not None:
            found["self_attn.q_norm.weight"] = _whole(self.q_norm_E)
            found["self_attn.k_norm.weight"] = _whole(self.k_norm_E)
        return found | {
            "self_attn.o_proj.weight": _whole(self.o_DM),
            "post_attention_layernorm.weight": _whole(self.mlp_norm_D),
            "mlp.gate_proj.weight": Piece(self.gate_up_2FD, 0, F),
            "mlp.up_proj.weight": Piece(self.gate_up_2FD, F, F),
            "mlp.down_proj.weight": _whole(self.down_DF),
        }

    def destinations(self) -> dict[str, Tensor]:
        """Where each tensor of this layer belongs, by the end of its Hugging Face name."""
        return {name: piece.view() for name, piece in self.pieces().items()}

    def normed_heads(self, qkv_TN: Tensor) -> Tensor:
        """Norm every head of q and of k, where the model does so."""
        if self.q_norm_E is None or self.k_norm_E is None:
            return qkv_TN
        H, G, E = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        parts = qkv_TN.split((H * E, G * E, G * E), dim=1)
        gains = (self.q_norm_E, self.k_norm_E)
        normed = [
            rmsnorm(part.reshape(-1, E), gain, self.config.norm_eps).view(part.shape)
            for part, gain in zip(parts, gains, strict=False)
        ]
        return torch.cat((*normed, parts[2]), dim=1)


class Llama(nn.Module):
    """A frozen LLaMA. Weights are uninitialised until they are loaded into `destinations`.

    Args:
        config: shape and constants.
        device: where weights lie and ops run.
        dtype: of weights and activations.
    """

    def __init__(
        self,
        config: LlamaConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.config, self.device, self.dtype = config, torch.device(device), dtype
        self.attention_backend = "sdpa"
        self.may_augment = True
        """Whether weights and adapters may share buffers; False where the weights are sharded."""
        self._augmented: AugmentedLayers | None = None
        self.recomputed_layers = 0
        """So many layers, from the first on, keep only their input for the backward pass. The last
        ones' activations are gone by the time that the first ones' are computed anew."""

        def frozen(*shape: int) -> nn.Parameter:
            empty = torch.empty(shape, device=device, dtype=dtype)
            return nn.Parameter(empty, requires_grad=False)

        self.embedding_VD = frozen(config.vocab_size, config.hidden_size)
        blocks = (Block(config, i, self.device, dtype) for i in range(config.num_layers))
        self.blocks = nn.ModuleList(blocks)
        self.norm_D = frozen(config.hidden_size)
        self.head_VD = (
            self.embedding_VD
            if config.tied_embeddings
            else frozen(config.vocab_size, config.hidden_size)
        )
        self.inverse_frequency_E = inverse_frequency(config, self.device)

    def pieces(self) -> dict[str, Piece]:
        """Which rows of which parameter hold each tensor of a checkpoint, by Hugging Face name.

        A tensor of a fused projection is a part of its rows. The tied head has no entry.
        """
        found = {"model.embed_tokens.weight": _whole(self.embedding_VD)}
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            own = block.pieces()
            found |= {f"model.layers.{i}.{name}": piece for name, piece in own.items()}
        found["model.norm.weight"] = _whole(self.norm_D)
        if not self.config.tied_embeddings:
            found["lm_head.weight"] = _whole(self.head_VD)
        return found

    def destinations(self) -> dict[str, Tensor]:
        """Where each tensor of a checkpoint belongs, by its Hugging Face name."""
        return {name: piece.view() for name, piece in self.pieces().items()}

    def materialise(self, device: torch.device) -> None:
        """Give the weights of a model made on the meta device memory; they stay uninitialised."""
        self.to_empty(device=device)
        self.device = device
        self.inverse_frequency_E = inverse_frequency(self.config, device)

    def randomise(self, seed: int, std: float = 0.02) -> None:
        """Fill the weights with normal noise and the gains with 1, for benches and tests."""
        generator = torch.Generator(self.device).manual_seed(seed)
        for name, weight in self.destinations().items():
            if name.endswith("norm.weight"):
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, std, generator=generator)

    def rotation(self, positions_T: Tensor) -> Rotation:
        """cos and sin of every token's angles."""
        return rotation_at(positions_T, self.inverse_frequency_E, self.dtype)

    def packed_attention(self, documents: Documents) -> Attend:
        """Attention within the documents of a pack, for training and prefill."""
        return lambda _, heads: attention(*heads, documents, self.attention_backend)

    def forward(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        attend: Attend,
        adapters: Adapters | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """Final normed hidden states (T, D) of packed tokens.

        Args:
            ids_T: (T,) token ids.
            positions_T: (T,) positions in their documents.
            attend: attention over these documents, or over a cache.
            adapters: LoRA branches to add, or None for the model as it was loaded.
            dropout: masks for the branches, in training only.
        """
        rotation = self.rotation(positions_T)
        residual = Residual(functional.embedding(ids_T, self.embedding_VD))
        recomputed = self.recomputed_layers if torch.is_grad_enabled() else 0
        layers = zip(self.blocks, self._augmented_for(adapters), strict=True)
        for i, (block, buffers) in enumerate(layers):
            again = i < recomputed
            if buffers is not None:
                residual = _run(buffers, residual, rotation, attend, dropout, again=again)
                continue
            # one tensor is all that a layer keeps which is computed again
            given = Residual(residual.added()) if again else residual
            residual = _run(block, given, rotation, attend, adapters, dropout, again=again)
        x_TD, delta_TD, room = residual
        if delta_TD is None:
            return rmsnorm(x_TD, self.norm_D, self.config.norm_eps)
        return add_rmsnorm(x_TD, delta_TD, self.norm_D, self.config.norm_eps, room)[1]

    def _augmented_for(self, adapters: Adapters | None) -> Sequence[AugmentedLayer | None]:
        """Layers over buffers, made at their first use, or None for those that run plainly."""
        if not (adapters and self.may_augment and uses_triton(self.norm_D, adapters.flat_P)):
            return [None] * len(self.blocks)
        if self._augmented is None or self._augmented.adapters is not adapters:
            self._augmented = None  # first, or there would be two copies of the weights
            self._augmented = AugmentedLayers([*self.blocks], adapters)
        self._augmented.refresh()
        return self._augmented.layers

    def logits(self, pack: Pack, adapters: Adapters | None = None) -> Tensor:
        """(T, V) float32 logits of every token of a pack."""
        attend = self.packed_attention(pack.documents)
        h_TD: Tensor = self(pack.ids_T, pack.positions_T, attend, adapters)
        return (h_TD @ self.head_VD.T).to(torch.promote_types(self.dtype, torch.float32))


def _run(layer: Callable[..., Any], *given: Any, again: bool) -> Any:
    """Compute a layer; with again, once more in the backward pass, which then keeps nothing."""
    if not again:
        return layer(*given)
    # masks are counted, not drawn, so there is no generator whose state would matter
    return checkpoint(layer, *given, use_reentrant=False, preserve_rng_state=False)


def rotation_at(positions_T: Tensor, inverse_frequency_E: Tensor, dtype: torch.dtype) -> Rotation:
    """cos and sin of every token's angles, in float32, from float64 angles."""
    angles_TE = positions_T.double()[:, None] * inverse_frequency_E
    wide = torch.promote_types(dtype, torch.float32)
    return Rotation(angles_TE.cos().to(wide), angles_TE.sin().to(wide))


def inverse_frequency(config: LlamaConfig, device: torch.device) -> Tensor:
    """(E/2,) float64 radians a position."""
    E = config.head_dim
    exponents_E = torch.arange(0, E, 2, dtype=torch.float64, device=device) / E
    frequency_E = config.rope_base**-exponents_E
    if config.rope_scaling is None:
        return frequency_E
    divisors = config.rope_scaling.divisors(E, config.rope_base)
    return frequency_E / torch.tensor(divisors, dtype=torch.float64, device=device)
