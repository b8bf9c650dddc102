"""A whole decoder layer, forward and backward, with adapters on its seven projections.

    python benches/layer.py --dry-run
    python benches/layer.py --device cpu --tiny

Variants, all over the same norms, rotation, attention and SwiGLU, so that a difference is that of
the LoRA formula:
    ours       the layer as the trainer runs it with lora_linear
    augmented  the same over augmented buffers, with the passes fused into the ops around them
    frozen     the layer without adapters
    gemms      its library products alone, y = x W^T and dx = dy W of its four fused weights
    eager, eager32, manual, split
               the formulas of lora_kernel.py
In a prediction, frozen is the augmented layer without adapters, whose ops are the same ones; what
the other formulas add to it is lora_kernel.py's for every group.
"""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from bioinstruct.benches import lora_kernel
from bioinstruct.benches.graph_split import graph_split
from bioinstruct.benches.halves import layer_passes
from bioinstruct.benches.kernel_bench import Bench, Call, Shape, Work, main
from bioinstruct.benches.lora_kernel import eager_in_float32
from bioinstruct.benches.traffic import Pass, total
from bioinstruct.benches.train_step import check_gradients
from bioinstruct.benches.workload import SHAPES, make_model
from bioinstruct.kernels import (
    Branch,
    Documents,
    Dropout,
    add_rmsnorm,
    dispatch,
    lora_linear,
    rmsnorm,
    split_rope,
    swiglu,
)
from bioinstruct.kernels.lora import lora_linear_reference
from bioinstruct.model.adapters import (
    GROUPS,
    TARGETS,
    Adapters,
    LoraSettings,
    projection_shapes,
)
from bioinstruct.model.augmented_layers import Residual
from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.llama import Block

Linear = Callable[[Tensor, Tensor, list[Branch], float, Dropout | None, int], Tensor]
CHECKED_WIDTH = 256


def config_of(shape: Shape) -> LlamaConfig:
    """One layer of the model's shape; the vocabulary plays no part."""
    return dataclasses.replace(SHAPES[shape["layer"]], num_layers=1, vocab_size=64)


def groups_of(shape: Shape) -> list[Shape]:
    """The layer's groups as shapes of lora_kernel.py."""
    projections = projection_shapes(config_of(shape))
    groups: list[Shape] = []
    for group in GROUPS:
        members = [projections[t] for t, (own, _) in TARGETS.items() if own == group]
        rows = [N for N, _, _ in members]
        given = {key: shape[key] for key in ("T", "R", "p")}
        groups.append({"linear": group, "K": members[0][1], "rows": rows, **given})
    return groups


def attention_pass(shape: Shape, itemsize: int) -> Pass:
    """Heads read and written, at half the products' rate, as FlashAttention 2 was seen to run."""
    config, T = config_of(shape), shape["T"]
    H, G, E = config.num_heads, config.num_kv_heads, config.head_dim
    products = 7 * T * (shape["length"] + 1) * H * E
    return Pass("attention", 6 * itemsize * T * (H + G) * E, 2 * products)


def layer_work(shape: Shape, itemsize: int, adapted: Collection[str]) -> Work:
    """The layer over augmented buffers, where these have adapters, to the frozen one."""
    given = config_of(shape), shape["T"], shape["R"], shape["p"]
    attention = attention_pass(shape, itemsize)
    own, plain = (
        [attention, *(x for part in layer_passes(*given, targets).values() for x in part)]
        for targets in (adapted, ())
    )
    return total(own, plain)


def _with_linears(frozen: Work, linears: Sequence[Work]) -> Work:
    """A frozen layer, whose products are replaced by what its linears do."""
    return Work(
        moved_bytes=frozen.moved_bytes + sum(w.moved_bytes for w in linears),
        flops=frozen.flops + sum(w.flops - w.floor_flops for w in linears),
        floor_flops=frozen.flops,
        floor_bytes=frozen.moved_bytes,
        launches=frozen.launches + sum(w.launches - w.floor_launches for w in linears),
        floor_launches=frozen.launches,
        narrow_bytes=sum(w.narrow_bytes for w in linears),
    )


