"""Where a frame's time goes: every stage has a row, and a model of polygons draws its masks apart."""

import pytest

from densepred.engine import benchmark_frame
from densepred.engine.benchmark_frame import benchmark_frame as measured
from tests.small import CONFIGS


@pytest.fixture(autouse=True)
def generated_classes(monkeypatch, shapes):
    """Let the recipes find their class tables."""
    load = benchmark_frame.load_model
    monkeypatch.setattr(
        benchmark_frame, "load_model", lambda *args: load(*args, cfg_options=dict(data_root=str(shapes)))
    )


def stages(table: str) -> list[str]:
    return [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][1:]


@pytest.mark.parametrize(
    ("config", "last"),
    [("centerpoly_r18_shapes", ["predict", "rasterise", "draw"]), ("ccnet_r18_shapes", ["predict", "draw"])],
)
def test_every_stage_has_a_row(config, last):
    table = measured(CONFIGS / f"{config}.py", frame=(64, 80), repeats=1)
    assert stages(table) == ["pipeline", "encoder", "decoder", "head", *last, "sum"]
    *parts, total = (
        float(line.split("|")[2]) for line in table.splitlines() if line.startswith("|") and "median" not in line
    )
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(total, abs=0.05)


def test_an_empty_frame_is_refused():
    with pytest.raises(ValueError, match="0x80 pixels"):
        measured(CONFIGS / "centerpoly_r18_shapes.py", frame=(0, 80))
