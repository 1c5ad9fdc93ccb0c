"""Tables of properties of ONNX operators: safety from crashes, value-dependent sizes, output types.

An operator that is not listed as safe counts as one that can crash the process. The safe operators were tested with the
extreme values of every datatype and with other shapes (tests/faults/test_safe_operators.py), which removed GRU from the
list: initial states whose size differs from that of the weights corrupt its memory.
"""

from onnx import TensorProto

ML = "ai.onnx.ml"


def _words(*lines: str) -> list[str]:
    return " ".join(lines).split()


_BY_ELEMENT = _words(
    "Abs Acos Acosh Add And Asin Asinh Atan Atanh BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu Clip",
    "Constant Cos Cosh Div Dropout Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity",
    "IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu",
    "Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor",
)
_ALONG_AN_AXIS = _words(
    "ArgMax ArgMin BatchNormalization CumSum GroupNormalization Hardmax InstanceNormalization LRN LayerNormalization",
    "LogSoftmax LpNormalization MeanVarianceNormalization RMSNormalization ReduceL1 ReduceL2 ReduceLogSum",
    "ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Softmax TopK",
)
_PLACES = _words(
    "Compress Concat ConstantOfShape DepthToSpace Expand EyeLike Flatten Gather GatherElements GatherND NonZero OneHot Pad",
    "Range Reshape ScatterElements ScatterND Shape Size Slice SpaceToDepth Split Squeeze Tile Transpose Trilu Unsqueeze",
)
_PRODUCTS = _words(
    "AveragePool Conv ConvTranspose Einsum Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MatMul MaxPool Resize",
    "Upsample ConvInteger DequantizeLinear DynamicQuantizeLinear MatMulInteger QLinearConv QLinearMatMul QuantizeLinear",
)
_BODIES = _words("If Loop Scan")
"""Their bodies are checked separately."""
_CLASSICAL = _words(
    "ArrayFeatureExtractor Binarizer FeatureVectorizer Imputer LabelEncoder Normalizer Scaler TreeEnsembleClassifier",
    "TreeEnsembleRegressor",
)
SAFE = frozenset(
    [("", name) for name in (*_BY_ELEMENT, *_ALONG_AN_AXIS, *_PLACES, *_PRODUCTS, *_BODIES)]
    + [(ML, name) for name in _CLASSICAL]
)
"""Operators that do not crash for any value or shape, by domain and name."""

SAFE_IF_STATIC = {("", "Resize"): (1, 2, 3), ("", "Upsample"): (1,)}
"""Operators that are safe only if these inputs are the same for all requests of a shape."""

DIVISIONS = frozenset({("", "Div"), ("", "Mod")})
"""The processor raises a signal for integers: INT_MIN / -1, and, if the library does not check, x / 0."""

CONTROL = frozenset({("", "Loop"), ("", "Scan"), ("", "If")})

SIZED_BY: dict[tuple[str, str], tuple[int, ...]] = {
    ("", name): places
    for names, places in (
        ("ConstantOfShape BlackmanWindow HammingWindow HannWindow", (0,)),
        (
            "AffineGrid CenterCropPad Expand Pad Reshape Split SplitToSequence Squeeze Tile TopK Unsqueeze Upsample",
            (1,),
        ),
        ("ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum", (1,)),
        ("ReduceSumSquare OneHot DFT", (1,)),
        ("Col2Im", (1, 2)),
        ("Range", (0, 1, 2)),
        ("Resize", (1, 2, 3)),
        ("Slice", (1, 2, 3, 4)),
        ("MaxUnpool", (2,)),
        ("STFT", (1, 3)),
        ("MelWeightMatrix", (0, 1, 2, 3, 4)),
    )
    for name in names.split()
}
"""Indices of inputs whose values decide the amount of computation."""

SIZED_BY_DATA = frozenset(
    ("", name)
    for name in _words(
        "Compress ImageDecoder NonMaxSuppression NonZero RegexFullMatch RoiAlign StringConcat",
        "StringNormalizer StringSplit TfIdfVectorizer Unique ConcatFromSequence Optional OptionalGetElement",
        "OptionalHasElement SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert",
        "SequenceLength SequenceMap Loop If",
    )
)  # fmt: skip
"""Operators whose output sizes or run times depend on values, not only on shapes."""

RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)

GIVES: dict[tuple[str, str], int] = {
    ("", name): kind
    for names, kind in (
        (
            "And Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not Or Xor",
            TensorProto.BOOL,
        ),
        ("ArgMax ArgMin NonZero Shape Size", TensorProto.INT64),
        ("ConvInteger MatMulInteger", TensorProto.INT32),
    )
    for name in names.split()
} | {
    (ML, name): TensorProto.FLOAT
    for name in _words(
        "Binarizer FeatureVectorizer Normalizer Scaler TreeEnsembleRegressor",
    )
}
"""The type of the first output, for any inputs."""

KEEPS = {
    ("", name): place
    for names, place in (
        (
            "Abs Acos Acosh Add Asin Asinh Atan Atanh AveragePool BatchNormalization BitwiseAnd BitwiseNot BitwiseOr "
            "BitwiseXor Ceil Celu Clip Concat Conv ConvTranspose Cos Cosh CumSum DepthToSpace Div Dropout Einsum Elu Erf "
            "Exp Expand Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool "
            "GlobalMaxPool GroupNormalization HardSigmoid HardSwish Hardmax Identity InstanceNormalization LRN LSTM "
            "LayerNormalization LeakyRelu Log LogSoftmax LpNormalization LpPool MatMul Max MaxPool Mean "
            "MeanVarianceNormalization Min Mish Mod Mul Neg PRelu Pad Pow RMSNormalization RNN Range Reciprocal ReduceL1 "
            "ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare "
            "Relu Reshape Resize Round ScatterElements ScatterND Selu Shrink Sigmoid Sign Sin Sinh Slice Softmax Softplus "
            "Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu "
            "Unsqueeze Upsample",
            0,
        ),
        ("CastLike DequantizeLinear Where", 1),
        ("OneHot", 2),
    )
    for name in names.split()
}
"""Operators whose first output has the type of the input with this index."""
