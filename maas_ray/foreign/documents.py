"""Reads untrusted YAML and JSON with limits on depth, on nodes after alias expansion, and on the digits of numbers.

A few bytes of YAML can represent any number of values (aliases of aliases), a value that contains itself, or a number
that takes minutes to convert. Independent of specs.
"""

import json
from typing import Any

import yaml
from yaml._yaml import CParser
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

MAX_DEPTH = 64
MAX_NODES = 100_000
"""Maximum number of values and keys, with every alias expanded."""
MAX_NUMBER_CHARS = 4000
"""Maximum digits of a number. Python itself converts no integer of more than 4,300 digits."""
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class Malformed(ValueError):
    """A text that is not a document or exceeds a limit; the message continues a sentence that begins with its name."""


def read_yaml(text: str) -> Any:
    """Reads the one document in a text as plain values.

    Raises:
        Malformed: the text is not YAML, or exceeds a limit.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise Malformed(f"is not YAML: {error}") from error
    except Malformed:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        raise Malformed("is not YAML: a value does not fit its syntax or its tag") from error
    finally:
        loader.dispose()


def read_json(text: str | bytes) -> Any:
    """Reads the value of a JSON text.

    Raises:
        Malformed: the text is not JSON in UTF-8, is nested too deeply, or contains a number with too many digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise Malformed(f"is not JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise Malformed("is not JSON in UTF-8") from error
    except RecursionError as error:
        raise Malformed("is nested too deep") from error
    except ValueError as error:
        raise Malformed(f"contains a number of more than {MAX_NUMBER_CHARS} digits") from error


def plain_copy(value: Any) -> Any:
    """A copy of a document with JSON types: keys and dates become strings.

    Raises:
        Malformed: it contains itself, is nested too deeply, or has a key that is not a plain value.
    """
    try:
        return json.loads(json.dumps(value, default=str))
    except RecursionError as error:
        raise Malformed("is nested too deep") from error
    except (TypeError, ValueError) as error:
        raise Malformed(f"contains an unsupported value: {error}") from error


class _Loader(Composer, CParser, SafeConstructor, Resolver):
    """Composes libyaml's events here, where they can be counted, and constructs values as `yaml.safe_load` does."""

    def __init__(self, text: str) -> None:
        CParser.__init__(self, text)
        Composer.__init__(self)
        SafeConstructor.__init__(self)
        Resolver.__init__(self)
        self._num_nodes = 0
        self._depth = 0
        self._height = 0
        """Known levels below the node that is being composed."""
        self._open: set[str] = set()
        self._known: dict[str, tuple[int, int]] = {}
        """Nodes and levels of each anchor's value."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Composes one node and all nodes below it, and counts them."""
        event: Any = self.peek_event()
        anchor = event.anchor
        if self.check_event(yaml.AliasEvent):
            if anchor in self._open:
                raise Malformed(f"has a value &{anchor} that contains itself")
            nodes, levels = self._known.get(anchor, (0, 0))
            self._count(nodes, levels)
            self._height = max(self._height, levels)
            return super().compose_node(parent, index)
        self._count(1, 1)
        before, outer, self._height = self._num_nodes, self._height, 0
        self._depth += 1
        if anchor is not None:
            self._open.add(anchor)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        levels = self._height + 1
        self._height = max(outer, levels)
        if anchor is not None:
            self._open.discard(anchor)
            self._known[anchor] = (self._num_nodes - before + 1, levels)
        if node.tag in _NUMBERS and len(node.value) > MAX_NUMBER_CHARS:
            raise Malformed(f"contains a number of {len(node.value)} digits; the limit is {MAX_NUMBER_CHARS}")
        return node

    def _count(self, nodes: int, levels: int) -> None:
        self._num_nodes += nodes
        if self._num_nodes > MAX_NODES:
            raise Malformed(f"contains more than {MAX_NODES} values, aliases included")
        if self._depth + levels > MAX_DEPTH:
            raise Malformed(f"is nested more than {MAX_DEPTH} levels deep")
