"""The commands that make records: estimate, generate, batch, status."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bioinstruct.synth import console

if TYPE_CHECKING:
    from bioinstruct.synth.generation import Result
    from bioinstruct.synth.plan import Plan

FILE = click.Path(path_type=Path)


class Budget(click.ParamType[float]):
    """Dollars, or `none` for no cap."""

    name = "usd"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the cap in USD; infinity for none."""
        if value == "none":
            return float("inf")
        try:
            usd = float(value)
        except ValueError:
            usd = -1.0
        if not 0 <= usd < float("inf"):
            self.fail(f"{value!r} is neither an amount in USD nor `none`", param, ctx)
        return usd


Command = Callable[..., None]


def _with(options: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    return functools.reduce(lambda made, option: option(made), reversed(options), command)


def _settings(command: Command) -> Command:
    """Add the options that estimate, generate and batch share."""
    options = (
        click.option("--n", required=True, type=click.IntRange(min=1), help="Records wanted."),
        click.option("--model", required=True, help="A chat model, as the endpoint calls it."),
        click.option("--seeds", type=FILE, help="Example records. Default: the installed ones."),
        click.option("--prompt", type=FILE, help="A prompt of your own, with {seeds} in it."),
        click.option("--models", type=FILE, help="A table of models of your own (models.toml)."),
        click.option("--seed", default=0, show_default=True, help="Of the draws."),
        click.option(
            "--format",
            type=click.Choice(["schema", "list"]),
            default="schema",
            show_default=True,
            help="Answers as JSON under a schema, or as the paper's numbered list.",
        ),
        click.option(
            "--rules",
            type=click.Choice(["paper", "alpaca", "strict", "none"]),
            default="paper",
            show_default=True,
            help="What is dropped.",
        ),
        click.option("--rouge", type=float, default=0.7, show_default=True, help="ROUGE-L bound."),
        click.option(
            "--rotate",
            default=0,
            show_default=True,
            help="How many of a request's 3 examples are accepted records.",
        ),
        click.option(
            "--quotas",
            default="",
            help="Shares of the categories: `paper`, or such as qa=0.25,ie=0.35,gen=0.3,other=0.1.",
        ),
        click.option(
            "--facets",
            default="",
            help="Facets of the seeds that requests ask for, such as topic,difficulty.",
        ),
        click.option("--temperature", type=float, help="Default: 1 where the model takes one."),
        click.option("--top-p", type=float),
        click.option(
            "--max-tokens", default=8192, show_default=True, help="The most tokens of an answer."
        ),
        click.option("--price-in", type=float, help="USD per million tokens read."),
        click.option("--price-out", type=float, help="USD per million tokens written."),
        click.option(
            "--batch-factor",
            type=float,
            help="What a batch costs, as a share of the prices. Default: the table's.",
        ),
        click.option(
            "--budget",
            type=Budget(),
            help="The most that the folder may ever cost, in USD, or `none`. Default: twice the "
            "estimate.",
        ),
    )
    return _with(options, command)


def _run(command: Command) -> Command:
    """Add the options of the commands that ask an endpoint."""
    options = (
        click.option(
            "--out", required=True, type=FILE, help="The run's folder; an existing run goes on."
        ),
        _settings,
        click.option("--base-url", default="https://api.openai.com/v1", show_default=True),
        click.option("--api-key-env", help="Variable that holds the key. Default: OPENAI_API_KEY."),
        click.option(
            "--cache", type=FILE, help="Folder of answers that runs share; those there are free."
        ),
        click.option(
            "--concurrency", default=32, show_default=True, help="The most requests in flight."
        ),
        click.option(
            "--rpm", type=float, help="Requests a minute. Default: as the endpoint's headers say."
        ),
        click.option("--tpm", type=float, help="Tokens a minute, likewise."),
        click.option(
            "--timeout",
            "timeout_s",
            default=600.0,
            show_default=True,
            help="Seconds a connection may take, and then an answer.",
        ),
        click.option(
            "--max-failures", default=10, show_default=True, help="In a row, to give up after."
        ),
        click.option(
            "--allow-phi-like", is_flag=True, help="Send seeds that seem to identify persons."
        ),
    )
    return _with(options, command)


def _plan(options: dict[str, Any]) -> "Plan":
    from bioinstruct.synth.pace import Limits
    from bioinstruct.synth.plan import Plan, Settings

    names = ("concurrency", "rpm", "tpm", "timeout_s", "max_failures")
    limits = Limits(**{name: options.pop(name) for name in names if name in options})
    return Plan(Settings(limits=limits, **options))


@click.command()
@_settings
def estimate(**options: Any) -> None:
    """Say what a run would cost; nothing is sent or written."""
    from bioinstruct.synth.estimate import text

    plan = _plan({"out": Path(), **options})
    click.echo(text(plan, plan.prices))
    if plan.settings.batch_factor is not None or plan.model.batch is not None:
        click.echo(f"in batches: {text(plan, plan.batch_prices)}")


@click.command()
@_run
@click.option("--dry-run", is_flag=True, help="Print request 0 and the estimate, send nothing.")
@click.option("--replay", is_flag=True, help="Judge the journal anew, send nothing.")
def generate(dry_run: bool, replay: bool, **options: Any) -> None:
    """Make instruction records with a chat model. The same command again goes on."""
    from bioinstruct.synth import generation
    from bioinstruct.synth.estimate import text

    if dry_run and replay:
        raise click.UsageError("--dry-run and --replay exclude each other")
    plan = _plan(options)
    if dry_run:
        click.echo(generation.dry_run(plan))
        return
    if not replay:
        console.note(text(plan, plan.prices))
    _tell(plan, generation.replay(plan) if replay else generation.run(plan))


def _tell(plan: "Plan", result: "Result") -> None:
    from bioinstruct.synth.generation import RECORDS

    dropped = [f"{count} {rule}" for rule, count in result.funnel.most_common() if rule != "kept"]
    free = f", {result.cached} of them from the cache" if result.cached else ""
    console.note(
        f"{len(result.records)} records in {plan.settings.out / RECORDS} out of "
        f"{result.requests} answers{free}, ${result.charged_usd:,.4f} charged; dropped: "
        f"{', '.join(dropped) or 'nothing'}"
    )


@click.command()
@_run
@click.option(
    "--batch-requests", default=50_000, show_default=True, help="The most requests of a batch."
)
@click.option("--batch-bytes", default=200_000_000, show_default=True, help="Of a batch's file.")
@click.option("--poll", "poll_s", default=30.0, show_default=True, help="Seconds between looks.")
@click.option(
    "--tail",
    default=64,
    show_default=True,
    help="Fewer open requests than this are asked online, once there are answers; 0: never.",
)
@click.option(
    "--keep-files",
    is_flag=True,
    help="Leave the batches' files at the provider; otherwise they are deleted once their answers "
    "are on disk.",
)
def batch(
    batch_requests: int,
    batch_bytes: int,
    poll_s: float,
    tail: int,
    keep_files: bool,
    **options: Any,
) -> None:
    """Make the same records through the Batch API, at its lower price.

    Stop it while batches are worked off: the same command collects them, also after kill -9.
    """
    from bioinstruct.synth import batching
    from bioinstruct.synth.estimate import text

    how = batching.Batching(
        requests=batch_requests,
        size_bytes=batch_bytes,
        poll_s=poll_s,
        tail=tail,
        keep_files=keep_files,
    )
    plan = _plan(options)
    console.note(text(plan, plan.batch_prices))
    _tell(plan, batching.run(plan, how))


@click.command()
@click.argument("folder", type=FILE)
def status(folder: Path) -> None:
    """Say how far a run is, what it cost, and what was dropped and why."""
    from bioinstruct.synth import report

    click.echo(report.status(folder))


COMMANDS = (estimate, generate, batch, status)
