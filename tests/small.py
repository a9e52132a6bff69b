"""Options that make the published recipes small enough to run a step in a test."""

from pathlib import Path

from densepred.engine.config import load_linked_config

CONFIGS = Path(__file__).parents[1] / "configs"
SHAPES_CONFIG = str(CONFIGS / "kmax_r18_shapes.py")

LOADERS = {
    "train_dataloader.batch_size": 2,
    "train_dataloader.num_workers": 0,
    "train_dataloader.persistent_workers": False,
    "val_dataloader.num_workers": 0,
    "val_dataloader.persistent_workers": False,
}
SMALL = LOADERS | {
    "image_size": (65, 97),
    "model.head.num_queries": 12,
    "model.head.criterion.insdis_sample_k": 64,
}
"""Of kMaX-DeepLab's recipes."""
SMALL_MASK2FORMER = LOADERS | {
    "image_size": (64, 96),
    "model.head.num_queries": 12,
    "model.head.criterion.num_points": 128,
}
SMALL_SEMANTIC = LOADERS | {"image_size": (64, 96)}
"""Of the recipes with a SemanticHead, and of those with a PolygonHead."""
SMALL_CROPS = {
    "base_size": (128, 64),
    "train_short_edges": [64, 72],
    "train_max_size": 160,
    "test_short_edge": 64,
    "test_max_size": 128,
}
"""Of recipes whose base has these sizes too."""
SMALL_OF_HEAD = {
    "KMaXHead": SMALL,
    "Mask2FormerHead": SMALL_MASK2FORMER,
    "PolygonHead": SMALL_SEMANTIC,
    "SemanticHead": SMALL_SEMANTIC,
}
NARROW = {"model.decoder.base_channels": (16, 16, 8, 8), "model.head.embed_dim": 32}


def small_shapes(root: Path, **options) -> dict:
    """Return the options of a few steps of the Shapes recipe; keys may be written with ``__`` for a dot."""
    named = {key.replace("__", "."): value for key, value in options.items()}
    steps = {"train_cfg.max_iters": 4, "train_cfg.val_interval": 4, "default_hooks.checkpoint.interval": 2}
    return {"data_root": str(root), "default_hooks.logger.interval": 1, **SMALL, **NARROW, **steps, **named}


def small_recipe(config: Path, **options) -> dict:
    """Return the options under which a published recipe runs a step of any data set."""
    cfg = load_linked_config(config)
    small, keys = SMALL_OF_HEAD[cfg.model.head.type], cfg.keys()
    if cfg.image_size[0] == cfg.image_size[1] and small is SMALL_SEMANTIC:  # crops that may be turned stay square
        small = small | {"image_size": (64, 64)}
    return small | {key: value for key, value in SMALL_CROPS.items() if key in keys} | options


def as_words(options: dict) -> list[str]:
    """Return options as the words after ``--cfg-options``."""
    return [f"{key}={str(value).replace(' ', '')}" for key, value in options.items()]
