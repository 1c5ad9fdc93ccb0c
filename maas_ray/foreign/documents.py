"""Reading YAML and JSON that somebody else wrote: bounded in depth, in nodes after aliases, and in the digits of a number.

A few bytes of YAML can stand for any number of values (aliases of aliases), for a value that holds itself, or for a
number that takes minutes to convert. Knows no spec.
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
"""Values and keys, each alias counted as what it stands for."""
MAX_NUMBER_CHARS = 4000
"""Python itself converts no integer of more than 4,300 digits."""
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class Malformed(ValueError):
    """A text that is no document, or a larger one than is read; the message continues a sentence about it."""


def read_yaml(text: str) -> Any:
    """The one document in a text, made of plain values.

    Raises:
        Malformed: not YAML, or beyond a bound.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise Malformed(f"is not YAML: {error}") from error
    except Malformed:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        raise Malformed("is not YAML: a value is not what its form or its tag says") from error
    finally:
        loader.dispose()


def read_json(text: str | bytes) -> Any:
    """The value that a JSON text holds.

    Raises:
        Malformed: not JSON in UTF-8, nested too deep, or with a number of too many digits.
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
        raise Malformed(f"holds a number of more than {MAX_NUMBER_CHARS} digits") from error


def plain_copy(value: Any) -> Any:
    """A private copy of a document as JSON holds it: keys are texts, and so are dates.

    Raises:
        Malformed: it holds itself, is nested too deep, or has a key that is no plain value.
    """
    try:
        return json.loads(json.dumps(value, default=str))
    except RecursionError as error:
        raise Malformed("is nested too deep") from error
    except (TypeError, ValueError) as error:
        raise Malformed(f"holds what a document cannot: {error}") from error


class _Loader(Composer, CParser, SafeConstructor, Resolver):
    """libyaml's events, composed here, where they can be counted, and constructed as `yaml.safe_load` does."""

    def __init__(self, text: str) -> None:
        CParser.__init__(self, text)
        Composer.__init__(self)
        SafeConstructor.__init__(self)
        Resolver.__init__(self)
        self._num_nodes = 0
        self._depth = 0
        self._height = 0
        """Levels below the node that is being composed, as far as they are known."""
        self._open: set[str] = set()
        self._known: dict[str, tuple[int, int]] = {}
        """Nodes and levels of what an anchor stands for."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One node and all below it, counted."""
        event: Any = self.peek_event()
        anchor = event.anchor
        if self.check_event(yaml.AliasEvent):
            if anchor in self._open:
                raise Malformed(f"has a value &{anchor} that holds itself")
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
            raise Malformed(f"holds a number of {len(node.value)} digits; the limit is {MAX_NUMBER_CHARS}")
        return node

    def _count(self, nodes: int, levels: int) -> None:
        self._num_nodes += nodes
        if self._num_nodes > MAX_NODES:
            raise Malformed(f"holds more than {MAX_NODES} values, aliases included")
        if self._depth + levels > MAX_DEPTH:
            raise Malformed(f"is nested more than {MAX_DEPTH} levels deep")
