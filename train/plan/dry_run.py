"""What a run would do, printed: everything is checked, nothing is written but the token cache.

No GPU and no weights are needed. What the plan assumes (hardware, MFU, four bytes a token) is
called so where it is printed.
"""

import math
import sys
from collections.abc import Iterator

import click
import numpy as np

from bioinstruct.train.data.tokens import Labels, TokenSet
from bioinstruct.train.plan.memory import (
    Memory,
    Pack,
    adapter_count,
    estimate,
    fewest_recomputed,
    fits,
    largest_pack,
)
from bioinstruct.train.plan.outlook import Outlook, look
from bioinstruct.train.plan.planner import Planner
from bioinstruct.train.plan.policy import packs_of, worst_of
from bioinstruct.train.plan.prepare import Prepared
from bioinstruct.train.plan.stand_in import BYTES, ByteCount
from bioinstruct.train.report.metrics import step_flops
from bioinstruct.train.run import Run
from bioinstruct.train.weights.base import recomputed_layers

GOOD_FILL = 0.98
"""Below this the packs are called part-filled, and what would fill them is looked for."""
_GIB = 1 << 30


def dry_run(run: Run) -> None:
    """Check a run and print what it would do; only the token cache is written.

    Raises:
        ValueError: whatever would keep the run from starting.
    """
    outlook = look(run)
    for title, lines in _sections(outlook):
        for i, line in enumerate(lines):
            print(f"{title if i == 0 else '':<10} {line}".rstrip())
    _print_sample(outlook)


def _sections(outlook: Outlook) -> Iterator[tuple[str, list[str]]]:
    packs = packs_of(outlook.data.planner)
    yield "model", _model(outlook)
    yield "tokenizer", [_tokenizer(outlook)]
    yield "data", _data(outlook)
    yield "steps", _steps(outlook)
    yield "packs", _packing(outlook, packs)
    yield "trains", [_trains(outlook)]
    yield "memory", _memory(outlook, packs)
    yield "work", _work(outlook)


def _model(outlook: Outlook) -> list[str]:
    base, setup = outlook.base, outlook.setup
    unchecked = "" if base.has_weights else "; the weights were not checked"
    return [
        f"{base.checked}{unchecked}",
        f"{base.config.parameter_count():,} parameters, {base.config.num_layers} layers, "
        f"{str(setup.dtype).removeprefix('torch.')}, attention {setup.backend}",
    ]


def _tokenizer(outlook: Outlook) -> str:
    template = f"template {outlook.template.name}"
    if isinstance(outlook.tokenizer, ByteCount):
        return f"none was found: {BYTES} bytes count as a token, so lengths are rough; {template}"
    return f"{outlook.tokenizer.source}, {outlook.tokenizer.vocab_size:,} tokens; {template}"


def _data(outlook: Outlook) -> list[str]:
    tokens, held = outlook.data.tokens, outlook.data.validation
    lengths, total = tokens.lengths, int(tokens.lengths.sum())
    lines = [
        f"{len(tokens):,} samples, {total:,} tokens, {tokens.supervised.sum() / total:.1%} "
        f"supervised; {len(held) if held else 0:,} held out",
        f"lengths: median {int(np.median(lengths)):,}, 99 % up to "
        f"{int(np.percentile(lengths, 99)):,}, longest {int(lengths.max()):,}",
    ]
    for name, labels in (("sources", tokens.sources), ("categories", tokens.categories)):
        if len(labels.names) > 1 or any(outlook.run.data.mix):
            lines.append(f"{name}: {_shares(labels, tokens)}")
    return lines


def _shares(labels: Labels, tokens: TokenSet, shown: int = 8) -> str:
    """Samples, and the share of supervised tokens, of each name; the largest first."""
    samples = np.bincount(labels.ids, minlength=len(labels.names))
    learned = np.bincount(labels.ids, tokens.supervised, minlength=len(labels.names))
    order = [int(i) for i in np.argsort(-samples, kind="stable") if samples[i]]
    parts = [
        f"{labels.names[i] or 'none'} {samples[i]:,} ({learned[i] / learned.sum():.0%})"
        for i in order[:shown]
    ]
    rest = [f"{len(order) - shown} more"] if len(order) > shown else []
    return ", ".join(parts + rest) + "; in brackets, the share of supervised tokens"


