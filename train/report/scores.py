"""Task scores before and after training, beside what simple baselines reach."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from bioinstruct.eval import baselines
from bioinstruct.eval.report import RESULTS, Row, table, write_results, write_samples
from bioinstruct.eval.runner import Job, Result, grade, progress_bars, run_tasks
from bioinstruct.eval.runner import prepare as prepare_job
from bioinstruct.eval.tasks import find_task, ncbi_disease, pubmedqa
from bioinstruct.model.llm import Llm
from bioinstruct.synth.files import write_text
from bioinstruct.synth.sources import read_conll, read_pubmedqa
from bioinstruct.train.demo import resolve
from bioinstruct.train.run import Run


def prepare_jobs(run: Run) -> list[Job]:
    """Read every task's file, so that a wrong path shows before training.

    Raises:
        ValueError: an unknown task, or a file that is missing or malformed.
    """
    jobs = []
    for given in run.eval.tasks:
        name, _, path = given.partition("=")
        task = find_task(name)
        form = run.eval.form if task.forms else None
        jobs.append(
            prepare_job(task, resolve(path), form=form, limit=run.eval.limit, seed=run.train.seed)
        )
    return jobs


def score_tasks(
    llm: Llm,
    jobs: Sequence[Job],
    template: str,
    out: Path,
    stage: str,
    *,
    outcome: Path | None = None,
) -> Row:
    """Answer and score every job, and write its files to out/eval-<stage>.

    Args:
        llm: the model; its adapters, where it has any, take part.
        jobs: prepared tasks.
        template: name of the prompt template.
        out: folder of the run.
        stage: before | after | step-N.
        outcome: folder of the adapter or of the model that answers, where the run made it.
    """
    bars = progress_bars(f" {stage} training")
    results = run_tasks(llm, jobs, template=template, on_progress=bars)
    model, adapter = str(llm.path), None
    if outcome is not None and llm.adapters is not None:
        adapter = str(outcome)
    elif outcome is not None:
        model = str(outcome)
    row = Row(system=f"{stage} tuning", model=model, adapter=adapter, results=results)
    folder = out / f"eval-{stage}"
    write_samples(folder, row, 1)
    write_results(folder, [row], {"model": model, "adapter": adapter, "template": template})
    return row


def check_best(keep_best: str, jobs: Sequence[Job]) -> None:
    """Refuse a train.keep_best that names a score which its task does not have.

    Raises:
        ValueError: with the scores that the task has.
    """
    task, _, name = keep_best.partition(":")
    for job in jobs:
        if name and job.task.name == task:
            # graded with the right answers, only to learn the names
            known = grade(job, [item.gold for item in job.items]).scores
            if name not in known:
                raise ValueError(
                    f"train.keep_best = {keep_best!r}: {task} has no score {name!r}, only "
                    f"{', '.join(known)}"
                )


def stored_row(jobs: Sequence[Job], out: Path, stage: str) -> Row | None:
    """Read back what score_tasks wrote before an interruption.

    Returns:
        The row with its answers judged again; None where the same items were not all answered.
    """
    folder = out / f"eval-{stage}"
    if not (folder / RESULTS).is_file():
        return None
    row = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["rows"][0]
    results = []
    for job in jobs:
        entry = row["tasks"].get(job.task.name)
        if entry is None:
            return None
        lines = (folder / entry["samples"]).read_text(encoding="utf-8").splitlines()
        samples = [json.loads(line) for line in lines]
        asked = [(item.id, item.instruction, item.input) for item in job.items]
        if [(s["id"], s["instruction"], s["input"]) for s in samples] != asked:
            return None
        result = grade(job, [s["output"] for s in samples])
        kept = {key: entry[key] for key in ("template", "max_new_tokens", "seconds")}
        finished = [bool(s["finished"]) for s in samples]
        results.append(dataclasses.replace(result, finished=finished, **kept))
    return Row(system=row["system"], model=row["model"], adapter=row["adapter"], results=results)


def baseline_rows(jobs: Sequence[Job], lexicon: str) -> list[Row]:
    """What answers without a model score on the same items.

    Args:
        jobs: prepared tasks.
        lexicon: CoNLL file whose mentions make a lexicon for NER, or empty.
    """
    rows = []
    for job in jobs:
        if job.task is ncbi_disease.TASK and lexicon:
            train = read_conll(resolve(lexicon))
            for name, fold in (("training lexicon, case folded", True), ("same, case kept", False)):
                outputs = baselines.lexicon_outputs(train, job.items, form=job.form, fold_case=fold)
                rows.append(_baseline(name, grade(job, outputs)))
        if job.task is pubmedqa.TASK:
            asked = {item.id for item in job.task.items(job.path)}
            others = [q for q in read_pubmedqa(job.path) if q.id not in asked]
            outputs = baselines.majority_outputs(others, job.items)
            rows.append(_baseline("majority class", grade(job, outputs)))
    return rows


def _baseline(name: str, result: Result) -> Row:
    return Row(system=name, model=None, adapter=None, results=[result])


def write_report(
    out: Path,
    run: Run,
    rows: Mapping[str, Row],
    jobs: Sequence[Job],
    *,
    seconds: float,
    outcome: Path,
) -> str:
    """Write report.md: before, after, baselines, and what each verdict rests on; return the table.

    Args:
        out: folder of the run.
        run: its settings.
        rows: "before", where it was scored, and "after".
        jobs: the tasks they answered.
        seconds: wall time of the run so far.
        outcome: folder of the adapter or of the model that was scored.
    """
    systems = [*rows.values(), *baseline_rows(jobs, run.eval.lexicon)]
    text = table([_main_only(row) for row in systems])
    trained = f"LoRA r={run.lora.r} on {', '.join(run.lora.targets)}"
    if run.train.method == "full":
        trained = "all weights"
    verdicts = "\n".join(f"- {line}" for line in _verdicts(rows, systems[len(rows) :]))
    whole = "\n\n".join(
        [
            "# Run report",
            f"Model `{run.model.path}`, trained: {trained}; {seconds / 60:.1f} minutes. Settings: "
            f"`run.toml`; curve: `loss.svg`; what was scored: `{outcome.name}/`; every answer: "
            f"{', '.join(f'`eval-{stage}/`' for stage in rows)}.",
            "![loss by step](loss.svg)",
            text,
            "Values are percentages with 95 % bootstrap intervals over items.",
            verdicts,
        ]
    )
    write_text(out / "report.md", whole + "\n")
    return f"{text}\n\n{verdicts}"


def _main_only(row: Row) -> Row:
    """Keep each task's main score, which the verdicts speak of."""
    kept = [
        dataclasses.replace(r, scores={r.job.task.main: r.scores[r.job.task.main]})
        for r in row.results
    ]
    return dataclasses.replace(row, results=kept)


def _verdicts(rows: Mapping[str, Row], others: Sequence[Row]) -> list[str]:
    lines = []
    for result in rows["after"].results:
        task, after = result.job.task, result.scores[result.job.task.main]
        name = f"{task.name} {task.main}"
        before = [
            r.scores[task.main]
            for r in (rows["before"].results if "before" in rows else ())
            if r.job.task is task
        ]
        for old in before:
            apart = "do not overlap" if after.low > old.high or after.high < old.low else "overlap"
            lines.append(
                f"{name}: {100 * old.value:.1f} before, {100 * after.value:.1f} after tuning; "
                f"the intervals {apart}"
            )
        for row in others:
            for r in row.results:
                if r.job.task is task:
                    base = r.scores[task.main]
                    side = "above" if after.value > base.value else "not above"
                    lines.append(
                        f"{name}: the tuned model is {side} the baseline '{row.system}' "
                        f"({100 * base.value:.1f})"
                    )
    return lines
