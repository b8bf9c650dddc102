"""What a run would do, printed; only the token cache is written."""

from bioinstruct.train.prepare import Prepared, prepare
from bioinstruct.train.ranks import ALONE, Ranks
from bioinstruct.train.run import Run


def dry_run(run: Run, ranks: Ranks = ALONE) -> None:
    """Check a run and print what it would do; only the token cache is written."""
    prepared = prepare(run, ranks)
    if ranks.is_first:
        _print_plan(prepared)


def _print_plan(prepared: Prepared) -> None:
    tokens, planner = prepared.tokens, prepared.planner
    first = planner.plan(0)
    print(summary(prepared))
    fill = first.tokens / (len(first.packs) * planner.max_tokens)
    print(f"step 1: {len(first.packs)} packs, {first.tokens} tokens, {fill:.1%} of the packs' room")
    ids, prompt = tokens.sample(0)
    decode = prepared.llm.tokenizer.decode
    print(f"first sample, {tokens.places[0]}; supervised part between the lines:")
    print(
        f"{decode(ids[:prompt].tolist())}\n{'-' * 40}\n{decode(ids[prompt:].tolist())}\n{'-' * 40}"
    )
    print(f"its last supervised token is {int(ids[-1])}, {prepared.template.stop!r}")


def summary(prepared: Prepared) -> str:
    """Return one line: samples, tokens, steps and what trains."""
    tokens = prepared.tokens
    held = len(prepared.validation) if prepared.validation else 0
    supervised = tokens.supervised.sum() / tokens.lengths.sum()
    return (
        f"{len(tokens)} samples, {tokens.lengths.sum():,} tokens, {supervised:.1%} supervised, "
        f"{held} held out; {prepared.num_steps} steps; {_trained(prepared)} trained parameters"
    )


def _trained(prepared: Prepared) -> str:
    lora = prepared.run.lora
    if prepared.adapters is None:
        return f"all weights: {prepared.llm.config.parameter_count():,}"
    return (
        f"LoRA r={lora.r} alpha={lora.alpha:g} on {', '.join(lora.targets)}: "
        f"{prepared.adapters.flat_P.numel():,}"
    )
