"""Plants the fault that MAAS_RAY_PLANTED names into every Python process of a host; the directory is on its path for that.

loopback     replicas and proxies listen on loopback alone, where the fronts of other nodes cannot reach them
"""

import importlib.abc
import importlib.util
import os
import sys


class _Planted(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module as it is, then breaks it."""

    def __init__(self, name, plant):
        self._name = name
        self._plant = plant
        self._loader = None

    def find_spec(self, name, path=None, target=None):
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        self._plant(module)


def _loopback(module):
    bound = module.bound_socket
    module.bound_socket = lambda address, port, shares_port: bound("127.0.0.1", port, True)


_FAULTS = {"loopback": ("maas_ray.serve.front.replica_access", _loopback)}

if os.environ.get("MAAS_RAY_PLANTED") in _FAULTS:
    sys.meta_path.insert(0, _Planted(*_FAULTS[os.environ["MAAS_RAY_PLANTED"]]))
