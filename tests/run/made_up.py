"""Made-up measurements."""

from recipe.run.directory import SampleRecord
from recipe.run.metrics import StepMetrics, Values
from recipe.run.phases import Phase, StepSeconds


def evaluation(reward: float) -> Values:
    return {
        "reward": reward,
        "ci95_low": reward - 0.1,
        "ci95_high": reward + 0.1,
        "samples": 256,
        "response_length": 6.0,
        "truncated_share": 0.0,
    }


def step_metrics(step: int, seconds: float = 2.0, **evals: float) -> StepMetrics:
    """Metrics that depend on the step alone, but for their times."""
    values = {
        "rollout_id": step - 1,
        "samples": 8,
        "reward": 0.5 + step / 100,
        "response_length": 6.0,
        "truncated_share": 0.0,
        "rollout_tokens_per_second": 48 / seconds,
        "loss": 1 / 3,
        "entropy": 0.7,
        "grad_norm": 0.2,
        "tokens": 100,
        "skipped_steps": 0,
    }
    return StepMetrics(
        step=step,
        values=values if step else {},
        evals={name: evaluation(reward) for name, reward in evals.items()},
        seconds=StepSeconds(seconds, {Phase.ROLLOUT: seconds / 2, Phase.EVAL: seconds / 4}),
    )


def sample_record(index: int) -> SampleRecord:
    return SampleRecord(
        index=index,
        group_index=index // 2,
        prompt_index=index // 2,
        prompt="1+1=",
        response="</think>\\boxed{2}",
        label="2",
        prompt_length=4,
        response_length=6,
        finish_reason="stop",
        weight_versions=[0],
        mean_log_prob=-0.5,
        reward=1.0,
        advantage=0.0,
        grade="graded",
        answer="2",
    )
