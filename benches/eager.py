"""LoRA the usual way: seven separate projections under plain autograd, as PEFT computes them.

    y = x W^T + s (x A^T) B^T

The adapters are float32; where the model computes in bfloat16, x is cast to float32 for them, the
sum is formed in float32 and rounded once. Norms, rotary embedding, attention and loss are the same
frozen ops as in our own step, so a difference in time is the adapters' (and that of the unfused
SwiGLU around them). Re-implemented here, so that the comparison needs no other library.

Shapes   T packed tokens, D model width, H query heads, G key/value heads, E head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from bioinstruct.kernels import attention, linear_cross_entropy, rmsnorm, rope
from bioinstruct.model.adapters import Adapters
from bioinstruct.model.llama import Llama
from bioinstruct.train.data.batch import Batch


class EagerLora(nn.Module):
    """A frozen model with adapters of its own, which start as copies of given ones.

    Args:
        model: frozen weights; they are shared, not copied.
        adapters: masters to copy; all seven projections have one.
    """

    def __init__(self, model: Llama, adapters: Adapters) -> None:
        super().__init__()
        self.model, self.scale = model, adapters.settings.scale
        self.weights = model.destinations()
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for module in adapters.modules:
            key = f"{module.layer}-{module.target}"
            self.a[key] = nn.Parameter(module.a_RK.detach().clone())
            self.b[key] = nn.Parameter(module.b_NR.detach().clone())
        self.paths = {f"{m.layer}-{m.target}": m.path for m in adapters.modules}

    def trained(self) -> list[Tensor]:
        """A and B of every projection, in the order of the flat buffer."""
        return [masters[key] for masters in (self.a, self.b) for key in self.paths]

    def linear(self, layer: int, target: str, x: Tensor) -> Tensor:
        """One projection and its adapter."""
        key = f"{layer}-{target}"
        y = functional.linear(x, self.weights[f"model.layers.{layer}.{self.paths[key]}.weight"])
        a_RK, b_NR = self.a[key], self.b[key]
        update = functional.linear(functional.linear(x.to(a_RK.dtype), a_RK), b_NR)
        return (y + update * self.scale).to(y.dtype)

    def forward(self, batch: Batch, scale: float) -> Tensor:
        """Scaled loss of one pack."""
        model, pack = self.model, batch.pack
        config = model.config
        rotation = model.rotation(pack.positions_T)
        x_TD = model.embedding_VD[pack.ids_T]
        for i in range(config.num_layers):
            norms = (f"model.layers.{i}.{n}_layernorm.weight" for n in ("input", "post_attention"))
            attention_norm_D, mlp_norm_D = (self.weights[name] for name in norms)
            h_TD = rmsnorm(x_TD, attention_norm_D, config.norm_eps)
            q, k, v = (
                self.linear(i, target, h_TD).view(len(h_TD), -1, config.head_dim)
                for target in ("q_proj", "k_proj", "v_proj")
            )
            o_THE = attention(
                rope(q, rotation), rope(k, rotation), v, pack.documents, model.attention_backend
            )
            x_TD = x_TD + self.linear(i, "o_proj", o_THE.flatten(1))
            h_TD = rmsnorm(x_TD, mlp_norm_D, config.norm_eps)
            gate_TF = functional.silu(self.linear(i, "gate_proj", h_TD))
            h_TF = gate_TF * self.linear(i, "up_proj", h_TD)
            x_TD = x_TD + self.linear(i, "down_proj", h_TF)
        h_TD = rmsnorm(x_TD, model.norm_D, config.norm_eps)
        return linear_cross_entropy(h_TD, model.head_VD, batch.rows_S, batch.labels_S, scale)


class EagerStep:
    """One optimizer step of EagerLora: gradients of all packs, clipping, torch's fused AdamW."""

    def __init__(self, lora: EagerLora, batches: Sequence[Batch], scale: float, lr: float) -> None:
        self.lora, self.batches, self.scale = lora, batches, scale
        self.optimizer = torch.optim.AdamW(lora.trained(), lr=lr, weight_decay=0.0, fused=True)

    def __call__(self) -> float:
        """Take the step; return the gradient's norm before clipping."""
        self.optimizer.zero_grad()
        for batch in self.batches:
            self.lora(batch, self.scale).backward()
        norm = nn.utils.clip_grad_norm_(self.lora.trained(), 1.0)
        self.optimizer.step()
        return float(norm)
