"""What a run tells about itself: `status` while it runs, the data card when it is done."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bioinstruct.synth import money
from bioinstruct.synth.files import write_text
from bioinstruct.synth.journal import NAME
from bioinstruct.synth.plan import Plan, read_run
from bioinstruct.synth.totals import Totals, read_totals

CARD = "card.md"


def status(folder: Path) -> str:
    """Return how far a run is, from its files alone; it may be running.

    Raises:
        ValueError: the folder's files are broken.
        OSError: it holds no run.
    """
    run, totals = read_run(folder), read_totals(folder / NAME)
    wanted = run["free"]["n"]
    funnel = _funnel(totals)
    kept = funnel["kept"]
    minutes = max(totals.last_s - totals.first_s, 0.0) / 60
    rate = totals.received / minutes if minutes > 0 else 0.0
    lines = [
        f"model     {run['fixed']['model']} at {run['free']['base_url']}",
        f"records   {kept} of {wanted}{' (done)' if kept >= wanted else ''}",
        f"answers   {totals.received} ({totals.cached} from the cache), "
        f"{totals.failed} failed attempts",
        f"spent     {money.shown(totals.charged)}, reserved or unknown "
        f"{money.shown(totals.spent - totals.charged)}, budget {run['free']['budget_usd']}",
        f"batches   {len(totals.under_way)} under way of {len(totals.batches)}",
        f"rate      {rate:.1f} answers a minute, {_left(kept, wanted, minutes)}",
        "funnel    " + ", ".join(f"{count} {rule}" for rule, count in funnel.most_common()),
    ]
    return "\n".join(lines)


def _funnel(totals: Totals) -> Counter[str]:
    return Counter(
        item["rule"] or "kept" for row in totals.verdicts.values() for item in row["items"]
    )


def _left(kept: int, wanted: int, minutes: float) -> str:
    if kept >= wanted:
        return "nothing left to do"
    if not kept or minutes <= 0:
        return "time left unknown"
    return f"about {minutes / kept * (wanted - kept):.0f} minutes left"


def write_card(
    plan: Plan,
    totals: Totals,
    records: Sequence[dict[str, Any]],
    funnel: Counter[str],
    *,
    requests: int,
) -> None:
    """Write the data card of a run."""
    settings, fixed = plan.settings, plan.fixed
    served = sorted({answer.model for answer in totals.answers.values() if answer.model})
    prints = {answer.fingerprint for answer in totals.answers.values() if answer.fingerprint}
    price = f"{plan.prices.input_pico / 1e6:g} / {plan.prices.output_pico / 1e6:g}"
    seeds = Counter(name for record in records for name in record["provenance"]["seeds"])
    text = f"""# Data card

{len(records)} instruction records (instruction, input, output) for biomedicine and health care,
written by a language model from {len(plan.seeds)} examples.

| | |
|---|---|
| model asked for | {settings.model} |
| model served | {", ".join(served) or "not reported"}, {len(prints)} system fingerprints |
| endpoint | {settings.base_url} |
| requests | {requests} judged, {totals.received} answered ({totals.cached} from the cache), \
{totals.failed} failed attempts, {len(totals.batches)} batches |
| asked | {_day(totals.first_s)} to {_day(totals.last_s)} (UTC) |
| charged | {money.shown(totals.spent)} at {price} USD per million tokens read / written |
| format, rules | {settings.format}, {settings.rules} with ROUGE-L {settings.rouge:g} |
| seeds | {len(plan.seeds)}, {len(seeds)} of them behind a record; SHA-256 {fixed["seeds"]} |
| prompt | SHA-256 {fixed["prompt"]} |

## What became of the candidates

| | |
|---|---|
"""
    text += "".join(f"| {rule} | {count} |\n" for rule, count in funnel.most_common())
    text += f"""
## The prompt

```text
{plan.template}
```

## Limits and licence

The records were written by a model and were not checked by a clinician; they hold errors, and are
no medical advice. The terms of the model's provider apply to its output: some forbid training
models that compete with theirs. The seeds' licence applies to what repeats them. How to make the
records again: run.toml and journal.jsonl in this folder.
"""
    write_text(settings.out / CARD, text)


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds)) if seconds else "unknown"
