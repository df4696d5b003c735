"""A run directory without a trainer."""

from collections.abc import Callable
from pathlib import Path

import pytest

from recipe.config import Architecture, Config, Resolved

Resolve = Callable[..., Resolved]


@pytest.fixture
def resolve(tmp_path: Path) -> Resolve:
    """Makes the resolved configuration of a run in `tmp_path`; keyword arguments replace groups."""
    checkpoint = tmp_path / "hf"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1="}\n')

    def make(**groups: object) -> Resolved:
        config = Config.model_validate(
            {
                "model": {"hf_checkpoint": checkpoint},
                "data": {"prompt_data": tmp_path / "train.jsonl"},
                "rollout": {"num_rollout": 8, "rollout_batch_size": 2, "rollout_max_response_len": 8},
                "optimizer": {"lr": 1e-3},
                "eval": {"eval_prompt_data": [["heldout", tmp_path / "train.jsonl"]]},
                "misc": {"name": "run", "runs_dir": tmp_path / "runs", "seed": 7},
            }
            | groups
        )
        return Resolved(config, Architecture.model_construct(), {"misc.seed": "flag"}, ("a note",))

    return make
