"""Started under torchrun by test_torchrun.py: a record with NaN logits, and a rank without memory.

Prints one JSON line from the first rank.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bioinstruct.kernels import linear_cross_entropy
from bioinstruct.synth import console
from bioinstruct.train import step
from bioinstruct.train.plan.prepare import Prepared, prepare
from bioinstruct.train.ranks.process import Ranks, joined, to_its_end
from bioinstruct.train.run import read_run
from bioinstruct.train.trainer import Trainer

BAD = 5
PLAIN = step.add_gradient


def plant_nan(prepared: Prepared) -> None:
    """Make the final states of one record NaN, on whichever rank it is packed."""
    ids, prompt = prepared.tokens.sample(BAD)
    wanted = torch.tensor(ids[prompt:].tolist())

    def planted(h_TD: Tensor, w_VD: Tensor, rows_S: Tensor, labels_S: Tensor, s: float) -> Tensor:
        if len(labels_S) >= len(wanted):
            found = (labels_S.unfold(0, len(wanted), 1) == wanted).all(1).nonzero()[:, 0]
            for start in found.tolist():
                mask = torch.zeros(len(h_TD), 1)
                mask[rows_S[start : start + len(wanted)]] = math.nan
                h_TD = h_TD + mask
        return linear_cross_entropy(h_TD, w_VD, rows_S, labels_S, s)

    step.linear_cross_entropy = planted  # type: ignore[assignment]


def plant_full_memory(ranks: Ranks) -> None:
    """Let the second rank run out of memory in its third pack, and not in any other."""
    packs = [0]

    def adding(model: Any, adapters: Any, batch: Any, *rest: Any) -> Tensor:
        packs[0] += 1
        if ranks.rank == 1 and packs[0] == 3:
            adapters.grad_P.add_(1.0)  # what was added before must not stay
            raise torch.OutOfMemoryError("CUDA out of memory (planted)")
        return PLAIN(model, adapters, batch, *rest)

    step.add_gradient = adding


def trained(settings: list[str], out: Path, ranks: Ranks, plant: str) -> dict[str, Any]:
    """Train with one thing planted, and say what came of it."""
    prepared = prepare(read_run(None, settings), ranks)
    step.add_gradient, step.linear_cross_entropy = PLAIN, linear_cross_entropy
    if plant == "nan":
        plant_nan(prepared)
    elif plant == "memory":
        plant_full_memory(ranks)
    ranks.from_first(lambda: out.mkdir())
    trainer = Trainer(prepared, out)
    trainer.run()
    assert prepared.adapters is not None
    flat_P = prepared.adapters.flat_P
    return {
        "masters": ranks.gather(flat_P.tolist()),
        "updates": trainer.optimizer.updates,
        "max_tokens": ranks.gather(trainer.standing.max_tokens),
        "place": prepared.tokens.places[BAD],
    }


def main() -> None:
    """Run all three, in folders below the first argument."""
    out, settings = Path(sys.argv[1]), sys.argv[2:]
    if os.environ["RANK"] != "0":
        console.mute()
    with joined("cpu") as ranks:
        told = {
            plant: trained(settings, out / plant, ranks, plant)
            for plant in ("nothing", "nan", "memory")
        }
        if ranks.is_first:
            print(json.dumps(told))


if __name__ == "__main__":
    to_its_end(main)