def _steps(outlook: Outlook) -> list[str]:
    planner, data, run = outlook.data.planner, outlook.data, outlook.run
    of_epoch = planner.steps_of(0)
    size = (
        f"up to {run.train.batch_tokens:,} tokens"
        if run.train.batch_tokens
        else f"{planner.batch_samples:,} samples"
    )
    lines = [f"{data.num_steps:,} steps of {size}, {data.num_steps / of_epoch:.3g} epochs"]
    if outlook.ranks > 1:
        lines.append(f"{outlook.ranks} ranks, each takes its share of a step's packs")
    return lines


def fill(packs: list[Pack], max_tokens: int) -> float:
    """Packing efficiency: tokens over the room of their packs."""
    return sum(pack.tokens for pack in packs) / (len(packs) * max_tokens)


def _packing(outlook: Outlook, packs: list[Pack]) -> list[str]:
    planner = outlook.data.planner
    T, steps = planner.max_tokens, planner.steps_of(0)
    share = fill(packs, T)
    lines = [
        f"T = {T:,} tokens; {len(packs) / steps:.3g} packs a step, {share:.1%} full (no padding "
        "is computed; the rest of T is room that stays unused)"
    ]
    if share < GOOD_FILL and planner.batch_samples is not None:
        lines += _fuller(outlook)
    if len(packs) / steps < outlook.ranks:
        lines.append(
            f"fewer packs a step than ranks: some of the {outlook.ranks} have nothing to do; raise "
            "train.batch_samples or lower data.max_tokens_per_pack"
        )
    return lines


def _fuller(outlook: Outlook) -> list[str]:
    """Batch sizes and pack sizes that would fill the packs."""
    planner, tokens = outlook.data.planner, outlook.data.tokens
    assert planner.batch_samples is not None
    n = planner.batch_samples
    found: list[str] = []
    while n < len(tokens) and not found:
        n *= 2
        if (share := _fill_of(planner, planner.max_tokens, n)) >= GOOD_FILL:
            found.append(f"train.batch_samples = {min(n, len(tokens)):,} fills them to {share:.1%}")
    of_step = planner.batch_samples * float(tokens.lengths.mean())
    longest = int(tokens.lengths.max())
    count = max(1, math.ceil(of_step / planner.max_tokens))
    best = (_fill_of(planner, planner.max_tokens, planner.batch_samples), planner.max_tokens)
    for packs in range(count, 4 * count + 1):
        # a little room lets the last sample in
        T = max(longest, math.ceil(1.02 * of_step / packs / 64) * 64)
        best = max(best, (_fill_of(planner, T, planner.batch_samples), T))
    if best[1] != planner.max_tokens:
        found.append(f"data.max_tokens_per_pack = {best[1]:,} to {best[0]:.1%}")
    return ["to fill them: " + " or ".join(found)] if found else []


def _fill_of(planner: Planner, max_tokens: int, batch_samples: int, steps: int = 32) -> float:
    """Packing efficiency of the first steps with other sizes."""
    other = Planner(
        planner.lengths,
        planner.supervised,
        max_tokens=max_tokens,
        batch_samples=batch_samples,
        seed=planner.seed,
        shuffle=planner.shuffle,
    )
    plans = [other.plan(step) for step in range(min(steps, other.steps_of(0)))]
    return sum(p.tokens for p in plans) / (sum(len(p.packs) for p in plans) * max_tokens)


def _trains(outlook: Outlook) -> str:
    run, config = outlook.run, outlook.base.config
    if run.train.method == "full":
        return f"all {config.parameter_count():,} parameters"
    return lora_line(run, adapter_count(config, run.lora))


def lora_line(run: Run, count: int) -> str:
    """Return what trains with LoRA, in a line."""
    lora = run.lora
    kind = "rsLoRA" if lora.rslora else "LoRA"
    drop = f" dropout={lora.dropout:g}" if lora.dropout else ""
    return (
        f"{kind} r={lora.r} alpha={lora.alpha:g}{drop} on {', '.join(lora.targets)}: {count:,} "
        "trained parameters"
    )


def _memory(outlook: Outlook, packs: list[Pack]) -> list[str]:
    hardware, layers = outlook.hardware, outlook.base.config.num_layers
    worst, asked = worst_of(packs), recomputed_layers(outlook.run, outlook.base.config)
    memory = estimate(outlook.setup, worst, asked)
    assumed = "" if hardware.is_here else ", assumed"
    does = "fits" if fits(memory, hardware.memory_bytes) else "does NOT fit"
    at_once = outlook.setup.packs_at_once
    beside = f" and {at_once} packs side by side" if at_once > 1 else ""
    return [
        f"expected peak {_gib(memory.peak)} with {asked} of {layers} layers recomputed{beside}; "
        f"{does} {hardware.name} ({_gib(hardware.memory_bytes)}{assumed})",
        _parts(memory),
        *_advice(outlook, worst, memory),
    ]


