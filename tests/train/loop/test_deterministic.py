import subprocess
import sys


def test_deterministic_kernels_give_cublas_its_fixed_workspace_unless_the_user_chose_one() -> None:
    script = (
        "import os, torch\n"
        "from maas_ray.train.loop.deterministic import use_deterministic_kernels\n"
        "os.environ.pop('CUBLAS_WORKSPACE_CONFIG', None)\n"
        "use_deterministic_kernels(False)\n"
        "assert 'CUBLAS_WORKSPACE_CONFIG' not in os.environ and not torch.are_deterministic_algorithms_enabled()\n"
        "use_deterministic_kernels(True)\n"
        "assert os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8' and torch.are_deterministic_algorithms_enabled()\n"
        "os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':16:8'\n"
        "use_deterministic_kernels(True, warn_only=True)\n"
        "assert os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':16:8' and torch.is_deterministic_algorithms_warn_only_enabled()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
