"""Runner glue: configs, hooks, checkpoints, published weights."""

from densepred.engine import cures, hooks

__all__ = ["cures", "hooks"]
