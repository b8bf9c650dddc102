"""The rows of metrics.jsonl as TensorBoard shows them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"


def tensorboard_writer(out: Path, step: int) -> Callable[[Mapping[str, Any]], None]:
    """Return a function that writes a row's numbers for TensorBoard.

    Args:
        out: folder of the run.
        step: steps taken; what an earlier process wrote for later ones is hidden.

    Raises:
        ValueError: TensorBoard is not installed.
    """
    check_installed()
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / FOLDER), purge_step=step + 1)

    def write(row: Mapping[str, Any]) -> None:
        for name, value in numbers(row).items():
            writer.add_scalar(name, value, row["step"])
        writer.flush()

    return write


def check_installed() -> None:
    """Refuse to go on without TensorBoard.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise ValueError(
            "train.tensorboard = true needs TensorBoard, which is not installed; run "
            "`pip install tensorboard`, or leave the setting out: metrics.jsonl has the same"
        ) from None


def numbers(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of a row, those of inner tables as table/name."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            found[prefix + name] = float(value)
    return found
