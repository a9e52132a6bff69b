"""Parameter names of Mask2Former and Swin: ours, those of the published code and those of Hugging Face's ``transformers``.

Tables of (theirs, ours) beginnings of a name; ``{}`` stands for a number, the same ones on both sides. The first pair that
matches applies, so a longer beginning stands above a shorter one. One table serves both directions.
"""

import re
from collections.abc import Callable, Iterable

PARTS = ("[q]", "[k]", "[v]")
"""What follows our name of a fused query-key-value weight where the other format holds its three parts by themselves."""

OFFICIAL = (
    ("backbone.", "encoder."),
    # The predictor: three lists of layers there, one here.
    (
        "sem_seg_head.predictor.transformer_cross_attention_layers.{}.multihead_attn.",
        "head.layers.{}.cross_attention.attn.",
    ),
    ("sem_seg_head.predictor.transformer_cross_attention_layers.{}.norm.", "head.layers.{}.cross_attention.norm."),
    ("sem_seg_head.predictor.transformer_self_attention_layers.{}.self_attn.", "head.layers.{}.self_attention.attn."),
    ("sem_seg_head.predictor.transformer_self_attention_layers.{}.norm.", "head.layers.{}.self_attention.norm."),
    ("sem_seg_head.predictor.transformer_ffn_layers.{}.", "head.layers.{}.ffn."),
    ("sem_seg_head.predictor.query_feat.weight", "head.query_feat"),
    ("sem_seg_head.predictor.query_embed.weight", "head.query_embed"),
    ("sem_seg_head.predictor.level_embed.weight", "head.level_embed"),
    ("sem_seg_head.predictor.", "head."),
    # The pixel decoder, and the gate of ECO-M2F's.
    ("sem_seg_head.pixel_decoder.transformer.encoder.gt.head.", "decoder.gate."),
    ("sem_seg_head.pixel_decoder.transformer.encoder.layers.", "decoder.layers."),
    ("sem_seg_head.pixel_decoder.transformer.level_embed", "decoder.level_embed"),
    ("sem_seg_head.pixel_decoder.adapter_1.", "decoder.lateral."),
    ("sem_seg_head.pixel_decoder.layer_1.", "decoder.output."),
    ("sem_seg_head.pixel_decoder.", "decoder."),
)

OFFICIAL_OLD = (
    ("sem_seg_head.predictor.static_query.", "sem_seg_head.predictor.query_feat."),
    ("sem_seg_head.predictor.", "sem_seg_head.predictor."),
    ("sem_seg_head.pixel_decoder.", "sem_seg_head.pixel_decoder."),
    ("sem_seg_head.", "sem_seg_head.pixel_decoder."),
)
"""Names in the authors' early checkpoints and what became of them; the identities keep the last pair off new names."""

_HF_ENCODER = "model.pixel_level_module.encoder."
_HF_BLOCK = (_HF_ENCODER + "encoder.layers.{}.blocks.{}.", "encoder.layers.{}.blocks.{}.")
_HF_SWIN = (
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.norm.", "patch_embed.norm."),
    *((f"hidden_states_norms.stage{i + 1}.", f"norm{i}.") for i in range(4)),
    ("encoder.layers.{}.downsample.", "layers.{}.downsample."),
)
_HF_SWIN_BLOCK = (
    *(
        (f"attention.self.{name}.{kind}", f"attn.qkv.{kind}{part}")
        for name, part in zip(("query", "key", "value"), PARTS, strict=True)
        for kind in ("weight", "bias")
    ),
    ("attention.self.relative_position_bias_table", "attn.relative_position_bias_table"),
    ("attention.output.dense.", "attn.proj."),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
)
_HF_RESNET = (
    ("embedder.embedder.normalization.", "stem.conv1.norm."),
    ("embedder.embedder.convolution.", "stem.conv1."),
    *(
        (f"encoder.stages.{stage}.layers.{{}}.{theirs}.{kind}.", f"res{stage + 2}.{{}}.{ours}.{norm}")
        for stage in range(4)
        for theirs, ours in (("shortcut", "shortcut"), *((f"layer.{i}", f"conv{i + 1}") for i in range(3)))
        for kind, norm in (("normalization", "norm."), ("convolution", ""))
    ),
)
_HF_DECODER = (
    ("encoder.layers.{}.self_attn_layer_norm.", "layers.{}.norm1."),
    ("encoder.layers.{}.final_layer_norm.", "layers.{}.norm2."),
    ("encoder.layers.{}.fc1.", "layers.{}.linear1."),
    ("encoder.layers.{}.fc2.", "layers.{}.linear2."),
    ("encoder.layers.{}.self_attn.", "layers.{}.self_attn."),
    ("input_projections.", "input_proj."),
    ("mask_projection.", "mask_features."),
    ("adapter_1.1.", "lateral.norm."),
    ("adapter_1.0.", "lateral."),
    ("layer_1.1.", "output.norm."),
    ("layer_1.0.", "output."),
    ("level_embed", "level_embed"),
)
_HF_HEAD = (
    *(
        (
            f"decoder.layers.{{}}.self_attn.{part[1]}_proj.{kind}",
            f"layers.{{}}.self_attention.attn.in_proj_{kind}{part}",
        )
        for part in PARTS
        for kind in ("weight", "bias")
    ),
    ("decoder.layers.{}.self_attn.", "layers.{}.self_attention.attn."),
    ("decoder.layers.{}.self_attn_layer_norm.", "layers.{}.self_attention.norm."),
    ("decoder.layers.{}.cross_attn.", "layers.{}.cross_attention.attn."),
    ("decoder.layers.{}.cross_attn_layer_norm.", "layers.{}.cross_attention.norm."),
    ("decoder.layers.{}.fc1.", "layers.{}.ffn.linear1."),
    ("decoder.layers.{}.fc2.", "layers.{}.ffn.linear2."),
    ("decoder.layers.{}.final_layer_norm.", "layers.{}.ffn.norm."),
    ("decoder.layernorm.", "decoder_norm."),
    ("decoder.mask_predictor.mask_embedder.{}.0.", "mask_embed.layers.{}."),
    ("queries_features.weight", "query_feat"),
    ("queries_embedder.weight", "query_embed"),
    ("level_embed.weight", "level_embed"),
    ("input_projections.", "input_proj."),
)


