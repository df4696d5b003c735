"""What of its environment a program hands on to the processes that it starts: what they need, by a list.

Credentials of a user's shell (of hubs, clouds, trackers) are for the program alone. What a library needs besides goes
along where PASS names it, as in `RECIPE_PASS_ENV=MY_DRIVER,OTHER`.

python -m recipe.system.environment FILE COMMAND...     runs the command with what `keep_back` wrote to FILE, which goes
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from recipe.system.files import atomic_write_text

PASS = "RECIPE_PASS_ENV"
"""Names of further variables, with commas between them."""
NAMES = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "PWD", "HOSTNAME", "TMPDIR", "VIRTUAL_ENV", "BASE_DIR"),
    *("LANG", "LANGUAGE", "TZ", "TERM", "COLUMNS", "NO_COLOR", "SSL_CERT_FILE", "SSL_CERT_DIR"),
    *("CC", "CXX", "CPATH", "LIBRARY_PATH", "LD_LIBRARY_PATH", "LD_PRELOAD"),
)
PREFIXES = (
    *("LC_", "XDG_", "PYTHON", "CONDA_", "MALLOC_", "RECIPE_"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "NUMBA_"),
    *("CUDA", "CUBLAS", "CUDNN_", "NVIDIA_", "NVTE_", "NVSHMEM_", "NCCL_", "GLOO_", "TP_SOCKET_"),
    *("UCX_", "UCC_", "SHARP_", "IB_", "IBV_", "RDMAV_", "MLX", "FI_", "OFI_", "EFA_", "SLURM_"),
    *("TORCH", "PYTORCH_", "TRITON_", "FLASHINFER_", "FLASH_ATTENTION_", "SGLANG_", "SGL_", "DG_", "TVM_", "MEGATRON_"),
    *("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "SAFETENSORS_"),
)
OF_RAY = ("RAY_", "DASHBOARD_METRIC_PORT", "AUTOSCALER_METRIC_PORT")
"""Besides, for Ray's own processes."""
SECRETS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIALS", "JWT")
"""Ends of the names of credentials, which go nowhere but where PASS names them."""


def handed_on(environment: Mapping[str, str], *, to_ray: bool = False) -> dict[str, str]:
    """What of the environment a process gets that this program starts."""
    prefixes = (*PREFIXES, *OF_RAY) if to_ray else PREFIXES
    passed = {name.strip() for name in environment.get(PASS, "").split(",")}
    return {
        name: value
        for name, value in environment.items()
        if name in passed or ((name in NAMES or name.startswith(prefixes)) and not name.endswith(SECRETS))
    }


def keep_back(environment: Mapping[str, str], path: Path) -> None:
    """Writes what Ray's processes do not get to a file, in a folder that only this user can enter: for the run itself,
    which Ray starts as a job."""
    held = environment.keys() - handed_on(environment, to_ray=True).keys()
    atomic_write_text(path, json.dumps({name: environment[name] for name in sorted(held)}))


def main() -> None:
    path, command = Path(sys.argv[1]), sys.argv[2:]
    kept = json.loads(path.read_text())
    path.unlink()
    os.execve(command[0], command, {**os.environ, **kept})


if __name__ == "__main__":
    main()
