"""Which GPUs the processes of a run get, on a machine that says it has four."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from recipe.config import Config


@pytest.fixture
def four_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from recipe.cluster import session  # isort: skip  (before Ray, which takes note of its environment)
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv(session._TOKEN_PATH, raising=False)
    session._set_token(tmp_path / "token")
    options = {"include_dashboard": False, "log_to_driver": False, "_node_ip_address": session.LOOPBACK}
    ray.init(address="local", num_cpus=4, num_gpus=4, object_store_memory=session.OBJECT_STORE_BYTES, **options)
    yield
    ray.shutdown()


def config_of(**cluster: object) -> Config:
    return Config.model_validate(
        {
            "model": {"hf_checkpoint": "hf"},
            "data": {"prompt_data": "prompts"},
            "rollout": {"engine": "sglang", "num_rollout": 1, "rollout_batch_size": 1, "rollout_max_response_len": 4},
            "optimizer": {"lr": 1e-3},
            "sglang": {"rollout_num_gpus_per_engine": 2},
            "cluster": cluster,
        }
    )


@pytest.mark.usefixtures("four_gpus")
def test_an_engine_sees_all_its_gpus_and_no_others() -> None:
    from ray.util.placement_group import remove_placement_group

    from recipe.cluster.placement import place

    shared = place(config_of(actor_num_gpus_per_node=4, colocate=True))
    assert [shared.gpus_of_engine(engine) for engine in range(2)] == [(0, 1), (2, 3)]
    remove_placement_group(shared.group)
    apart = place(config_of(actor_num_gpus_per_node=2, rollout_num_gpus=2))
    assert apart.gpus_of_engine(0) == (2, 3)
