"""The SLURM job files, run by bash with stand-ins for SLURM and torchrun."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

FOLDER = Path(__file__).parents[2] / "train" / "slurm"
JOBS = sorted(path.name for path in FOLDER.glob("*.sbatch"))
STAND_INS = {
    "srun": 'while [[ $1 == -* ]]; do shift; done; "$@"',
    "torchrun": 'printf "%s\\n" "$@" >"$FAKE/torchrun.said"; exit "$CODE"',
    "scontrol": 'echo "$@" >>"$FAKE/scontrol.said"; [[ $1 == show ]] && echo first; true',
}


def submit(name: str, folder: Path, code: int, seconds: int = 0) -> tuple[int, list[str], str]:
    """Run a job; return its exit code, torchrun's arguments and what scontrol was told."""
    for tool, text in STAND_INS.items():
        path = folder / tool
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    environment = {
        **{"PATH": f"{folder}:{os.environ['PATH']}", "FAKE": str(folder), "CODE": str(code)},
        **{"SLURM_SUBMIT_DIR": str(folder), "SLURM_GPUS_ON_NODE": "4", "SLURM_NNODES": "3"},
        **{"SLURM_JOB_ID": "54321", "SLURM_JOB_NODELIST": "n[1-3]", "SECONDS": str(seconds)},
    }
    job = ["bash", str(FOLDER / name), "my.toml", "--set", "out=runs/x"]
    done = subprocess.run(job, env=environment, capture_output=True, text=True)
    said = folder / "scontrol.said"
    told = said.read_text() if said.exists() else ""
    return done.returncode, (folder / "torchrun.said").read_text().splitlines(), told


@pytest.mark.parametrize("name", JOBS)
def test_torchrun_gets_what_it_understands(name: str, tmp_path: Path) -> None:
    code, said, told = submit(name, tmp_path, 0)
    assert code == 0
    assert "requeue" not in told
    given = get_args_parser().parse_args(said)
    assert given.training_script == "train/main.py"
    assert given.training_script_args == ["my.toml", "--set", "out=runs/x", "--resume"]
    assert given.nproc_per_node == "4"
    assert given.nnodes == ("3" if "several" in name else "1:1")
    assert given.standalone == ("several" not in name)
    assert "SIGUSR1" in given.signals_to_handle.split(",")
    warning = re.search(r"#SBATCH --signal=USR1@(\d+)", (FOLDER / name).read_text())
    assert warning is not None
    assert 60 < given.shutdown_timeout < int(warning[1])


@pytest.mark.parametrize("name", JOBS)
def test_a_job_that_is_out_of_time_is_queued_again(name: str, tmp_path: Path) -> None:
    code, _, told = submit(name, tmp_path, 3, seconds=4000)
    assert code == 3
    assert "requeue 54321" in told


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize(("finished", "seconds"), [(True, 4000), (False, 5)])
def test_a_job_that_is_finished_or_fails_at_once_is_not(
    name: str, finished: bool, seconds: int, tmp_path: Path
) -> None:
    if finished:
        (tmp_path / "runs" / "x" / "state").mkdir(parents=True)
        (tmp_path / "runs" / "x" / "state" / "finished").write_text("")
    assert "requeue" not in submit(name, tmp_path, 1, seconds)[2]
