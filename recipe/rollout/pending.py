"""Groups on their way, which may take several rollouts, and their form in a checkpoint."""

import base64
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np

from recipe.data.prompts import Prompt
from recipe.rewards import Grade, GradeStatus
from recipe.sampling.sample import FinishReason, Sample, SampleGroup


@dataclass(frozen=True, slots=True)
class PendingGroup:
    """A group and the seeds of its samples, which they keep: a draw depends on the seed and the token's position, so a
    sample that is continued under the same weights becomes what it would have been without the pause."""

    group: SampleGroup
    """Its index is the number of its prompt's draw."""
    seeds: tuple[int, ...]

    @property
    def is_begun(self) -> bool:
        """Whether there are tokens."""
        return any(sample.response_ids for sample in self.group.samples)

    def as_json(self) -> dict[str, Any]:
        """What `from_json` makes it from."""
        samples = [_as_json(sample) for sample in self.group.samples]
        return {"index": self.group.index, "seeds": list(self.seeds), "samples": samples}

    @classmethod
    def from_json(cls, content: dict[str, Any], prompt_of: Callable[[int], Prompt]) -> "PendingGroup":
        """The group; `prompt_of` tells the prompt of a draw."""
        index, samples = content["index"], content["samples"]
        group = SampleGroup.of(prompt_of(index), index, len(samples))
        for sample, state in zip(group.samples, samples, strict=True):
            _restore(sample, state)
        return cls(group, tuple(content["seeds"]))


def finished_as_json(group: SampleGroup) -> dict[str, Any]:
    """What `finished_from_json` makes a graded group from: nothing of it is done again."""
    grades = [None if sample.grade is None else asdict(sample.grade) for sample in group.samples]
    drafts = [sample.accepted_drafts for sample in group.samples]
    return PendingGroup(group, ()).as_json() | {"grades": grades, "accepted_drafts": drafts}


def finished_from_json(content: dict[str, Any], prompt_of: Callable[[int], Prompt]) -> SampleGroup:
    """The group, graded; `prompt_of` tells the prompt of a draw."""
    group = PendingGroup.from_json(content, prompt_of).group
    for sample, grade, drafts in zip(group.samples, content["grades"], content["accepted_drafts"], strict=True):
        sample.grade = None if grade is None else Grade(**grade | {"status": GradeStatus(grade["status"])})
        sample.accepted_drafts = drafts
    return group


def _as_json(sample: Sample) -> dict[str, Any]:
    return {
        "ids": _packed(np.array(sample.response_ids, dtype="<i4")),
        "log_probs": _packed(np.array(sample.rollout_log_probs, dtype="<f8")),
        "loss_mask": _runs(sample.loss_mask),
        "weight_versions": _runs(sample.weight_versions),
        "finish_reason": sample.finish_reason,
        "matched": sample.matched,
        "turn_end": sample.turn_end,
        "response": sample.response,
        "reward": sample.reward if sample.is_rewarded else None,
        "routed_experts": _routing(sample),
    }


def _routing(sample: Sample) -> dict[str, Any] | None:
    """That of a finished sample; one that an engine goes on with is read again, all of it."""
    if sample.routed_experts is None or not sample.is_finished:
        return None
    return {"shape": list(sample.routed_experts.shape), "experts": _packed(sample.routed_experts)}


def _restore(sample: Sample, state: dict[str, Any]) -> None:
    sample.response_ids = np.frombuffer(base64.b64decode(state["ids"]), dtype="<i4").tolist()
    sample.rollout_log_probs = np.frombuffer(base64.b64decode(state["log_probs"]), dtype="<f8").tolist()
    sample.loss_mask = _unrolled(state["loss_mask"])
    sample.weight_versions = _unrolled(state["weight_versions"])
    sample.finish_reason = state["finish_reason"] and FinishReason(state["finish_reason"])
    sample.matched = state["matched"]
    sample.turn_end = state["turn_end"] and FinishReason(state["turn_end"])
    sample.response = state["response"]
    if state["reward"] is not None:
        sample.reward = state["reward"]
    if (routing := state.get("routed_experts")) is not None:
        experts = np.frombuffer(base64.b64decode(routing["experts"]), dtype=np.uint8)
        sample.routed_experts = experts.reshape(routing["shape"])


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _runs(values: Iterable[Any]) -> list[list[Any]]:
    return [[value, len(list(run))] for value, run in groupby(values)]


def _unrolled(runs: list[list[Any]]) -> list[Any]:
    return [value for value, count in runs for _ in range(count)]