def work(shape: Shape, itemsize: int) -> Work:
    """Ours: lora_linear for every group, and the ops around."""
    frozen = layer_work(shape, itemsize, ())
    return _with_linears(frozen, [lora_kernel.work(g, itemsize) for g in groups_of(shape)])


def rival_work(shape: Shape, itemsize: int) -> dict[str, Work]:
    """The augmented layer's, the other formulas', and the two floors'."""
    frozen, groups = layer_work(shape, itemsize, ()), groups_of(shape)
    each = [lora_kernel.formulas(group, itemsize) for group in groups]
    works = {name: _with_linears(frozen, [w[name] for w in each]) for name in each[0]}
    whole = layer_work(shape, itemsize, TARGETS)
    products = sum(lora_kernel.floor(group, itemsize).flops for group in groups)
    gemms = whole._replace(moved_bytes=0, narrow_bytes=0, flops=products, launches=2 * len(groups))
    return {"augmented": whole, **works, "frozen": frozen, "gemms": gemms}


class Case:
    """Everything that the variants of a shape share."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.config, T = config_of(shape), shape["T"]
        self.model = make_model(self.config, device, dtype)
        self.adapters = Adapters(
            self.config, LoraSettings(r=shape["R"], alpha=2.0 * shape["R"]), device
        )
        generator = torch.Generator(device).manual_seed(1)
        with torch.no_grad():
            self.adapters.flat_P.normal_(0, 0.02, generator=generator)
        size = T, self.config.hidden_size
        self.x_TD = torch.empty(size, device=device, dtype=dtype).normal_(generator=generator)
        self.dy_TD = torch.empty(size, device=device, dtype=dtype).normal_(generator=generator)
        self.x_TD.requires_grad_()
        full, rest = divmod(T, shape["length"])
        lengths = [shape["length"]] * full + [rest] * (rest > 0)
        positions_T = torch.cat([torch.arange(n) for n in lengths]).to(device)
        self.rotation = self.model.rotation(positions_T)
        self.attend = self.model.packed_attention(Documents.of_lengths(lengths, device))
        self.dropout = None
        if shape["p"]:
            self.dropout = Dropout(shape["p"], 1, positions_T, torch.zeros_like(positions_T))
        block = self.model.blocks[0]
        assert isinstance(block, Block)
        self.block = block

    def backward(self, y_TD: Tensor) -> None:
        """Take the gradients; the input's is dropped, the adapters' add up."""
        self.x_TD.grad = None
        y_TD.backward(self.dy_TD)

    def plain(self) -> None:
        """The layer as the trainer runs it."""
        given = self.rotation, self.attend, self.adapters, self.dropout
        self.backward(self.block(Residual(self.x_TD), *given).added())

    def frozen(self) -> None:
        """The layer without adapters."""
        self.backward(self.block(Residual(self.x_TD), self.rotation, self.attend).added())

    def augmented(self) -> Call | None:
        """The layer over augmented buffers, where this model has them and the kernels run."""
        if importlib.util.find_spec("bioinstruct.model.augmented_layers") is None:
            return None
        if not dispatch.uses_triton(self.x_TD, self.adapters.flat_P):
            return None
        # a model of its own: its weights move into the buffers
        blocks = [*make_model(self.config, self.model.device, self.model.dtype).blocks]
        made: Any = importlib.import_module("bioinstruct.model.augmented_layers")
        (layer,) = made.AugmentedLayers(blocks, self.adapters).layers
        if layer is None:  # too many ranks
            return None
        # in a model the next layer gives the gradient of the last product, with room behind it
        room = layer.buffers["down"].room
        dy_TD = self.dy_TD.new_empty(len(self.dy_TD), self.dy_TD.shape[1] + room)
        dy_TD = dy_TD[:, :-room].copy_(self.dy_TD)

        def call() -> None:
            self.x_TD.grad = None
            given = made.Residual(self.x_TD), self.rotation, self.attend, self.dropout
            x_TD, delta_TD, _ = layer(*given)
            torch.autograd.backward((x_TD, delta_TD), (self.dy_TD, dy_TD))

        return call

    def by(self, linear: Linear, branches: dict[str, list[Branch]]) -> Call:
        """The layer with another formula for its linears."""
        block, config, scale = self.block, self.config, self.adapters.settings.scale

        def project(group: str, x: Tensor, weight: Tensor) -> Tensor:
            return linear(x, weight, branches[group], scale, self.dropout, GROUPS.index(group))

        def call() -> None:
            h_TD = rmsnorm(self.x_TD, block.attention_norm_D, config.norm_eps)
            qkv_TN = project("qkv", h_TD, block.qkv_ND)
            heads = split_rope(qkv_TN, self.rotation, config.num_heads)
            o_TD = project("o", self.attend(0, heads).flatten(1), block.o_DM)
            x_TD, h_TD = add_rmsnorm(self.x_TD, o_TD, block.mlp_norm_D, config.norm_eps)
            h_TF = swiglu(project("gate_up", h_TD, block.gate_up_2FD))
            self.backward(x_TD + project("down", h_TF, block.down_DF))

        return call

    def gemms(self) -> Call:
        """The products alone."""
        products = []
        block, T = self.block, len(self.x_TD)
        for w_NK in (block.qkv_ND, block.o_DM, block.gate_up_2FD, block.down_DF):
            N, K = w_NK.shape
            x, y = (self.dy_TD.new_empty(T, width).normal_() for width in (K, N))
            products += [(x, w_NK.detach().T, torch.empty_like(y))]
            products += [(y, w_NK.detach(), torch.empty_like(x))]

        def call() -> None:
            for left, right, out in products:
                torch.mm(left, right, out=out)

        return call

    def variants(self) -> dict[str, Call]:
        """Every variant by name."""
        own = {group: list(self.adapters.branches(0, group)) for group in GROUPS}
        dtype = self.model.dtype
        narrow = {g: [_narrowed(branch, dtype) for branch in found] for g, found in own.items()}
        formulas: dict[str, tuple[Any, dict[str, list[Branch]]]] = {
            "eager": (lora_linear_reference, narrow),
            "eager32": (eager_in_float32, own),
            "manual": (manual, own),
            "split": (graph_split, own),
        }
        calls = {"ours": self.plain, "frozen": self.frozen, "gemms": self.gemms()}
        augmented = self.augmented()
        if augmented is not None:
            calls["augmented"] = augmented
        return calls | {name: self.by(*formula) for name, formula in formulas.items()}


def check_layer(shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """Gradients of a model of two narrow layers with these head groups, against float64."""
    config = SHAPES[shape["layer"]]
    if config.hidden_size > CHECKED_WIDTH:
        config = dataclasses.replace(
            config,
            hidden_size=CHECKED_WIDTH,
            intermediate_size=CHECKED_WIDTH + 136,
            num_heads=4,
            num_kv_heads=max(1, 4 * config.num_kv_heads // config.num_heads),
            head_dim=64,
        )
    errors = check_gradients(config, device, dtype)
    return errors.lora / (2 * errors.eager + torch.finfo(dtype).eps)


def manual(
    x: Tensor, w: Tensor, branches: list[Branch], scale: float, dropout: Dropout | None, site: int
) -> Tensor:
    """One autograd function over library products."""
    with dispatch.forced("reference"):
        return lora_linear(x, w, branches, scale, dropout, site)


def _narrowed(branch: Branch, dtype: torch.dtype) -> Branch:
    """The adapter in the activations' dtype, with gradients of its own."""
    a_RK, b_NR = (m.detach().to(dtype).requires_grad_() for m in (branch.a_RK, branch.b_NR))
    return branch._replace(a_RK=a_RK, b_NR=b_NR)


def variants(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Call]:
    """Those of the module's docstring."""
    return Case(shape, dtype, device).variants()


BENCH = Bench(
    name="layer",
    shapes=[
        {"layer": layer, "T": T, "R": R, "p": p, "length": 512}
        for T in (8192, 2048, 16384)
        for R, p in ((16, 0.0), (16, 0.05), (64, 0.0), (64, 0.05))
        for layer in ("llama-7b", "llama-3-8b", "llama-13b")
    ],
    tiny=[{"layer": "tiny", "T": 50, "R": 4, "p": p, "length": 21} for p in (0.0, 0.1)],
    work=work,
    check=check_layer,
    variants=variants,
    rival_work=rival_work,
)

if __name__ == "__main__":
    main(BENCH)
