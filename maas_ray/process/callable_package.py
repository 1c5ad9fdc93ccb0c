"""Makes packages callable: `maas_ray.train` contains the modules of training, and `maas_ray.train(spec)` trains."""

import inspect
import sys
from importlib import import_module
from types import ModuleType
from typing import Any


def make_callable(package: str, function: str) -> None:
    """Makes a package callable. The function is imported at its first call or inspection.

    Args:
        package: name of an imported package.
        function: `module:name` of the function.
    """
    module, _, name = function.partition(":")

    class CallablePackage(ModuleType):
        def __call__(self, *args: Any, **options: Any) -> Any:
            return getattr(import_module(module), name)(*args, **options)

        @property
        def __signature__(self) -> inspect.Signature:
            return inspect.signature(getattr(import_module(module), name))

    sys.modules[package].__class__ = CallablePackage
