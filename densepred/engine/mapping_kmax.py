"""Parameter names of kMaX-DeepLab's decoder and head: ours and those of bytedance/kmax-deeplab.

Two ordered tables of (official, ours) pieces of a name. Read from the top they lead from official names to ours, read
from the bottom they lead back. Encoder names are the same in both and are left alone.
"""

DECODER_NAMES = (
    ("decoder._in_norms.", "decoder.in_norms."),
    ("decoder._resized_fuses.", "decoder.fusions."),
    ("decoder._stages.", "decoder.stages."),
    ("._blocks.", ".blocks."),
    ("._conv_bn_low.", ".low."),
    ("._conv_bn_high.", ".high."),
    ("._conv1_bn_act.", ".conv_in."),
    ("._conv2_bn_act.", ".conv_mid."),
    ("._conv3_bn.", ".conv_out."),
    ("._shortcut.", ".shortcut."),
    ("._attention.", ".attention."),
    ("._height_axis.", ".height_axis."),
    ("._width_axis.", ".width_axis."),
    (".qkv_transform.conv.", ".qkv."),
    ("._batch_norm_qkv.", ".qkv_norm."),
    ("._query_rpe._embeddings.weight", ".query_positions"),
    ("._key_rpe._embeddings.weight", ".key_positions"),
    ("._value_rpe._embeddings.weight", ".value_positions"),
    ("._batch_norm_similarity.", ".similarity_norm."),
    ("._batch_norm_retrieved_output.", ".output_norm."),
)

HEAD_NAMES = (
    ("head._cluster_centers.weight", "head.cluster_centers"),
    ("head._class_embedding_projection.", "head.class_embedding."),
    ("head._mask_embedding_projection.", "head.mask_embedding."),
    # The transformer layers.
    ("head._kmax_transformer_layers.", "head.layers."),
    ("._query_conv1_bn_act.", ".query_conv."),
    ("._pixel_conv1_bn_act.", ".pixel_conv."),
    ("._query_qkv_conv_bn.", ".query_qkv."),
    ("._pixel_v_conv_bn.", ".pixel_value."),
    ("._query_self_attention._batch_norm_similarity.", ".self_attention.similarity_norm."),
    ("._query_self_attention._batch_norm_retrieved_value.", ".self_attention.output_norm."),
    ("._query_conv3_bn.", ".attention_out."),
    ("._kmeans_query_batch_norm_retrieved_value.", ".kmeans_norm."),
    ("._kmeans_query_conv3_bn.", ".kmeans_out."),
    ("._query_ffn_conv1_bn_act.", ".ffn_in."),
    ("._query_ffn_conv2_bn.", ".ffn_out."),
    # The predictors; the misspelling is the official one.
    ("._predcitor.", ".predictor."),
    ("._pixel_space_head_conv0bnact.", ".pixel_depthwise."),
    ("._pixel_space_head_conv1bnact.", ".pixel_pointwise."),
    ("._pixel_space_head_last_convbn.", ".pixel_project."),
    ("._pixel_space_mask_batch_norm.", ".mask_norm."),
    ("._transformer_mask_head.", ".mask_kernel."),
    ("._transformer_class_head.conv.", ".class_logits."),
    # The auxiliary semantic head; the numbered pieces are Cityscapes' small one.
    ("head._auxiliary_semantic_predictor.", "head.aux_semantic."),
    ("head.aux_semantic.0.", "head.aux_semantic.layers.0."),
    ("head.aux_semantic.1.", "head.aux_semantic.layers.1."),
    ("head.aux_semantic.2.conv.", "head.aux_semantic.layers.2."),
    ("._aspp._aspp_conv0.", ".aspp.pointwise."),
    ("._aspp._aspp_conv1.", ".aspp.dilated.0."),
    ("._aspp._aspp_conv2.", ".aspp.dilated.1."),
    ("._aspp._aspp_conv3.", ".aspp.dilated.2."),
    ("._aspp._aspp_pool.", ".aspp.pool."),
    ("._aspp._proj_conv_bn_act.", ".aspp.project."),
    ("._low_level_projection_os8.", ".fuse_os8.project."),
    ("._low_level_fusion_os8_conv0_bn_act.", ".fuse_os8.depthwise."),
    ("._low_level_fusion_os8_conv1_bn_act.", ".fuse_os8.pointwise."),
    ("._low_level_projection_os4.", ".fuse_os4.project."),
    ("._low_level_fusion_os4_conv0_bn_act.", ".fuse_os4.depthwise."),
    ("._low_level_fusion_os4_conv1_bn_act.", ".fuse_os4.pointwise."),
    (".conv_block_0.", ".mix_depthwise."),
    (".conv_block_1.", ".mix_pointwise."),
    (".final_conv.conv.", ".classifier."),
)


def _table(key: str) -> tuple[tuple[str, str], ...]:
    part = key.partition(".")[0]
    return {"decoder": DECODER_NAMES, "head": HEAD_NAMES}.get(part, ())


def rename_to_ours(key: str) -> str:
    """Return our name of an official one, both with ``encoder.``, ``decoder.`` or ``head.`` in front already."""
    for official, ours in _table(key):
        key = key.replace(official, ours)
    return key


def rename_to_official(key: str) -> str:
    """Return the official name of one of ours; the inverse of `rename_to_ours`."""
    for official, ours in reversed(_table(key)):
        key = key.replace(ours, official)
    return key
