"""How responses are sampled, in SGLang's terms."""

from dataclasses import dataclass
from typing import Self, TypeVar

from recipe.config import EvalConfig, RolloutConfig

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling of one response."""

    max_new_tokens: int
    temperature: float = 1.0
    """0: always the most likely token."""
    top_p: float = 1.0
    top_k: int = -1
    """-1: all tokens."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """Besides the model's own end tokens."""

    @classmethod
    def for_rollout(cls, rollout: RolloutConfig) -> Self:
        """The sampling of training."""
        return cls(
            max_new_tokens=rollout.rollout_max_response_len,
            temperature=rollout.rollout_temperature,
            top_p=rollout.rollout_top_p,
            top_k=rollout.rollout_top_k,
            stop=rollout.rollout_stop,
            stop_token_ids=rollout.rollout_stop_token_ids,
        )

    @classmethod
    def for_evaluation(cls, evaluation: EvalConfig, rollout: RolloutConfig) -> Self:
        """The sampling of an evaluation: the rollout's where the evaluation says nothing else."""
        return cls(
            max_new_tokens=_first(evaluation.eval_max_response_len, rollout.rollout_max_response_len),
            temperature=_first(evaluation.eval_temperature, rollout.rollout_temperature),
            top_p=_first(evaluation.eval_top_p, rollout.rollout_top_p),
            top_k=_first(evaluation.eval_top_k, rollout.rollout_top_k),
            stop=rollout.rollout_stop,
            stop_token_ids=rollout.rollout_stop_token_ids,
        )

    def request(self, seed: int, generated: int = 0) -> dict[str, object]:
        """SGLang's `sampling_params` of one sample of which `generated` tokens are already there."""
        return {
            "max_new_tokens": self.max_new_tokens - generated,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": list(self.stop),
            "stop_token_ids": list(self.stop_token_ids),
            "skip_special_tokens": False,
            "sampling_seed": seed,
        }


def _first(value: T | None, otherwise: T) -> T:
    return otherwise if value is None else value
