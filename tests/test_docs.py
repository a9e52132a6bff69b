"""What the documents show is what the commands take: flags parse, options load, files and links exist."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch

import densepred
import densepred_cli
from densepred import ops
from densepred.engine.config import load_config, parse_options
from densepred.engine.conversion import to_official

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "datasets" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
TOOLS = {
    "convert_checkpoint": "convert",
    "video_demo": "video",
    "eco_derive": "eco-derive",
    "eco_tradeoff": "eco-tradeoff",
}


def command_lines() -> list[str]:
    """Return every shown line that starts one of our commands."""
    shown = re.compile(r"^\s*((?:python tools/[\w/]+\.py|densepred) [^\n|]*)", re.MULTILINE)
    return [line.split("   #")[0].strip() for page in PAGES for line in shown.findall(page.read_text())]


def option_rows() -> list[str]:
    """Return the options of the table in docs/configs.md."""
    rows = re.findall(r"^\|[^|]+\| `([^`]+=[^`]+)`", (ROOT / "docs" / "configs.md").read_text(), re.MULTILINE)
    return [row for row in rows if not row.startswith("custom_imports")]


@pytest.mark.parametrize("line", command_lines())
def test_shown_command_parses(line):
    words = shlex.split(line)
    if words[0] == "python":
        tool = Path(words[1]).stem
        densepred_cli.make_parser(TOOLS.get(tool, tool)).parse_args(words[2:])
        assert (ROOT / words[1]).is_file()
    else:
        densepred_cli.make_parser().parse_args(words[1:])
    for word in words:
        assert not word.startswith("configs/") or (ROOT / word).is_file(), word


@pytest.mark.parametrize("row", option_rows())
def test_shown_options_load(row):
    words = [word for word in shlex.split(row) if word != "--cfg-options"]
    load_config(ROOT / "configs" / "kmax_r50_coco.py", parse_options(words))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_linked_files_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), f"{page}: {target}"


def test_every_recipe_stands_in_the_table():
    page = (ROOT / "docs" / "models.md").read_text()
    assert not [path.name for path in (ROOT / "configs").glob("*.py") if f"{path.name}`" not in page]


def test_python_of_the_readme_runs(monkeypatch):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(ROOT)
    trained = densepred.build_model("configs/kmax_r50_coco.py").eval()
    names = {
        "official_state_dict": to_official(trained.state_dict(), "kmax-deeplab"),
        "images": torch.zeros(2, 3, 65, 65),
    }
    with torch.no_grad():
        exec(code, names)
    assert names["outputs"].keys() >= {"pred_logits", "pred_masks", "pixel_feature", "aux_outputs"}
    assert names["outputs"]["pred_masks"].shape == (2, 128, 17, 17)


def test_the_example_op_works(tmp_path, monkeypatch):
    op, kernels, proof = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "ops.md").read_text(), re.DOTALL)
    (tmp_path / "densepred_example.py").write_text(op)  # files: a kernel's source is read from its own
    (tmp_path / "densepred_example_kernels.py").write_text(kernels)
    (tmp_path / "proof.py").write_text(proof)
    monkeypatch.syspath_prepend(tmp_path)
    runpy.run_path(str(tmp_path / "proof.py"))
    assert "densepred_example_kernels" in sys.modules


def test_every_op_stands_in_the_table():
    page = (ROOT / "docs" / "ops.md").read_text()
    assert not [name for name in ops.__all__ if name.islower() and f"`{name}`" not in page]
