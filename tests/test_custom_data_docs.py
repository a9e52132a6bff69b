"""docs/custom_data.md does what it says: its config and its commands, run on a few generated images laid out as it asks."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

import densepred_cli
from densepred.data import ImageFolderSegmentation
from densepred.data.prepare import write_image
from densepred.data.shapes import make_scene

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "custom_data.md").read_text()
CLASS_OF = {"ground": 0, "water": 0, "grass": 1}
SMALLER = {
    "(384, 512)": "(64, 80)",
    "max_iters=2000, val_interval=500": "max_iters=2, val_interval=2",
    "batch_size=8": "batch_size=2, num_workers=0, persistent_workers=False",
    "channels=128": "channels=16",
    "iter_2000": "iter_2",
}


def smaller(text):
    for shown, used in SMALLER.items():
        text = text.replace(shown, used)
    return text


def write_leaves(root):
    """Five images with masks, laid out as the page draws it."""
    for number, name in enumerate("abcde"):
        scene = make_scene(np.random.default_rng(number), 64, 80)
        table = np.full(max(scene.segments) + 1, 255, np.uint8)
        for segment, (kind, _) in scene.segments.items():
            table[segment] = CLASS_OF.get(kind, 2)
        place = f"field2/{name}" if name == "c" else name
        write_image(str(root / "images" / f"{place}.jpg"), scene.image[..., ::-1])
        write_image(str(root / "masks" / f"{place}.png"), table[scene.ids])
    (root / "train.txt").write_text("a\nb\nfield2/c\n")
    (root / "val.txt").write_text("d\ne\n")


def run(line, monkeypatch):
    """Run a shown command in this process."""
    words = shlex.split(smaller(line))
    if words[0] == "densepred":
        monkeypatch.setattr(sys, "argv", words)
        densepred_cli.main()
    elif words[1].startswith("tools/"):
        monkeypatch.setattr(sys, "argv", words[1:])
        densepred_cli.main(Path(words[1]).stem)
    else:
        script = runpy.run_path(str(ROOT / words[1]))
        script["main"](script["make_parser"]().parse_args(words[2:]))


def test_the_page_from_layout_to_prediction(tmp_path, monkeypatch, capsys):
    write_leaves(tmp_path / "leaves")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    config = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    (tmp_path / "leaves.py").write_text(
        smaller(config) + "val_dataloader = dict(num_workers=0, persistent_workers=False)\n"
    )
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^(?:python|densepred) .*", PAGE, re.MULTILINE)
    assert [shlex.split(line)[1] for line in commands] == [
        "datasets/check_masks.py",
        "tools/train.py",
        "tools/test.py",
        "predict",
    ]
    run(commands[0], monkeypatch)
    report = capsys.readouterr().out
    assert re.search(r"train: 3 images\n  soil +\d+\.\d\d %  in \d images", report) and "val: 2 images" in report

    run(commands[1], monkeypatch)
    validated = json.loads(Path("work_dirs/leaves/metrics.json").read_text())
    assert validated["per_class"].keys() == {"soil", "leaf", "stone"}

    run(commands[2], monkeypatch)
    tested = json.loads(Path("work_dirs/leaves/metrics.json").read_text())
    assert tested["metrics"]["mIoU"] == pytest.approx(validated["metrics"]["mIoU"])
    assert {path.name for path in Path("pictures").iterdir()} == {"d.png", "e.png"}

    run(commands[3], monkeypatch)
    segments = json.loads(Path("a.json").read_text())["segments"]
    assert {segment["category"] for segment in segments} <= {"soil", "leaf", "stone"} and Path("a.png").stat().st_size


def test_options_of_the_table(tmp_path):
    rows = re.findall(r"^\| [^|]+\| `(\w+=.*)` \|$", PAGE, re.MULTILINE)
    assert len(rows) == 4
    for row in rows:
        options = eval(f"dict({row})")
        ImageFolderSegmentation(str(tmp_path), "images", "masks", ["soil", "leaf", "stone"], lazy_init=True, **options)


def check_masks(tmp_path):
    """Return the script's functions and a data set of the page's layout, read by numbers."""
    write_leaves(tmp_path)
    dataset = ImageFolderSegmentation(
        str(tmp_path), "images", "masks", ["soil", "leaf", "stone", "gold"], ignore=[255], test_mode=True
    )
    return runpy.run_path(str(ROOT / "datasets" / "check_masks.py")), dataset


def test_check_masks_marks_classes_that_never_occur(tmp_path, capsys):
    script, dataset = check_masks(tmp_path)
    script["check"](dataset, "train", workers=1)
    report = capsys.readouterr().out
    assert re.search(r"gold +0\.00 %  in 0 images   <- never", report) and report.count("<- never") == 1


def test_check_masks_lists_every_bad_file(tmp_path):
    script, dataset = check_masks(tmp_path)
    write_image(str(tmp_path / "masks" / "a.png"), np.full((64, 80), 9, np.uint8))
    write_image(str(tmp_path / "masks" / "d.png"), np.zeros((64, 81), np.uint8))
    (tmp_path / "images" / "e.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="train: 3 of 5 images cannot be used") as caught:
        script["check"](dataset, "train", workers=1)
    lines = str(caught.value).splitlines()[1:]
    assert "a.png holds the labels 9 (5120 pixels)" in lines[0] and "d.png is 64 x 81" in lines[1]
    assert "e.jpg is empty" in lines[2] and len(lines) == 3


def test_check_masks_is_for_semantic_sets(make_shapes):
    from densepred.data import CityscapesPanoptic

    script = runpy.run_path(str(ROOT / "datasets" / "check_masks.py"))
    with pytest.raises(ValueError, match="CityscapesPanoptic has no masks of classes"):
        script["check"](CityscapesPanoptic(str(make_shapes("cityscapes")), "train"), "train", workers=1)
