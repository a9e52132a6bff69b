"""Names of torchvision's MobileNetV2 and ours, both ways.

torchvision counts the blocks through (``features.1`` to ``features.17``) and holds the last convolution of a block and its
norm side by side (``conv.2``, ``conv.3``); ours are ``layer1.0`` to ``layer7.0``, each convolution with its norm.
"""

import re

BLOCKS = [f"layer{stage}.{i}" for stage, count in enumerate((1, 2, 3, 4, 3, 3, 1), start=1) for i in range(count)]
"""Our name of block ``features.{i + 1}``."""

_PARTS = ("conv", "bn")


def torchvision_to_ours(key: str) -> str:
    """Return our name of ``features.K...``; another key comes back as it is."""
    if match := re.match(r"features\.0\.([01])\.(.*)", key):
        return f"conv1.{_PARTS[int(match[1])]}.{match[2]}"
    match = re.match(r"features\.(\d+)\.conv\.(\d)\.(?:([01])\.)?(\w+)$", key)
    if not match or int(match[1]) > len(BLOCKS):
        return key
    block, place, part = BLOCKS[int(match[1]) - 1], int(match[2]), match[3]
    last = _last(block)
    if part is None:
        place, part = last, place - last
    return f"{block}.conv.{place}.{_PARTS[int(part)]}.{match[4]}"


def ours_to_torchvision(key: str) -> str:
    """Return torchvision's name, the inverse of `torchvision_to_ours`."""
    if match := re.match(r"conv1\.(conv|bn)\.(.*)", key):
        return f"features.0.{_PARTS.index(match[1])}.{match[2]}"
    match = re.fullmatch(r"(layer\d\.\d)\.conv\.(\d)\.(conv|bn)\.(\w+)", key)
    if not match:
        return key
    block, place, part = match[1], int(match[2]), _PARTS.index(match[3])
    where = f"{place + part}" if place == _last(block) else f"{place}.{part}"
    return f"features.{BLOCKS.index(block) + 1}.conv.{where}.{match[4]}"


def _last(block: str) -> int:
    return 1 if block == BLOCKS[0] else 2  # the first block has no expansion
