"""Real SGLang as two processes, as on two machines: one engine, which takes weights and ends as one.

Without DP attention, for which SGLang asks for the same free ports on each machine, and this is one; and with experts
split, not dealt out, for which SGLang has no kernel in plain torch."""

import dataclasses
import itertools
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import psutil
import pytest
import torch
from rollout_support import CONTEXT, PROMPT, EngineUnderTest, Kind, assert_equals_fresh_load, greedy_result, weights_of

from recipe.config import resolve
from recipe.config.sglang_rules import EngineLayout
from recipe.engines.dist_init import DistInit
from recipe.engines.launch import Node, SglangServer, launch_sglang
from recipe.engines.process import EngineProcess
from recipe.system.errors import UserError
from recipe.system.ports import LOCAL
from recipe.weight_sync.checksum import ExpectedChecksums
from recipe.weight_sync.result import UpdateResult
from recipe.weight_sync.sync import WeightSync

pytestmark = [pytest.mark.slow, pytest.mark.sglang]

TRANSFERS: tuple[Literal["tensor", "distributed", "disk"], ...] = ("tensor", "distributed", "disk")


@pytest.fixture(scope="module")
def parts(
    sglang_python: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[EngineProcess]]:
    logs = tmp_path_factory.mktemp("parts")
    flags = ["--rollout-engine", "sglang", "--rollout-engine-python", str(sglang_python), "--rollout-num-gpus", "2"]
    nodes = ["--actor-num-nodes", "2", "--actor-num-gpus-per-node", "1", "--rollout-num-gpus-per-engine", "2"]
    config = resolve(["--recipe", "tiny", "--hf-checkpoint", str(checkpoint), *flags, *nodes]).config
    with ExitStack() as stack:
        dist_init = DistInit.open(LOCAL, lambda port: True)
        stack.callback(dist_init.close)
        processes = []
        for rank in range(2):
            node = Node(rank, 2, dist_init.address, LOCAL, {"GLOO_SOCKET_IFNAME": "lo"})
            launch = launch_sglang(
                checkpoint,
                SglangServer.of(config, (), node),
                weight_version="1",
                threads=1,
                context_length=CONTEXT,
                random_seed=7,
            )
            processes.append(stack.enter_context(EngineProcess(launch, logs / str(rank))))
        processes[0].wait_healthy(900, processes[1].check_alive)
        yield processes


@pytest.fixture(scope="module")
def engine(parts: list[EngineProcess], checkpoint: Path) -> EngineUnderTest:
    return EngineUnderTest(parts[0], checkpoint, Kind.SGLANG)


def checksums(engine: EngineUnderTest) -> ExpectedChecksums:
    model = engine.reference.config
    return ExpectedChecksums(model.num_hidden_layers, model.n_routed_experts, EngineLayout(tp=2))


def test_two_processes_answer_as_transformers_does(engine: EngineUnderTest) -> None:
    tokens, _ = greedy_result(engine)
    with torch.no_grad():
        logits = engine.reference(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
    assert tokens == logits.argmax(-1).tolist()
    assert_equals_fresh_load(engine, engine.checkpoint)


def test_they_listen_on_their_machines_address_only(parts: list[EngineProcess]) -> None:
    for part in parts:
        server = psutil.Process(part.pid)
        family = (server, *server.children(recursive=True))
        listening = [c.laddr for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
        assert {address.ip for address in listening} == {LOCAL}


def test_updates_reach_both(engine: EngineUnderTest, other_checkpoint: Path) -> None:
    """By each transfer, there and back again; each rank's tensors are compared with what it should hold."""
    checkpoints = itertools.cycle((other_checkpoint, engine.checkpoint))
    for transfer, checkpoint in zip(TRANSFERS, checkpoints, strict=False):
        sync = WeightSync(transfer, 500_000, ranks_per_engine=2, address=LOCAL, checksums=lambda: checksums(engine))
        if transfer == "disk":
            result = sync.load_from_disk(checkpoint, {0: engine.url}, transfer)
        else:
            result = sync.send(weights_of(checkpoint).items(), {0: engine.url}, transfer)
        assert result == UpdateResult()
        assert engine.request("GET", "/model_info")[1]["weight_version"] == transfer
        assert_equals_fresh_load(engine, checkpoint)


def test_a_rank_with_another_slice_is_named(engine: EngineUnderTest) -> None:
    """The second rank has the last heads of every layer, and the last rows of every expert."""
    weights = weights_of(engine.checkpoint)
    expert, query = "model.layers.2.mlp.experts.7.up_proj.weight", "model.layers.1.self_attn.q_b_proj.weight"
    expected = checksums(engine)
    for name, tensor in weights.items():
        changed = tensor.clone()
        if name in (expert, query):
            changed[-1] += 1
        expected.add(name, changed)
    sync = WeightSync("tensor", 500_000, ranks_per_engine=2, address=LOCAL)
    sync.send(weights.items(), {0: engine.url}, "same").check_taken()
    checked = dataclasses.replace(sync, checksums=lambda: expected)
    named = "model.layers.1.self_attn.q_b_proj.weight on rank 1, model.layers.2.mlp.experts.w13_weight on rank 1: "
    with pytest.raises(UserError, match=rf", 2 of \d+ tensors .* first of them {named}"):
        checked.send([("model.norm.weight", weights["model.norm.weight"])], {0: engine.url}, "changed").check_taken()


def test_the_first_ends_when_the_second_does(parts: list[EngineProcess]) -> None:
    """The last test of this file: it leaves no engine."""
    os.killpg(parts[1].pid, signal.SIGKILL)
    psutil.Process(parts[0].pid).wait(240)
    assert not parts[0].alive
