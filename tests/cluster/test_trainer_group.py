"""The trainer's ranks as the loop calls them: what each is sent, and whether one has failed."""

import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from recipe.cluster import trainer_group
from recipe.cluster.trainer_group import TrainerGroup
from recipe.messages import Progress
from recipe.system.errors import UserError

Reference = Callable[[], Any]


class Rank:
    """Stands for Ray's handle of a rank: keeps what it is sent, in Ray's form."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.failure: UserError | None = None

    def __getattr__(self, verb: str) -> Any:
        return SimpleNamespace(remote=self._take)

    def _take(self, *arguments: Any) -> Reference:
        self.sent.append(pickle.dumps(arguments))
        return self._answer

    def _answer(self) -> None:
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def ranks() -> list[Rank]:
    return [Rank() for _ in range(4)]


@pytest.fixture
def group(ranks: list[Rank], monkeypatch: pytest.MonkeyPatch) -> TrainerGroup:
    handles = iter(ranks)
    actor = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: next(handles)))
    monkeypatch.setattr(trainer_group, "ray", SimpleNamespace(remote=lambda **_: lambda _: actor, put=lambda one: one))
    monkeypatch.setattr(trainer_group, "sequence_cost", lambda _: len)
    monkeypatch.setattr(
        TrainerGroup, "_call", lambda _, calls: SimpleNamespace(results=lambda: [answer() for answer in calls])
    )
    config = SimpleNamespace(world_size=len(ranks), checkpoint=SimpleNamespace(async_save=False))
    placement = SimpleNamespace(for_rank=lambda _: {}, gpu_of_rank=lambda _: None)
    return TrainerGroup(cast(Any, config), cast(Any, None), cast(Any, placement))


def test_a_checkpoints_groups_are_sent_to_the_rank_that_writes_them_and_to_no_other(
    group: TrainerGroup, ranks: list[Rank], tmp_path: Path
) -> None:
    groups = [{"index": 7, "samples": [{"ids": "TOKENS"}]}]
    progress = Progress(3, 5, 1, data={"digest": "PROMPTS"}, waiting=groups, ahead=[{"rollout": 3, "groups": groups}])
    group.save(tmp_path, progress)
    first, *others = [pickle.loads(rank.sent[0]) for rank in ranks]
    assert first == (tmp_path, progress, False)
    assert others == [(tmp_path, Progress(3, 5, 1), False)] * 3
    group.save(tmp_path, progress, beside_others=True)
    assert all(pickle.loads(rank.sent[1])[2] for rank in ranks)
    assert not any(word in rank.sent[0] for rank in ranks[1:] for word in (b"TOKENS", b"PROMPTS"))


def test_a_trainer_is_well_until_a_call_to_a_rank_has_failed(
    group: TrainerGroup, ranks: list[Rank], tmp_path: Path
) -> None:
    group.save(tmp_path, Progress())
    assert group.is_well
    ranks[2].failure = UserError("training rank 2 died")
    with pytest.raises(UserError, match="rank 2 died"):
        group.save(tmp_path, Progress())
    assert not group.is_well
