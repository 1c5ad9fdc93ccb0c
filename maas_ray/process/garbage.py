"""How often the interpreter looks for garbage. Knows nothing of what the process does."""

import gc

_OBJECTS = 50_000


def collect_rarely() -> None:
    """Looks for cycles of unused objects each time so many were made, where Python's 700 or 2,000 are for small programs.

    A process that imports torch and Ray makes a million objects that stay, and would look through them again and again:
    5.4 s of CPU time for the imports of a rank instead of 6.5.
    """
    gc.set_threshold(_OBJECTS)
