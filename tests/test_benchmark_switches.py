"""What switches bring a model: every variant has its parts, sums and ratio, for inference and for training."""

import pytest

from densepred.engine.benchmark_switches import benchmark_switches
from tests.small import CONFIGS, small_recipe


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("name", ["kmax_r18_shapes", "centerpoly_r18_shapes"])
def test_every_variant_has_a_row(name, shapes):
    options = small_recipe(CONFIGS / f"{name}.py", data_root=str(shapes))
    text = benchmark_switches(CONFIGS / f"{name}.py", ["channels_last", "bf16"], options, repeats=1)
    tables = [[cells(line) for line in table.splitlines() if line.startswith("|")] for table in text.split("\n\n")]
    assert len(tables) == 2
    for (head, *rows), parts in zip(tables, (4, 5), strict=True):
        assert [row[0] for row in rows] == ["plain", "channels_last", "bf16", "channels_last + bf16"]
        assert rows[0][head.index("ratio")] == "1.00x"
        for row in rows:
            times = [float(cell) for cell in row[1 : 1 + parts]]
            assert sum(times) == pytest.approx(float(row[head.index("sum ms")]), abs=0.5)
            assert float(row[head.index("peak MiB")]) > 0
    assert ("matching ms" in tables[1][0]) == name.startswith("kmax")


def test_data_are_generated_where_there_are_none():
    text = benchmark_switches(
        CONFIGS / "ccnet_r18_shapes.py", ["bf16"], dict(data_root="nowhere", image_size=(64, 80)), repeats=1
    )
    assert "2 x 64x80" in text


def test_an_unknown_switch_is_refused():
    with pytest.raises(ValueError, match="--switches fp8: choose from channels_last, bf16, compile"):
        benchmark_switches("any.py", ["fp8"])
