"""Twenty real steps in every configuration: alone when called, on several ranks under torchrun.

python tests/train/ranks_job.py OUT writes losses, norms, final masters and the collectives of the
last step; test_ranks_together.py compares what different numbers of ranks write.
"""

import hashlib
import os
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bioinstruct.model.adapters import Adapters, LoraSettings
from bioinstruct.model.checkpoint import open_checkpoint
from bioinstruct.model.llama import Llama
from bioinstruct.model.templates import get_template
from bioinstruct.model.tokenizers.tokenizer import load_tokenizer
from bioinstruct.synth.records import read_records
from bioinstruct.train.data.batch import collate
from bioinstruct.train.data.tokens import Limits, TokenSet, encode_records
from bioinstruct.train.demo import resolve
from bioinstruct.train.plan.planner import Planner
from bioinstruct.train.ranks.process import Ranks, deal, joined, to_its_end
from bioinstruct.train.step import Optimizer, train_step
from bioinstruct.train.weights.full import WholeWeights
from bioinstruct.train.weights.masters import LoraMasters, Masters
from bioinstruct.train.weights.sharding import ShardedWeights, sharded_model

DTYPES = torch.float32, torch.float64
DATA = Path(__file__).parents[1] / "data"
STEPS, RECORDS, ROOM = 20, 60, 320


class Case(NamedTuple):
    """What is trained, and how."""

    shard: str
    method: str
    dtype: torch.dtype

    @property
    def lr(self) -> float:
        """A rate at which the loss falls without spikes, which would magnify rounding."""
        return 1e-3 if self.method == "lora" else 2e-4


class Collectives(TorchDispatchMode):
    """Counts what ranks say to each other, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.name().removeprefix("c10d::")] += 1
        return func(*args, **(kwargs or {}))


def cases(size: int) -> list[Case]:
    """Configurations of so many ranks: all with BIOINSTRUCT_RANKS, else the telling ones."""
    shards = {1: ("none",), 2: ("none", "full")}.get(size, ("none", "full", "hybrid"))
    every = [Case(*case) for case in product(shards, ("lora", "full"), DTYPES)]
    if size == 1 or "BIOINSTRUCT_RANKS" in os.environ:
        return every
    # each way to spread with each method, and each method in each dtype
    return [
        c
        for c in every
        if (c.dtype == torch.float32) == ((c.shard == "full") == (c.method == "full"))
    ]


def records() -> TokenSet:
    """Real records of the demo, the shortest of the first, as a small vocabulary spells them."""
    words = load_tokenizer(DATA / "tokenizers" / "stories260K_tok512.model")
    found = list(read_records(Path(resolve("demo:records.jsonl.gz"))))[: 4 * RECORDS]
    limits = Limits(ROOM, "error", "drop")
    tokens = encode_records(found, get_template("bioinstruct", words), words, limits)[0]
    return tokens.subset(tokens.lengths.argsort(kind="stable")[:RECORDS].tolist())


def trained(case: Case, ranks: Ranks) -> tuple[Llama, Masters]:
    """The model of a configuration, and what of it trains."""
    checkpoint = open_checkpoint(DATA / "stories260K")
    if case.shard == "none":
        model = Llama(checkpoint.config, "cpu", case.dtype)
        checkpoint.load_into(model.destinations())
    else:
        trains = case.method == "full"
        model = sharded_model(checkpoint, ranks, mode=case.shard, dtype=case.dtype, trains=trains)
    model.recomputed_layers = 2
    if case.method == "lora":
        settings = LoraSettings(r=4, alpha=8.0, dropout=0.1)
        adapters = Adapters(checkpoint.config, settings, dtype=case.dtype)
        adapters.initialise(0)
        return model, LoraMasters(adapters, is_sharded=case.shard != "none")
    return model, WholeWeights(model) if case.shard == "none" else ShardedWeights(model, ranks)


def run(case: Case, ranks: Ranks, tokens: TokenSet) -> dict[str, Tensor]:
    """Take the steps and return what came of them."""
    model, masters = trained(case, ranks)
    optimizer = Optimizer(masters, weight_decay=0.1)
    planner = Planner(tokens.lengths, tokens.supervised, max_tokens=ROOM, batch_samples=3, seed=3)
    losses, norms = [], []
    counted = Collectives()
    for step in range(STEPS):
        plan = planner.plan(step)
        hands = deal([float(tokens.lengths[pack].sum()) for pack in plan.packs], ranks.size)
        own = [plan.packs[i] for i in hands[ranks.rank]]
        if masters.is_sharded:
            own += [[]] * (max(map(len, hands)) - len(own))
        batches = (collate(tokens, pack, plan.draws) for pack in own)
        arguments = model, optimizer, batches, plan.supervised_tokens, case.lr, 7, ranks
        if step == STEPS - 1:
            with counted:
                result = train_step(*arguments)
        else:
            result = train_step(*arguments)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    whole = torch.cat([tensor.flatten() for _, tensor in masters.named(masters.flat())])
    digests = ranks.gather(hashlib.sha256(whole.numpy().tobytes()).hexdigest())
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "norms": torch.tensor(norms, dtype=torch.float64),
        "masters": whole,
        "masters are equal": torch.tensor(len(set(digests)) == 1),
        "packs": torch.tensor([len(plan.packs), max(map(len, hands))]),
        **{f"count {name}": torch.tensor(count) for name, count in counted.counts.items()},
    }


def main() -> None:
    """Run every configuration."""
    with joined("cpu") as ranks:
        # four ranks on this machine stand for two machines of two
        ranks.local_size = min(2, ranks.size)
        tokens = records()
        found = {str(tuple(case)): run(case, ranks, tokens) for case in cases(ranks.size)}
        if ranks.is_first:
            torch.save(found, sys.argv[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    to_its_end(main)
