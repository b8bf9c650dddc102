"""`bioinstruct-eval`: score models and answer files. Only `run` imports torch."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from bioinstruct.synth import console

if TYPE_CHECKING:
    from bioinstruct.eval.report import Row
    from bioinstruct.eval.runner import Job

FILE = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="bioinstruct", prog_name="bioinstruct-eval")
def cli() -> None:
    """Score models on biomedical tasks, with intervals and with unread answers counted."""


@cli.command()
def tasks() -> None:
    """List the tasks: what they read, their forms, papers and licences."""
    from bioinstruct.eval.tasks import TASKS

    for task in TASKS.values():
        click.echo(f"{task.name} (version {task.version})")
        click.echo(f"  reads    {task.source}")
        click.echo(f"  forms    {', '.join(task.forms) or 'one'}; main score {task.main}")
        click.echo(f"  paper    {task.paper}")
        click.echo(f"  licence  {task.licence}")


def _common(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that run and score share."""
    options = (
        click.option(
            "--form", help="How mentions are answered: list or medtuned. Default: the task's first."
        ),
        click.option("--overwrite", is_flag=True, help="Replace results that stand in --out."),
    )
    return functools.reduce(lambda made, option: option(made), reversed(options), command)


@cli.command()
@click.option("--model", required=True, type=FILE, help="Model folder, .safetensors or .gguf file.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=FILE,
    help="PEFT adapter folder; may be repeated, each is a row of the table.",
)
@click.option("--with-base", is_flag=True, help="With --adapter: a row without any adapter too.")
@click.option(
    "--task",
    "named",
    multiple=True,
    required=True,
    metavar="NAME=PATH",
    help="A task and its dataset's published file; may be repeated.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Draw that many items of each task.")
@click.option("--seed", default=0, show_default=True, help="Of the draw.")
@click.option("--template", help="Prompt template. Default: what fits the model.")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32 or bfloat16.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--tokenizer", type=FILE, help="Its file or folder, where the model has none.")
@click.option("--out", required=True, type=FILE, help="Folder for the results.")
@_common
def run(
    model: Path,
    adapters: tuple[Path, ...],
    with_base: bool,
    named: tuple[str, ...],
    limit: int | None,
    seed: int,
    template: str | None,
    dtype: str,
    device: str,
    tokenizer: Path | None,
    out: Path,
    form: str | None,
    overwrite: bool,
) -> None:
    """Put tasks to a model and score its answers."""
    from bioinstruct.eval import report

    if with_base and not adapters:
        raise click.UsageError("--with-base belongs to --adapter; without one the base is the row")
    report.refuse_existing(out, overwrite)
    jobs = _jobs(named, form, limit, seed)
    base: tuple[Path | None, ...] = (None,) if with_base or not adapters else ()
    rows = []
    how = {"dtype": dtype, "device": device, "tokenizer": tokenizer}
    for number, adapter in enumerate((*base, *adapters), 1):
        rows.append(_ask(model, adapter, jobs, template, how))
        report.write_samples(out, rows[-1], number)
    settings = {
        "model": str(model),
        "adapters": [str(adapter) for adapter in adapters],
        "limit": limit,
        "seed": seed,
        "form": form,
        "template": template,
        "dtype": dtype,
        "device": device,
        "tokenizer": None if tokenizer is None else str(tokenizer),
    }
    report.write_results(out, rows, settings)
    click.echo(report.table(rows))
    console.note(f"results are in {out}")


@cli.command()
@click.option("--task", "name", required=True, metavar="NAME", help="See `tasks`.")
@click.option("--gold", required=True, type=FILE, help="The dataset's published file.")
@click.option(
    "--predictions", required=True, type=FILE, help="Objects with id and output, one a line."
)
@click.option("--allow-missing", is_flag=True, help="Count ids without an answer as unparsed.")
@click.option("--out", type=FILE, help="Folder for the results, if they are to be kept.")
@_common
def score(
    name: str,
    gold: Path,
    predictions: Path,
    allow_missing: bool,
    out: Path | None,
    form: str | None,
    overwrite: bool,
) -> None:
    """Score answers that any program wrote."""
    from bioinstruct.eval import report
    from bioinstruct.eval.predictions import match, read_predictions, some
    from bioinstruct.eval.runner import grade, prepare
    from bioinstruct.eval.tasks import find_task

    if overwrite and out is None:
        raise click.UsageError("--overwrite belongs to --out")
    if out is not None:
        report.refuse_existing(out, overwrite)
    job = prepare(find_task(name), gold, form=form)
    found = match(job.items, read_predictions(predictions), allow_missing=allow_missing)
    if found.missing:
        console.note(f"{len(found.missing)} ids without a prediction count as unparsed")
    if found.unknown:
        console.note(f"{len(found.unknown)} unknown ids were not scored: {some(found.unknown)}")
    results = [grade(job, found.outputs)]
    row = report.Row(system=predictions.name, model=None, adapter=None, results=results)
    if out is not None:
        settings = {"predictions": str(predictions), "gold": str(gold), "form": form}
        report.write_samples(out, row, 1)
        report.write_results(out, [row], {**settings, "missing": len(found.missing)})
    click.echo(report.table([row]))


def _jobs(named: Sequence[str], form: str | None, limit: int | None, seed: int) -> "list[Job]":
    """Read the files of --task NAME=PATH; a form goes to the tasks that have forms."""
    from bioinstruct.eval.runner import prepare
    from bioinstruct.eval.tasks import find_task

    pairs = []
    for text in named:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise click.UsageError(f"--task wants NAME=PATH, not {text!r}")
        pairs.append((find_task(name), Path(path)))
    names = [task.name for task, _ in pairs]
    if len(set(names)) < len(names):
        raise click.UsageError("--task names a task twice; evaluate its files one run each")
    if form and not any(task.forms for task, _ in pairs):
        raise click.UsageError(f"--form has no effect on {', '.join(names)}")
    return [
        prepare(task, path, form=form if task.forms else None, limit=limit, seed=seed)
        for task, path in pairs
    ]


def _ask(
    model: Path,
    adapter: Path | None,
    jobs: "Sequence[Job]",
    template: str | None,
    how: Mapping[str, Any],
) -> "Row":
    """Load a model, with an adapter or without, and put the jobs to it.

    Args:
        how: options of bioinstruct.model.load.
    """
    from bioinstruct.eval.report import Row
    from bioinstruct.eval.runner import progress_bars, run_tasks
    from bioinstruct.model import load

    system = str(model) if adapter is None else f"{model} + {adapter}"
    llm = load(model, adapter=adapter, **how)
    results = run_tasks(llm, jobs, template=template, on_progress=progress_bars())
    return Row(
        system=system,
        model=str(model),
        adapter=None if adapter is None else str(adapter),
        results=results,
    )


def main() -> NoReturn:
    """Run the command line and exit."""
    console.run(cli)


if __name__ == "__main__":
    main()
