"""The whole loop on real SGLang: weights by broadcast, every tensor compared after each update."""

from pathlib import Path

import psutil
import pytest
from run_support import (
    ONE_RANK,
    TinyInputs,
    arguments,
    family,
    finish,
    leaves_no_process,
    metrics,
    start,
    wait_for_step,
    words_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.sglang]

ROLLOUTS = 3


def test_a_run_on_sglang_samples_from_the_weights_it_trains(
    inputs: TinyInputs, tmp_path: Path, sglang_python: Path
) -> None:
    command = arguments(
        inputs, tmp_path, "sglang", "--rollout-engine", "sglang", "--num-rollout", str(ROLLOUTS), *ONE_RANK
    )
    more = (
        f"--rollout-engine-python {sglang_python} --update-weight-transfer distributed --check-weight-update-equal "
        "--use-rollout-routing-replay"
    )
    with leaves_no_process(str(tmp_path)):
        process = start([*command, *more.split(), "--update-weight-buffer-size", "200000"])
        wait_for_step(process, tmp_path / "sglang", 0)
        servers = [p for p in family(process) if "sglang_server/serve.py" in " ".join(words_of(p))]
        ports = {c.laddr for p in servers for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
        status, output = finish(process)
    assert status == 0, output
    assert len({port for ip, port in ports if ip == "127.0.0.1"}) == len(ports) == 1
    lines = metrics(tmp_path / "sglang")
    assert len(lines) == ROLLOUTS + 1
    # Were the engines' weights not the trainer's, the difference would grow with every step.
    assert all(line["logprob_diff_mean"] < 1e-3 for line in lines[1:])
    assert all(line["routing_disagreement"] < 0.02 for line in lines[1:])
