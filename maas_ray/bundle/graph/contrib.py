"""The supported operators of onnxruntime's own domain `com.microsoft`.

Included: operators that onnxruntime's quantization tools and optimizers write, and operators that compute tensors from
tensors alone, with kernels in every build of onnxruntime. Excluded: operators that open files or contain compiled code
for a device (EPContext, Snpe, NchwC layouts), generators with subgraphs (BeamSearch, GreedySearch, Sampling), and
training operators. None of them counts as safe from crashes (`operators.SAFE`): their kernels check less than ONNX's.
"""

DOMAIN = "com.microsoft"

_QUANTIZED = (
    "DequantizeLinear DynamicQuantizeLSTM DynamicQuantizeMatMul GatherBlockQuantized MatMulBnb4 MatMulInteger16 "
    "MatMulIntegerToFloat MatMulNBits MulInteger NhwcMaxPool QAttention QEmbedLayerNormalization QGemm QLinearAdd "
    "QLinearAveragePool QLinearConcat QLinearConv QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul "
    "QLinearReduceMean QLinearSigmoid QLinearSoftmax QLinearWhere QMoE QuantizeLinear ReduceSumInteger"
)
_FUSED = (
    "BiasAdd BiasGelu BiasSoftmax BiasSplitGelu FastGelu FusedConv FusedGemm FusedMatMul FusedMatMulActivation "
    "Gelu GemmFastGelu GroupNorm NhwcConv NhwcFusedConv QuickGelu SkipGroupNorm SkipLayerNormalization "
    "SkipSimplifiedLayerNormalization TransposeMatMul"
)
_ATTENTION = (
    "Attention EmbedLayerNormalization GatedRelativePositionBias GroupQueryAttention MoE MultiHeadAttention "
    "RelativePositionBias RemovePadding RestorePadding PackedAttention PackedMultiHeadAttention RotaryEmbedding"
)
_PLAIN = (
    "CDist ComplexMul ComplexMulConj ConvTransposeWithDynamicPads CropAndResize ExpandDims GatherND GridSample Inverse "
    "Irfft IsAllFinite MaxpoolWithMask MurmurHash3 NGramRepeatBlock Pad Range Rfft Trilu UnfoldTensor Unique "
    "WordConvEmbedding"
)

OPERATORS = frozenset(" ".join((_QUANTIZED, _FUSED, _ATTENTION, _PLAIN)).split())

UNDOMAINED = frozenset({"SimplifiedLayerNormalization"})
"""Operators that onnxruntime's optimizers write without a domain, although ONNX has none of that name."""