def _under(theirs: str, ours: str, pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((theirs + a, ours + b) for a, b in pairs)


TRANSFORMERS = (
    *_under(_HF_ENCODER, "encoder.", _HF_SWIN),
    *_under(*_HF_BLOCK, _HF_SWIN_BLOCK),
    *_under(_HF_ENCODER, "encoder.", _HF_RESNET),
    *_under("model.pixel_level_module.decoder.", "decoder.", _HF_DECODER),
    *_under("model.transformer_module.", "head.", _HF_HEAD),
    ("class_predictor.", "head.class_embed."),
)
"""Hugging Face's Mask2Former as its files name it, over a Swin or a ResNet."""

_TRANSFORMERS_5 = (
    (".encoder.swin.", ".encoder."),
    ("attention.q_proj.", "attention.self.query."),
    ("attention.k_proj.", "attention.self.key."),
    ("attention.v_proj.", "attention.self.value."),
    ("attention.o_proj.", "attention.output.dense."),
    ("attention.relative_position_bias.relative_", "attention.self.relative_"),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)
"""Swin's names in a ``state_dict()`` of transformers 5, which still writes files under the names of version 4."""


def renamer(pairs: Iterable[tuple[str, str]], backwards: bool = False) -> Callable[[str], str]:
    """Return a function that applies the first pair whose left side (``backwards``: right side) starts a key."""
    compiled = [
        (re.compile(re.escape(old).replace(r"\{\}", r"(\d+)")), new)
        for old, new in (pair[::-1] if backwards else pair for pair in pairs)
    ]

    def rename(key: str) -> str:
        for pattern, template in compiled:
            match = pattern.match(key)
            if match:
                return template.format(*match.groups()) + key[match.end() :]
        return key

    return rename


_official_to_ours, ours_to_official = renamer(OFFICIAL), renamer(OFFICIAL, backwards=True)
_old_to_official = renamer(OFFICIAL_OLD)
_transformers_to_ours, ours_to_transformers = renamer(TRANSFORMERS), renamer(TRANSFORMERS, backwards=True)


def official_to_ours(key: str) -> str:
    """Return our name of an official one, early or late."""
    return _official_to_ours(_old_to_official(key))


def transformers_to_ours(key: str) -> str:
    """Return our name of one of Hugging Face's; a part of a fused weight keeps its mark, see `PARTS`."""
    for new, old in _TRANSFORMERS_5:
        key = key.replace(new, old)
    return _transformers_to_ours(key)


def transformers_swin_to_ours(key: str) -> str:
    """Return our name, relative to the encoder, of one in Hugging Face's Swin for classification."""
    return transformers_to_ours(_HF_ENCODER + key.removeprefix("swin.")).removeprefix("encoder.")


def ours_to_transformers_swin(key: str) -> str:
    """Return the name in Hugging Face's Swin for classification; the inverse of `transformers_swin_to_ours`."""
    return ours_to_transformers(f"encoder.{key}").replace(_HF_ENCODER, "swin.", 1)
