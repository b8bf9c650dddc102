"""How large a pack may be on this hardware: a trial before the first step, and halving.

The largest pack of the epoch runs forward and backward once before the first step, and what it
computed is thrown away, so that memory runs out in the first seconds or not at all. Where it does,
here or later, T (the tokens of a pack) is halved on all ranks alike, never below the longest
record. A step keeps its records, so it takes twice the packs and gives the same gradient.
"""

import gc

import torch

from bioinstruct.synth.console import note
from bioinstruct.train.data.batch import collate
from bioinstruct.train.plan.planner import Planner
from bioinstruct.train.plan.prepare import Prepared
from bioinstruct.train.step import OutOfRoom, add_gradient


def worst_pack(planner: Planner, step: int) -> tuple[list[int], dict[int, int]]:
    """Return the largest pack that is still to come in the epoch of a step, and its draw numbers.

    Largest is by tokens, then by its longest record, then by supervised tokens.
    """
    lengths, supervised = planner.lengths, planner.supervised
    plan = planner.plan(step)
    epoch, worst = plan.epoch, (plan.packs[0], plan.draws)
    largest = (0, 0, 0)
    while plan.epoch == epoch:
        for pack in plan.packs:
            of_pack = lengths[pack]
            size = int(of_pack.sum()), int(of_pack.max()), int(supervised[pack].sum())
            if size > largest:
                largest, worst = size, (pack, plan.draws)
        step += 1
        plan = planner.plan(step)
    return worst


def try_worst_pack(prepared: Prepared, step: int) -> None:
    """Run the largest pack of the epoch on every rank and throw away what it computed.

    Raises:
        OutOfRoom: on all ranks, when it did not fit into the memory of one.
    """
    model, masters = prepared.llm.model, prepared.masters
    pack, draws = worst_pack(prepared.planner, step)
    full = False
    try:
        batch = collate(prepared.tokens, pack, draws, model.device)
        masters.before_pack(is_last=True)
        add_gradient(model, masters.adapters, batch, 1.0, prepared.run.train.seed)
    except torch.OutOfMemoryError:
        masters.check_recovers()
        full = True
    masters.grad_P.zero_()
    if num_full := prepared.ranks.total([full])[0]:
        raise OutOfRoom(int(num_full))


def halve(prepared: Prepared) -> int:
    """Return half the tokens of a pack, or the longest record's, and say so.

    Raises:
        ValueError: the longest record alone does not fit.
    """
    sets = [prepared.tokens, *([prepared.validation] if prepared.validation else [])]
    longest = max(int(tokens.lengths.max()) for tokens in sets)
    now = prepared.planner.max_tokens
    if now <= longest:
        raise ValueError(
            f"memory ran out on a pack of {now} tokens, and the longest record has {longest}, so "
            "that packs cannot be made smaller; leave such records out (data.on_overlong), train "
            "fewer modules (lora.targets), or use a device with more memory"
        )
    # what the failed pass still holds must be gone before the next one
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    halved = max(now // 2, longest)
    note(
        f"memory ran out: packs have {halved} tokens from now on, not {now}; a step keeps its "
        "records and takes more packs, so the gradient stays the same"
    )
    return halved
