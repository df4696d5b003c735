"""What `serve.py` makes right in the installed SGLang."""

import json
import subprocess
from pathlib import Path

import pytest

from recipe.engines.launch import SERVE, USE_CPU

ASK = """
import json, sys
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
import serve
from sglang.srt.layers import dp_attention
from sglang.srt.state_capturer import routed_experts
dp_attention.dp_slot_in = lambda per_rank: 1
verified = SimpleNamespace(global_num_tokens_cpu=[12, 9], batch_size=3)
one_each = SimpleNamespace(global_num_tokens_cpu=[4, 3], batch_size=3)
idle = SimpleNamespace(global_num_tokens_cpu=[12, 0], batch_size=0)
find = routed_experts.get_dp_local_slice_cpu
print(json.dumps([find(verified, True, 4), find(one_each, True, 4), find(verified, False, None), find(idle, True, 4)]))
"""


@pytest.mark.sglang
def test_a_group_of_gpus_tells_where_its_own_tokens_were_taken(sglang_python: Path) -> None:
    """The second of two groups has 3 sequences in a CUDA graph of 4: their rows lie behind those of 4 sequences, of 3
    tokens each where drafts are verified. Without a graph no row is empty."""
    command = [str(sglang_python), "-c", ASK, str(SERVE.parent)]
    ended = subprocess.run(command, env=USE_CPU, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    verified, one_each, without_graph, idle = json.loads(ended.stdout.splitlines()[-1])
    assert verified == [12, 9]
    assert one_each == [4, 3]
    assert without_graph == [12, 9]
    assert idle[1] == 0