def _parts(memory: Memory) -> str:
    trained = "adapters or masters, gradients and moments"
    parts = {
        "weights": memory.weights,
        trained: memory.trained,
        "gathered from shards": memory.gathered,
        "kept for the backward pass": memory.saved,
        "workspace of the pass": memory.passing,
        "the process itself": memory.own,
    }
    return "; ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size)


def _advice(outlook: Outlook, worst: Pack, memory: Memory) -> list[str]:
    """What would fit where the run does not, or what there is room for where it does."""
    setup, room = outlook.setup, outlook.hardware.memory_bytes
    asked = recomputed_layers(outlook.run, outlook.base.config)
    if fits(memory, room):
        if outlook.hardware.kind == "cpu":
            return []
        largest = largest_pack(setup, worst, room, asked)
        return [f"there is room for packs of up to T = {largest:,}"]
    layers = fewest_recomputed(setup, worst, room)
    if layers is not None:
        return [f"it fits with train.checkpoint_layers = {layers}"]
    all_layers = outlook.base.config.num_layers
    if largest := largest_pack(setup, worst, room, all_layers):
        return [
            f"it fits with train.checkpoint_layers = {all_layers} and data.max_tokens_per_pack = "
            f"{largest}"
        ]
    if outlook.setup.shards == 1 and outlook.ranks > 1:
        return ["it does not fit whole on a device; set shard = full"]
    return ["it does not fit with any pack; spread it over more devices: torchrun, shard = full"]


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB"


def _work(outlook: Outlook) -> list[str]:
    data, hardware, plan = outlook.data, outlook.hardware, outlook.run.plan
    full = outlook.run.train.method == "full"
    trained = None if full else adapter_count(outlook.base.config, outlook.run.lora)
    lengths, supervised = data.tokens.lengths.tolist(), int(data.tokens.supervised.sum())
    epoch = step_flops(outlook.base.config, trained, lengths, supervised)
    epochs = data.num_steps / data.planner.steps_of(0)
    tokens = epochs * int(data.tokens.lengths.sum())
    line = f"{epochs * epoch:.3g} model FLOPs over {tokens:,.0f} tokens"
    if hardware.peak_flops is None:
        return [f"{line}; no time is reckoned for {hardware.name}"]
    seconds = epochs * epoch / (hardware.peak_flops * plan.mfu * outlook.ranks)
    again = recomputed_layers(outlook.run, outlook.base.config) / outlook.base.config.num_layers
    # a layer computed again runs its forward pass once more: 2 on top of 4 (6 where all train)
    seconds *= 1 + again * (1 / 3 if full else 1 / 2)
    return [
        line,
        f"{_duration(seconds)} at an assumed MFU of {plan.mfu:g} on {outlook.ranks} x "
        f"{hardware.name}: {tokens / seconds:,.0f} tokens/s",
    ]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _print_sample(outlook: Outlook) -> None:
    """Show the first step's first sample, what is learned of it marked."""
    number = outlook.data.planner.plan(0).packs[0][0]
    ids, prompt = outlook.data.tokens.sample(number)
    decode = outlook.tokenizer.decode
    asked, learned = decode(ids[:prompt].tolist()), decode(ids[prompt:].tolist())
    place = outlook.data.tokens.places[number]
    if sys.stdout.isatty():
        print(f"\na sample, {place}; what is learned is green:")
        print(asked + click.style(learned, fg="green", bold=True))
    else:
        rule = "-" * 40
        print(f"\na sample, {place}; what is learned stands between the lines:")
        print(f"{asked}\n{rule}\n{learned}\n{rule}")
    print(f"its last supervised token is {int(ids[-1])}, {outlook.template.stop!r}")


def summary(prepared: Prepared) -> str:
    """Return one line: samples, tokens, steps and what trains."""
    tokens, run = prepared.tokens, prepared.run
    held = len(prepared.validation) if prepared.validation else 0
    supervised = tokens.supervised.sum() / tokens.lengths.sum()
    trained = f"all {prepared.llm.config.parameter_count():,} parameters"
    if prepared.adapters is not None:
        trained = lora_line(run, prepared.adapters.flat_P.numel())
    return (
        f"{len(tokens)} samples, {tokens.lengths.sum():,} tokens, {supervised:.1%} supervised, "
        f"{held} held out; {prepared.num_steps} steps; {trained}"
    )
