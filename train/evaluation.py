"""What is looked at while training: the loss on held-out records, and sample answers."""

import json
from pathlib import Path

from bioinstruct.model.generate import generate
from bioinstruct.model.templates import decode_answer
from bioinstruct.synth.console import note
from bioinstruct.train.metrics import MetricsLog
from bioinstruct.train.planner import Planner
from bioinstruct.train.prepare import Prepared, own_batches
from bioinstruct.train.step import summed_loss

SAMPLE_TOKENS = 64


def validate(prepared: Prepared, step: int, out: Path, log: MetricsLog) -> None:
    """Write the validation loss, and sample answers beside the references."""
    model, held = prepared.llm.model, prepared.validation
    if held is not None and len(held):
        planner = Planner(
            held.lengths,
            held.supervised,
            max_tokens=prepared.planner.max_tokens,
            batch_samples=len(held),
            shuffle=False,
        )
        plan = planner.plan(0)
        batches = own_batches(prepared, held, plan)
        own = sum(summed_loss(model, prepared.adapters, batch) for batch in batches)
        loss = prepared.ranks.total([own])[0] / plan.supervised_tokens
        log.write({"step": step + 1, "val_loss": loss, "val_tokens": plan.supervised_tokens})
        note(f"validation loss {loss:.4f} after step {step + 1}")
    prepared.ranks.from_first(lambda: _write_samples(prepared, step, out))


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
                "step": step + 1,
                "record": source.places[i],
                "prompt": llm.tokenizer.decode(ids[:prompt].tolist()),
                "answer": decode_answer(template, llm.tokenizer, completion.ids),
                "reference": decode_answer(template, llm.tokenizer, ids[prompt:].tolist()),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
