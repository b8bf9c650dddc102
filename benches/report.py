"""benches/README.md out of benches/results/*.jsonl: what was predicted, what was measured.

    python benches/report.py

Every target stands in it, reached or not; a measurement that is missing is called missing, and a
prediction is never in the column of measurements. Lines of a CPU rehearsal (--tiny) do not count.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from bioinstruct.benches.campaign import BENCHES
from bioinstruct.benches.kernel_bench import ASSUMED, Bench, predict
from bioinstruct.synth import console
from bioinstruct.synth.files import write_text

HERE = Path(__file__).parent
Row = Mapping[str, Any]
OURS = "augmented", "ours"
"""Forms of ours, the one that is meant for a GPU first."""


class Target(NamedTuple):
    """A ratio of times that is to be reached."""

    name: str
    script: str
    shape: dict[str, Any]
    """What its line must hold."""
    base: str
    """The variant that ours is divided by; or that is divided by ours, for a speed-up."""
    limit: float
    speed_up: bool = False


def _linear(name: str, R: int, p: float) -> dict[str, Any]:
    return {"linear": name, "T": 8192, "R": R, "p": p}


def _layer(R: int, p: float) -> dict[str, Any]:
    return {"layer": "llama-7b", "T": 8192, "R": R, "p": p}


TARGETS = [
    Target("o, 4096 x 4096", "lora_kernel", _linear("llama-7b o", 16, 0.0), "frozen", 1.12),
    Target("o, dropout", "lora_kernel", _linear("llama-7b o", 16, 0.05), "frozen", 1.16),
    Target("o, r = 64", "lora_kernel", _linear("llama-7b o", 64, 0.0), "frozen", 1.15),
    Target("gate and up", "lora_kernel", _linear("llama-7b gate_up", 16, 0.0), "frozen", 1.065),
    Target(
        "gate and up, dropout", "lora_kernel", _linear("llama-7b gate_up", 16, 0.05), "frozen", 1.10
    ),
    Target("down", "lora_kernel", _linear("llama-7b down", 16, 0.0), "frozen", 1.09),
    Target("down, dropout", "lora_kernel", _linear("llama-7b down", 16, 0.05), "frozen", 1.13),
    Target("q, k, v", "lora_kernel", _linear("llama-7b qkv", 16, 0.0), "frozen", 1.08),
    Target(
        "q, k, v of Llama-3-8B", "lora_kernel", _linear("llama-3-8b qkv", 16, 0.0), "frozen", 1.08
    ),
    Target("decoder layer", "layer", _layer(16, 0.0), "frozen", 1.08),
    Target("decoder layer to its products", "layer", _layer(16, 0.0), "gemms", 1.17),
    Target("decoder layer, r = 64", "layer", _layer(64, 0.0), "frozen", 1.11),
    Target(
        "o, dropout, over the eager formula",
        "lora_kernel",
        _linear("llama-7b o", 16, 0.05),
        "eager",
        1.22,
        True,
    ),
    Target(
        "o over the eager formula, float32 adapters",
        "lora_kernel",
        _linear("llama-7b o", 16, 0.0),
        "eager32",
        1.45,
        True,
    ),
    Target(
        "o, dropout, over the graph split",
        "lora_kernel",
        _linear("llama-7b o", 16, 0.05),
        "split",
        1.05,
        True,
    ),
    Target(
        "decoder layer, dropout, over the eager formula",
        "layer",
        _layer(16, 0.05),
        "eager",
        1.28,
        True,
    ),
    Target(
        "loss, 32,000 words, to its two products",
        "cross_entropy",
        {"T": 8192, "V": 32000},
        "frozen",
        1.08,
    ),
]
COPY_TARGET = 0.85
MEMORY_BOUND = "rmsnorm_kernel", "swiglu_kernel", "rope_kernel"
INTRO = """# Benches

