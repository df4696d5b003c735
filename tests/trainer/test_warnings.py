"""What is well prints nothing."""

import inspect
import re
import subprocess
import sys

import torch.distributed as dist


def test_a_barrier_on_a_ranks_own_gpu_is_no_warning() -> None:
    [words] = re.findall(r'"(barrier\(\): using the device under current context\. )"', inspect.getsource(dist.barrier))
    program = f"import warnings; import recipe.megatron.layout; warnings.warn({words!r}); warnings.warn('another')"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=900, check=True)
    assert "barrier" not in ended.stderr.replace(program, "")
    assert "another" in ended.stderr
