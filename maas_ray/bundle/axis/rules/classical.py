"""Rules for operators of ai.onnx.ml, which process rows separately if these are in the first of two dimensions."""

from maas_ray.bundle.axis.nodes import GraphNode, plain, resized, typed
from maas_ray.bundle.axis.sizes import Size
from maas_ray.bundle.axis.values import Refusal, Value, unsure

_FLOAT, _INT64 = 1, 7


def table(node: GraphNode) -> list[Value]:
    """LabelEncoder, CategoryMapper, Binarizer: elementwise."""
    value = node.data(0)
    return [typed(plain(value), 0)]


def _rows(node: GraphNode, index: int = 0) -> Value:
    value = node.data(index)
    if value.axis is None:
        return value
    if value.rank != 2 or value.axis != 0:
        raise Refusal("treats the rows as the features of one row")
    return value


def features(node: GraphNode) -> list[Value]:
    """Scaler, Imputer, Normalizer: by feature, which is the second dimension."""
    return [typed(plain(_rows(node)), _FLOAT if node.op != "Imputer" else node.input(0).dtype)]


def classifier(node: GraphNode) -> list[Value]:
    """Classifiers: a label and scores per row."""
    value = _rows(node)
    labels, scores = resized(value, value.sizes[:1]), resized(value, (value.sizes[0], node.name("classes")))
    return [typed(labels, _INT64), typed(scores, _FLOAT)]


def regressor(node: GraphNode) -> list[Value]:
    """Regressors: targets per row."""
    value = _rows(node)
    targets = node.attributes.get("n_targets", node.attributes.get("targets", 1))
    return [typed(resized(value, (value.sizes[0], Size(int(targets)))), _FLOAT)]


def one_hot(node: GraphNode) -> list[Value]:
    """OneHotEncoder: adds a dimension."""
    value = node.data(0)
    count = len(node.attributes.get("cats_int64s") or node.attributes.get("cats_strings") or ())
    return [typed(resized(value, (*value.sizes, Size(count))), _FLOAT)]


def vectorizer(node: GraphNode) -> list[Value]:
    """FeatureVectorizer: concatenates features of several inputs."""
    values = [_rows(node, index) for index in range(len(node.inputs))]
    places = {(value.axis, value.inner, value.sizes[0]) for value in values}
    if len(places) > 1:
        raise Refusal("combines rows by their index")
    return [typed(resized(values[0], (values[0].sizes[0], node.name("features"))), _FLOAT)]


def extractor(node: GraphNode) -> list[Value]:
    """ArrayFeatureExtractor: columns by number."""
    value = node.data(0)
    node.common(1)
    node.apart(value, -1)
    if value.rank == 1:
        raise unsure("takes features of a vector")
    return [resized(value, (*value.sizes[:-1], node.name("chosen")))]


def words(node: GraphNode) -> list[Value]:
    """TfIdfVectorizer: counts per row."""
    value = _rows(node)
    return [typed(resized(value, (value.sizes[0], node.name("words"))), _FLOAT)]


RULES = {
    **dict.fromkeys(["LabelEncoder", "CategoryMapper", "Binarizer"], table),
    **dict.fromkeys(["Scaler", "Imputer", "Normalizer"], features),
    **dict.fromkeys(["LinearClassifier", "SVMClassifier", "TreeEnsembleClassifier"], classifier),
    **dict.fromkeys(["LinearRegressor", "SVMRegressor", "TreeEnsembleRegressor", "TreeEnsemble"], regressor),
    "OneHotEncoder": one_hot,
    "FeatureVectorizer": vectorizer,
    "ArrayFeatureExtractor": extractor,
}
STANDARD = {"TfIdfVectorizer": words}
