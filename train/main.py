"""Train from a recipe: `python train/main.py [RECIPE.toml] [--set key=value]...`, or torchrun.

Without a recipe and without model.path this runs the demo recipe, train/demo/recipe.toml.
"""

import os
import shlex
import sys
from pathlib import Path

import click

from bioinstruct.synth import console

NEXT = """
All answers are in {out}/eval-after; the report is {out}/report.md.
Next, the same on a 7B model and a GPU (all records, an epoch):
  python train/main.py train/demo/recipe.toml --set model.path=models/Llama-2-7b-hf \\
    --set data.template=auto --set train.batch_samples=64 --set train.steps=92 \\
    --set train.lr=2e-4 --set data.max_tokens_per_pack=4096 --set out=runs/7b"""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key.")
@click.option("--dry-run", "dry", is_flag=True, help="Check everything, print the plan, stop.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run (not in this version).")
def command(recipe: Path | None, overrides: tuple[str, ...], dry: bool, resume: bool) -> None:
    """Tune a LLaMA model on instruction records.

    RECIPE is a TOML file; defaults < RECIPE < --set. Without RECIPE and without
    --set model.path=... the demo recipe runs.
    """
    if resume:
        raise click.UsageError("--resume is not supported by this version; start a new run")
    if recipe is not None and not recipe.is_file():
        raise click.UsageError(f"there is no recipe {recipe}")
    # torch is imported only now, so that --help and wrong usage answer at once
    from bioinstruct.train.demo import RECIPE
    from bioinstruct.train.dry_run import dry_run
    from bioinstruct.train.loop import train
    from bioinstruct.train.ranks import joined
    from bioinstruct.train.run import read_run

    if recipe is None and not any(o.startswith("model.path=") for o in overrides):
        recipe = RECIPE
    run = read_run(recipe, overrides)
    name = "run" if recipe is None else "demo" if recipe == RECIPE else recipe.stem
    with joined(run.device) as ranks:
        if dry:
            dry_run(run, ranks)
            return
        out = train(run, name, shlex.join(sys.argv), ranks)
    if recipe == RECIPE:
        console.note(NEXT.format(out=out))


def main() -> None:
    """Entry point; of several ranks the first one speaks."""
    if os.environ.get("RANK", "0") != "0":
        console.mute()
    console.run(command)


if __name__ == "__main__":
    main()
