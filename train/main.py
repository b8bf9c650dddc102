"""Train from a recipe: `python train/main.py [RECIPE.toml] [--set key=value]...`, or torchrun.

Without a recipe and without model.path this runs the demo recipe, train/demo/recipe.toml. A run
that was stopped or killed goes on with `python train/main.py OUT/run.toml --resume`.
"""

import os
import shlex
import sys
from pathlib import Path

import click

from bioinstruct.synth import console
from bioinstruct.train.ranks.stops import interrupt_on_usr1

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
@click.option("--resume", is_flag=True, help="Continue the run in the folder `out`.")
@click.option("--profile", metavar="A:B", help="Trace the steps A to B into profile-A-B.json.")
def command(
    recipe: Path | None, overrides: tuple[str, ...], dry: bool, resume: bool, profile: str | None
) -> None:
    """Tune a LLaMA model on instruction records.

    RECIPE is a TOML file; defaults < RECIPE < --set. Without RECIPE and without
    --set model.path=... the demo recipe runs.
    """
    if recipe is not None and not recipe.is_file():
        raise click.UsageError(f"there is no recipe {recipe}")
    # torch is imported only now, so that --help and wrong usage answer at once
    from bioinstruct.train.demo import RECIPE
    from bioinstruct.train.loop import train
    from bioinstruct.train.plan.dry_run import dry_run
    from bioinstruct.train.ranks.process import joined
    from bioinstruct.train.report.profiling import read_steps
    from bioinstruct.train.run import read_run

    if recipe is None and not any(o.startswith("model.path=") for o in overrides):
        recipe = RECIPE
    run = read_run(recipe, overrides)
    traced = None if profile is None else read_steps(profile)
    name = "run" if recipe is None else "demo" if recipe == RECIPE else recipe.stem
    if dry:
        if os.environ.get("RANK", "0") == "0":
            dry_run(run)
        return
    with joined(run.device) as ranks:
        said = shlex.join(sys.argv)
        out = train(run, name, said, ranks, resume=resume, profile=traced)
    if recipe == RECIPE:
        console.note(NEXT.format(out=out))


def main() -> None:
    """Entry point; of several ranks the first one speaks."""
    interrupt_on_usr1()
    if os.environ.get("RANK", "0") != "0":
        console.mute()
    # torch is imported only for several ranks, so that --help and wrong usage answer at once
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        console.run(command)
    from bioinstruct.train.ranks.process import to_its_end

    to_its_end(lambda: console.run(command))


if __name__ == "__main__":
    main()
