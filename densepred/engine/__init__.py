"""Runner glue: configs, hooks, checkpoints, published weights."""

from densepred.engine import cures, hooks, optimizer, pictures, progress

__all__ = ["cures", "hooks", "optimizer", "pictures", "progress"]
