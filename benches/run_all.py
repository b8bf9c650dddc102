"""Run the benches of all ops, one process each; their lines go to stdout and to a folder's files.

    python benches/run_all.py --out results
    python benches/run_all.py --device cpu --tiny
    python benches/run_all.py --dry-run

A bench that fails (a wrong result, a kernel that does not run) does not stop the others; it is
named at the end, and the exit code is 1. The step of a whole model is train_step.py's.
"""

import subprocess
import sys
from pathlib import Path

import click

from bioinstruct.synth import console

SCRIPTS = (
    "lora_kernel",
    "layer",
    "rmsnorm_kernel",
    "swiglu_kernel",
    "rope_kernel",
    "cross_entropy",
    "attention",
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N")
@click.option("--tiny", is_flag=True, help="Small shapes, to try the benches on a CPU.")
@click.option("--dry-run", is_flag=True, help="Only bytes, FLOPs and predicted times.")
@click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of files.")
def command(device: str, tiny: bool, dry_run: bool, rounds: int, out: Path | None) -> None:
    """Run the benches of all ops, one after the other."""
    options = ["--device", device, "--rounds", str(rounds)]
    options += ["--tiny"] * tiny + ["--dry-run"] * dry_run
    failed = []
    for name in SCRIPTS:
        script = str(Path(__file__).with_name(f"{name}.py"))
        place = [] if out is None else ["--out", str(out / f"{name}.jsonl")]
        if subprocess.run([sys.executable, script, *options, *place]).returncode:
            failed.append(name)
    if failed:
        raise ValueError(f"{len(failed)} of {len(SCRIPTS)} benches failed: {', '.join(failed)}")


if __name__ == "__main__":
    console.run(command)
