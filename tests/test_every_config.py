"""Every recipe builds and runs: one training step and one evaluation on generated data in its own layout."""

import json
from pathlib import Path

import pytest

from densepred.engine import runner
from densepred.engine.config import load_linked_config
from tests.small import CONFIGS, small_recipe

LAYOUTS = {"shapes": "coco"} | {
    name: name for name in ("ade20k", "camvid", "cityscapes", "coco", "dsb2018", "idd", "isbi2012", "kitti")
}
NO_CHECKPOINTS = {  # of ConvNeXt-L they would take gigabytes
    "default_hooks.checkpoint.interval": -1,
    "default_hooks.checkpoint.save_last": False,
    "default_hooks.checkpoint.save_best": None,
}
OPTIONS = NO_CHECKPOINTS | {"train_cfg.max_iters": 1, "train_cfg.val_interval": 1}
METRIC_OF_TASK = {"panoptic": "PQ", "semantic": "mIoU", "instance": "AP"}


# A gate needs what was derived with its parent: see test_eco_recipe.py.
RECIPES = [path for path in sorted(CONFIGS.glob("*.py")) if not path.stem.endswith("_gate")]


@pytest.mark.parametrize("config", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_a_step(config: Path, make_shapes, tmp_path):
    layout = next(LAYOUTS[word] for word in config.stem.split("_") if word in LAYOUTS)
    options = small_recipe(config) | OPTIONS | {"data_root": str(make_shapes(layout))}
    linked = load_linked_config(config)
    if "indices" in linked:  # the images of a larger set
        options["indices"] = 2
    if "warmup_iters" in linked:
        options |= {"warmup_iters": 1, "train_cfg.max_iters": 2}
    runner.train(str(config), options, str(tmp_path), None, "none", False)
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    for task in linked.tasks:
        assert 0 <= metrics[METRIC_OF_TASK[task]] <= 100
