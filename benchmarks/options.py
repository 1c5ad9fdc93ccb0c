"""What the commands of both benchmarks share."""

import argparse
from collections.abc import Callable, Collection


def names(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """For `type=` of an argument: comma-separated names, each of which must be known."""

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        unknown = [name for name in found if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there is: {', '.join(known)}")
        return found

    return parse
