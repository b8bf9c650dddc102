"""What is looked at while training: held-out loss, sample answers, task scores; and what is best.

The loss on held-out records is given over all of them and for every source (a file, or the
records' own `source`) and category: a mixture's mean hides the corpus that gets worse. Each group
is packed by itself, so that its sum is exact and nothing is computed twice.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bioinstruct.eval.report import Row
from bioinstruct.model.generate import generate
from bioinstruct.model.templates import decode_answer
from bioinstruct.synth.console import note
from bioinstruct.train.data.batch import collate
from bioinstruct.train.data.tokens import TokenSet
from bioinstruct.train.plan.planner import pack_samples
from bioinstruct.train.plan.prepare import Prepared, deal_packs
from bioinstruct.train.report.metrics import MetricsLog
from bioinstruct.train.report.scores import score_tasks
from bioinstruct.train.step import summed_loss

SAMPLE_TOKENS = 64


class GroupLoss(NamedTuple):
    """The loss of one group of held-out records."""

    source: str
    category: str
    loss: float
    """Sum over its supervised tokens, in nats."""
    tokens: int
    """Supervised ones."""


def validation_losses(prepared: Prepared, held: TokenSet) -> list[GroupLoss]:
    """Return the loss of every (source, category) of held-out records, over all ranks."""
    names = list(zip(*_labels(held), strict=True))
    groups = sorted(set(names))
    number = {name: i for i, name in enumerate(groups)}
    members: list[list[int]] = [[] for _ in groups]
    for sample, name in enumerate(names):
        members[number[name]].append(sample)
    packs = [pack for group in members for pack in _packs(prepared, held, group)]
    sums = [0.0] * len(groups)
    draws = dict.fromkeys(range(len(held)), 0)  # no dropout here
    for pack in deal_packs(prepared, held, packs):
        batch = collate(held, pack, draws, prepared.llm.model.device)
        loss = summed_loss(prepared.llm.model, prepared.adapters, batch)
        if pack:
            sums[number[names[pack[0]]]] += loss
    totals = prepared.ranks.total(sums)
    tokens = [int(held.supervised[group].sum()) for group in members]
    return [GroupLoss(*g, t, n) for g, t, n in zip(groups, totals, tokens, strict=True)]


def _packs(prepared: Prepared, held: TokenSet, group: Sequence[int]) -> list[list[int]]:
    packs = pack_samples(held.lengths[list(group)], prepared.planner.max_tokens)
    return [[group[i] for i in pack] for pack in packs]


def _labels(held: TokenSet) -> tuple[list[str], list[str]]:
    """The source and the category of each sample."""
    both = []
    for names, numbers in (held.sources, held.categories):
        both.append([names[number] for number in numbers])
    return both[0], both[1]


def validate(prepared: Prepared, step: int, out: Path, log: MetricsLog) -> float | None:
    """Write the validation losses, and sample answers beside the references.

    Returns:
        The mean loss over all supervised tokens; None where nothing is held out.
    """
    held, loss = prepared.validation, None
    if held is not None and len(held):
        losses = validation_losses(prepared, held)
        tokens = sum(g.tokens for g in losses)
        loss = sum(g.loss for g in losses) / tokens
        log.write({"step": step, "val_loss": loss, "val_tokens": tokens, **_by_group(losses)})
        note(f"validation loss {loss:.4f} after step {step}")
    prepared.on_first(lambda folder: _write_samples(prepared, step, folder), out)
    return loss


def _by_group(losses: Sequence[GroupLoss]) -> dict[str, dict[str, float]]:
    """Mean losses by source and by category, where there are several."""
    tables = {}
    for key in ("source", "category"):
        names = sorted({getattr(g, key) for g in losses})
        if len(names) > 1:
            tables[f"val_loss_by_{key}"] = {
                name or "none": _mean([g for g in losses if getattr(g, key) == name])
                for name in names
            }
    return tables


def _mean(losses: Sequence[GroupLoss]) -> float:
    return float(np.sum([g.loss for g in losses])) / sum(g.tokens for g in losses)


def _write_samples(prepared: Prepared, step: int, out: Path) -> None:
    source = prepared.validation or prepared.tokens
    count = min(prepared.run.train.samples, len(source))
    if not count:
        return
    llm, template = prepared.llm, prepared.template
    pairs = [source.sample(i) for i in range(count)]
    room = llm.config.max_positions - max(prompt for _, prompt in pairs)
    if room < 1:
        return
    completions = generate(
        llm.model,
        [ids[:prompt].tolist() for ids, prompt in pairs],
        max_new_tokens=min(SAMPLE_TOKENS, room),
        end_ids=[template.stop_id(llm.tokenizer)],
        adapters=prepared.adapters,
        num_tokens=llm.tokenizer.vocab_size,
    )
    with (out / "samples.jsonl").open("a", encoding="utf-8") as file:
        for i, ((ids, prompt), completion) in enumerate(zip(pairs, completions, strict=True)):
            row = {
                "step": step,
                "record": source.places[i],
                "prompt": llm.tokenizer.decode(ids[:prompt].tolist()),
                "answer": decode_answer(template, llm.tokenizer, completion.ids),
                "reference": decode_answer(template, llm.tokenizer, ids[prompt:].tolist()),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def score(prepared: Prepared, step: int, out: Path, log: MetricsLog) -> dict[str, dict[str, float]]:
    """Score the tasks into eval-step-N, and write their scores.

    Returns:
        Value by score by task.
    """

    def values(folder: Path) -> dict[str, dict[str, float]]:
        row: Row = score_tasks(
            prepared.llm, prepared.jobs, prepared.template.name, folder, f"step-{step}"
        )
        return {
            r.job.task.name: {name: s.value for name, s in r.scores.items()} for r in row.results
        }

    scores = prepared.on_first(values, out)
    log.write({"step": step, "scores": scores})
    for task, found in scores.items():
        told = ", ".join(f"{name} {100 * value:.1f}" for name, value in found.items())
        note(f"{task} after step {step}: {told}")
    return scores
