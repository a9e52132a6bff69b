"""Errors of the data side."""


class DamagedImageError(ValueError):
    """An image or label file exists but cannot be used: empty, truncated, not an image, or at odds with its annotation.

    The message names the file and the remedy. A training run may be told to skip such files instead of stopping.
    """
