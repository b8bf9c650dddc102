"""`bioinstruct-synth`: make instruction records. No command here imports torch."""

from pathlib import Path
from typing import NoReturn

import click

from bioinstruct.synth import console, generate_cli

FILE = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="bioinstruct", prog_name="bioinstruct-synth")
def cli() -> None:
    """Make instruction records for biomedical tuning."""


@cli.command()
@click.option(
    "--from",
    "corpus",
    required=True,
    type=click.Choice(["conll-ner", "pubmedqa"]),
    help="What the corpus is: token-and-tag lines, or PubMedQA's ori_pqal.json.",
)
@click.option("--in", "source", required=True, type=FILE, help="The corpus, plain or .gz.")
@click.option("--out", required=True, type=FILE, help="Where to: .jsonl or .json, or these + .gz.")
@click.option(
    "--form",
    type=click.Choice(["list", "medtuned"]),
    help="conll-ner: answer with a list of mentions (default), or with `token : TAG` lines.",
)
@click.option("--entity", help="conll-ner: the type asked for. Default: disease.")
@click.option(
    "--exclude",
    multiple=True,
    type=FILE,
    help="Leave out what stands in this file: sentences of a CoNLL file, or ids of PubMedQA's "
    "test_ground_truth.json. May be repeated.",
)
@click.option("--overwrite", is_flag=True, help="Replace the output file if it exists.")
def convert(
    corpus: str,
    source: Path,
    out: Path,
    form: str | None,
    entity: str | None,
    exclude: tuple[Path, ...],
    overwrite: bool,
) -> None:
    """Turn a labelled corpus into instruction records."""
    from bioinstruct.synth import convert as converters
    from bioinstruct.synth.records import write_records

    if corpus == "pubmedqa" and (form or entity):
        raise click.UsageError("--form and --entity belong to conll-ner; pubmedqa has neither")
    if corpus == "pubmedqa":
        made = converters.convert_pubmedqa(source, exclude)
    else:
        made = converters.convert_conll(source, entity or "disease", form or "list", exclude)
    if not made.records:
        raise ValueError(f"{source}: --exclude leaves no record; nothing was written")
    written = write_records(out, made.records, overwrite=overwrite)
    orphans = f", {made.orphans} mentions begin with I instead of B" if made.orphans else ""
    console.note(f"{written} records written to {out}, {made.excluded} excluded{orphans}")


class _Lists(click.Command):
    """A command whose file lists may be written as one: --in A B C for --in A --in B --in C."""

    lists = ("--in", "--against")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        flag = ""
        for arg in args:
            if arg.startswith("-"):
                if spread and spread[-1] in self.lists:
                    raise click.UsageError(f"{spread[-1]} needs a file", ctx)
                flag = arg if arg in self.lists else ""
            elif flag and spread[-1] != flag:
                spread.append(flag)
            spread.append(arg)
        return super().parse_args(ctx, spread)


@cli.command("filter", cls=_Lists)
@click.option(
    "--in",
    "sources",
    required=True,
    multiple=True,
    type=FILE,
    metavar="FILE...",
    help="Records to filter, one or more files.",
)
@click.option("--out", required=True, type=FILE, help="Where to: .jsonl or .json, or these + .gz.")
@click.option(
    "--against",
    multiple=True,
    type=FILE,
    metavar="FILE...",
    help="Records that the kept ones must differ from too, such as seeds or an earlier set.",
)
@click.option(
    "--rules",
    type=click.Choice(["paper", "alpaca", "strict", "none"]),
    default="paper",
    show_default=True,
    help="paper: BioInstruct's. alpaca: the same, with Alpaca's edges. strict: for medicine, with "
    "placeholders, refusals and other languages. none: ROUGE-L only.",
)
@click.option(
    "--rouge",
    type=float,
    default=0.7,
    show_default=True,
    help="Drop instructions with a ROUGE-L F this high (alpaca: higher) to a kept one.",
)
@click.option("--overwrite", is_flag=True, help="Replace the output files if they exist.")
def filter_command(
    sources: tuple[Path, ...],
    out: Path,
    against: tuple[Path, ...],
    rules: str,
    rouge: float,
    overwrite: bool,
) -> None:
    """Keep the records that are new and sound.

    Instructions are compared, not inputs. Kept records are written as they are, in their order; the
    others go to OUT.dropped.jsonl, each with its reason.
    """
    from bioinstruct.synth.filters import filter_files

    done = filter_files(
        sources, out, against=against, rules=rules, rouge=rouge, overwrite=overwrite
    )
    why = ", ".join(f"{rule} {number}" for rule, number in done.rules.items())
    dropped = f"{done.read - done.kept} dropped ({why})" if why else "none dropped"
    console.note(f"{done.kept} of {done.read} records kept in {out}, {dropped}; see {done.dropped}")


for command in generate_cli.COMMANDS:
    cli.add_command(command)


def main() -> NoReturn:
    """Run the command line and exit."""
    console.run(cli)


if __name__ == "__main__":
    main()