Made by `python benches/report.py` from `benches/results/*.jsonl`; do not edit. `python
benches/run_all.py --help` tells how the lines are made. Ratios are of times in one process, the
variants in turn. Predictions were written before any GPU had run. They assume {assumed};
inner dimensions of products round up to 64. Ours are the launches that the code makes
(benches/traffic.py), each the longer of its bytes and its arithmetic; other formulas count every
pass over memory, nothing cached, and so are upper bounds.
"""


FORMS = """## Predicted for every form, to the frozen op

No measurement. `fused` is what a group's adapters add to the part of a layer that it stands in
(gate_up and down stand in one), over its frozen products.

"""


def read(folder: Path) -> list[Row]:
    """All lines of a folder's files but rehearsals and those of a CPU.

    Raises:
        ValueError: a line is no JSON object; the text names file and line.
    """
    rows = []
    for path in sorted(folder.glob("**/*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                measured = row.get("device", "cpu") != "cpu" and not row.get("tiny")
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{path}:{number} is no JSON object; remove the line") from error
            if measured:
                rows.append(row)
    return rows


def render(rows: Sequence[Row]) -> str:
    """The text of benches/README.md."""
    assumed = (
        f"{ASSUMED.flops_per_s / 1e12:.0f} TFLOP/s and\n{ASSUMED.bytes_per_s / 1e12:.1f} TB/s "
        f"({ASSUMED.gpu}), of which rank-wide passes that stand alone reach "
        f"{ASSUMED.narrow_share:.0%}, and {ASSUMED.launch_s * 1e6:.0f} us a launch"
    )
    parts = [INTRO.format(assumed=assumed)]
    devices = sorted({row["device"] for row in rows})
    if not devices:
        parts.append(
            "**No GPU has run these benches yet.** Nothing below is a measurement.\n\n"
            + _targets([], "no GPU")
        )
    for device in devices:
        own = [row for row in rows if row["device"] == device]
        parts.append(_device(device, own))
    return "\n".join([*parts, _all_predicted()])


def _device(device: str, rows: Sequence[Row]) -> str:
    versions = {
        f"torch {r['versions']['torch']}, triton {r['versions'].get('triton')}, "
        f"driver {(r.get('gpu') or {}).get('driver_version', 'unknown')}, commit {r['commit']}"
        for r in rows
    }
    lines = [f"## {device}", "", *(f"- {version}" for version in sorted(versions)), ""]
    lines += [_targets(rows, device), _memory_bound(rows), _rivals(rows), _training(rows)]
    lines += [_checks(rows)]
    return "\n".join(lines)


# ---- tables ------------------------------------------------------------------------------------


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _targets(rows: Sequence[Row], device: str) -> str:
    body = []
    for target in TARGETS:
        bench = BENCHES[target.script]
        predicted, measured = _predicted(target, bench), _measured(target, bench, rows)
        sign = ">=" if target.speed_up else "<="
        body.append(
            [
                target.name,
                f"{sign} {target.limit:g}",
                _number(predicted),
                _number(measured),
                _verdict(target, measured),
            ]
        )
    return _table(["target", "wanted", "predicted", f"measured, {device}", "verdict"], body)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _verdict(target: Target, measured: float | None) -> str:
    if measured is None:
        return "not measured"
    reached = measured >= target.limit if target.speed_up else measured <= target.limit
    return "reached" if reached else f"missed by {abs(measured - target.limit):.3f}"


def _holds(row: Mapping[str, Any], shape: Mapping[str, Any]) -> bool:
    return all(row.get(key) == value for key, value in shape.items())


def _ratio(seconds: Mapping[str, float], target: Target) -> float | None:
    ours = next((seconds[name] for name in OURS if name in seconds), None)
    if ours is None or target.base not in seconds:
        return None
    base = seconds[target.base]
    return base / ours if target.speed_up else ours / base


def _predicted(target: Target, bench: Bench) -> float | None:
    (shape, *_) = (shape for shape in bench.shapes if _holds(shape, target.shape))
    found = predict(bench, shape, 2)["predictions"]
    seconds = {name: values["predicted_seconds"] for name, values in found.items()}
    ours = found.get("augmented", found["ours"])
    seconds.setdefault("frozen", ours["predicted_seconds"] / ours["predicted_ratio_to_frozen"])
    return _ratio(seconds, target)


def _measured(target: Target, bench: Bench, rows: Sequence[Row]) -> float | None:
    """Of the newest line."""
    found = None
    for row in rows:
        if row.get("bench") == bench.name and "seconds" in row and _holds(row, target.shape):
            found = _ratio({name: s["median"] for name, s in row["seconds"].items()}, target)
    return found


def _all_predicted() -> str:
    """Ratios to the frozen op at 8,192 tokens, of every form that has one."""
    forms = "augmented", "fused", "ours", "split", "manual", "eager", "eager32"
    body = []
    for script, model in itertools.product(("layer", "lora_kernel"), ("llama-7b", "llama-3-8b")):
        bench = BENCHES[script]
        for shape in bench.shapes:
            name = str(shape.get("linear", f"{shape.get('layer')} layer"))
            if shape["T"] != 8192 or not name.startswith(model + " "):
                continue
            found = predict(bench, shape, 2)["predictions"]
            ratios = [found.get(form, {}).get("predicted_ratio_to_frozen") for form in forms]
            body.append([name, str(shape["R"]), str(shape["p"]), *map(_number, ratios)])
    names = ["lora_linear" if form == "ours" else form for form in forms]
    return FORMS + _table(["op", "r", "p", *names], body)


def _memory_bound(rows: Sequence[Row]) -> str:
    names = {BENCHES[script].name for script in MEMORY_BOUND}
    body = [
        [
            row["bench"],
            ", ".join(f"{k} {v}" for k, v in row.items() if k in ("T", "D", "F", "H", "G")),
            f"{row['fraction_of_copy']:.2f}",
            "reached" if row["fraction_of_copy"] >= COPY_TARGET else "missed",
        ]
        for row in rows
        if row.get("bench") in names and "fraction_of_copy" in row
    ]
    header = ["memory-bound op", "shape", "of the copy bandwidth", f">= {COPY_TARGET}"]
    return _table(header, body) if body else ""


def _rivals(rows: Sequence[Row]) -> str:
    """Every variant over the frozen one, per linear and layer."""
    body = []
    for row in rows:
        if row.get("bench") not in ("lora_linear", "layer") or "seconds" not in row:
            continue
        seconds = {name: s["median"] for name, s in row["seconds"].items() if name != "copy"}
        shape = f"{row.get('linear') or row.get('layer')}, {row['T']} tokens, r {row['R']}"
        shape += f", p {row['p']}" if row["p"] else ""
        others = [f"{n} {s / seconds['frozen']:.3f}" for n, s in seconds.items() if n != "frozen"]
        body.append([shape, ", ".join(others)])
    return _table(["to the frozen op", "variants"], body) if body else ""


def _training(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        if row.get("bench") != "train_run" or not row["whole"]:
            continue
        peak, expected = row["peak_bytes"] / 1e9, row["expected_bytes"] / 1e9
        body.append(
            [
                row["model"] + (", sharded" if row.get("shard") == "full" else ""),
                f"{row['tokens_per_s']:,.0f}",
                _number(row["share_of_gemm_floor"]),
                _number(row["mfu"]),
                f"{peak:.1f} GB ({expected:.1f} expected)",
                f"{row['loss_first_quarter']:.3f} to {row['loss_last_quarter']:.3f}",
            ]
        )
    header = ["training", "tokens/s", "of the products' floor", "MFU", "peak memory", "loss"]
    return _table(header, body) if body else ""


def _checks(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        if row.get("bench") == "check":
            what = row.get("op") or row.get("file") or row.get("tool")
            counts = f", {row['tests'] - row['skipped']} tests" if "tests" in row else ""
            verdict = row.get("skipped_because") or ("right" if row["right"] else "WRONG")
            body.append([f"{row['part']}: {what}", str(verdict) + counts])
    return _table(["check", "verdict"], body) if body else ""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    default=HERE / "results",
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=HERE / "README.md")
def command(results: Path, out: Path) -> None:
    """Write benches/README.md from the lines in benches/results."""
    write_text(out, render(read(results)))


if __name__ == "__main__":
    console.run(command)
