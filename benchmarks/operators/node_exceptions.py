"""Node test cases that the shadow need not agree with, by the reason.

A case that is listed and agrees, whose operator has no function, or that the suite no longer holds is a failure:
tests/converters/shadow/test_node_cases.py.
"""

from collections.abc import Mapping

EXCEPTIONS: Mapping[str, tuple[str, ...]] = {
    "computed in float32: the shadow rounds to a narrow float where the file casts to it, not behind each operator": (
        "test_attention_3d_causal_bf16_expanded",
        "test_attention_4d_attn_mask_causal_bf16_expanded",
        "test_attention_4d_causal_bf16_expanded",
        "test_attention_4d_causal_fp16_expanded",
        "test_attention_4d_causal_padded_kv_bf16_expanded",
        "test_attention_4d_gqa_with_past_and_present_fp16_expanded",
        "test_attention_4d_padded_kv_bf16_expanded",
        "test_celu_bfloat16",
        "test_celu_bfloat16_expanded",
    ),
    "training mode": (
        "test_batchnorm_epsilon_training_mode",
        "test_batchnorm_example_training_mode",
        "test_training_dropout",
        "test_training_dropout_default",
        "test_training_dropout_default_mask",
        "test_training_dropout_mask",
    ),
    "text": (
        "test_equal_string",
        "test_equal_string_broadcast",
    ),
    "a sequence or an optional, not a tensor": (
        "test_identity_opt",
        "test_identity_sequence",
    ),
    "a vector or a constant has no axis of images, along which the shadow computes dynamic scales": (
        "test_dynamicquantizelinear",
        "test_dynamicquantizelinear_max_adjusted",
        "test_dynamicquantizelinear_min_adjusted",
    ),
    "the positions of the maxima, which only unpooling reads": (
        "test_maxpool_with_argmax_2d_precomputed_pads",
        "test_maxpool_with_argmax_2d_precomputed_strides",
    ),
    "codes that are 8 or 4 bit floats: none of the schemes quantizes to them": (
        "test_quantizelinear_e4m3fn",
        "test_quantizelinear_e5m2",
        "test_quantizelinear_float4e2m1",
    ),
    "ONNX Runtime's answer, which the shadow has, is another one than the suite's": (
        "test_resize_downsample_scales_cubic_align_corners",
        "test_resize_downsample_scales_linear_align_corners",
    ),
}
