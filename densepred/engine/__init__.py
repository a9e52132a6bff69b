"""Runner glue: configs, hooks, checkpoints, published weights."""

from densepred.engine import cures, hooks, optimizer

__all__ = ["cures", "hooks", "optimizer"]
