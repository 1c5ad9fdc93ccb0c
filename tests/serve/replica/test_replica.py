"""Modules that a replica's process must not import."""

import subprocess
import sys


def test_a_replica_never_imports_torch() -> None:
    """Torch costs some 250 MB and two seconds in each replica that imports it."""
    code = "import sys, maas_ray.serve.replica.replica, maas_ray.bundle.engine.engine; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"
