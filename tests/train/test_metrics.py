"""What a run writes: rows, curve, FLOPs."""

import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from bioinstruct.model import Llm
from bioinstruct.model.formats.config_json import config_from_hf
from bioinstruct.train.report.metrics import (
    MetricsLog,
    loss_svg,
    mfu,
    peak_memory_bytes,
    step_flops,
)


def test_rows_are_valid_json_also_when_a_loss_is_not(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1, "loss": math.nan, "lr": 0.5})
    log.write({"step": 2, "loss": 1.0})
    log.write({"step": 2, "val_loss_by_source": {"a": math.inf, "b": 2.0}})
    log.write({"step": 3, "event": "spike", "records": [{"record": "f:1", "loss": math.nan}]})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [
        {"step": 1, "loss": None, "lr": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 2, "val_loss_by_source": {"a": None, "b": 2.0}},
        {"step": 3, "event": "spike", "records": [{"record": "f:1", "loss": None}]},
    ]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1, "loss": 2.0}],
        [{"step": i, "loss": 3 / i} for i in range(1, 50)] + [{"step": 49, "val_loss": 0.1}],
        [{"step": 1, "loss": None}, {"step": 2, "loss": 0.0}],
    ],
)
def test_the_curve_is_valid_svg_within_its_frame(rows: list[dict[str, float]]) -> None:
    root = ElementTree.fromstring(loss_svg(rows))
    line = root.find("{http://www.w3.org/2000/svg}polyline")
    assert line is not None
    points = [tuple(map(float, p.split(","))) for p in line.get("points", "").split()]
    assert len(points) == sum(row.get("loss") is not None for row in rows)
    assert all(56 <= x <= 616 and 24 <= y <= 300 for x, y in points)
    assert all(math.isfinite(v) for point in points for v in point)


def test_flops_of_llama_2_7b_match_the_convention() -> None:
    """4N a token: 6.476e9 linear weights and a head of 131e6, at 4,096 tokens with attention."""

    config = config_from_hf(
        {
            "model_type": "llama",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        "test",
    )
    per_token = step_flops(config, 0, [4096], 4096) / 4096
    assert per_token == pytest.approx(30.2e9, rel=0.01)


def test_flops_count_supervised_rows_only(stories: Llm) -> None:
    config = stories.config
    head = 4 * config.vocab_size * config.hidden_size
    assert step_flops(config, 0, [10], 7) - step_flops(config, 0, [10], 3) == 4 * head


def test_a_cpu_has_memory_but_no_mfu() -> None:
    cpu = torch.device("cpu")
    assert mfu(1e12, 1.0, cpu) is None
    assert peak_memory_bytes(cpu) > 50 << 20
