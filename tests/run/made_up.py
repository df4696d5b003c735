"""Made-up measurements."""

from recipe.run import EvalMetrics, Phase, RolloutMetrics, SampleRecord, StepMetrics, StepSeconds, TrainMetrics


def evaluation(reward: float) -> EvalMetrics:
    return EvalMetrics(
        reward=reward,
        ci95_low=reward - 0.1,
        ci95_high=reward + 0.1,
        samples=256,
        response_length=6.0,
        truncated_share=0.0,
    )


def step_metrics(step: int, seconds: float = 2.0, **evals: float) -> StepMetrics:
    """Metrics that depend on the step alone, but for their times."""
    rollout = RolloutMetrics(
        rollout_id=step - 1,
        samples=8,
        weight_version=step - 1,
        reward=0.5 + step / 100,
        reward_std=0.1,
        response_length=6.0,
        truncated_share=0.0,
        grader_failed=0,
        dropped_groups=0,
        unused_groups=0,
        refills=0,
        rollout_tokens_per_second=48 / seconds,
        stale_token_share=0.0,
        engine_restarts=0,
        request_retries=0,
        retried_tokens=0,
    )
    train = TrainMetrics(tokens=100, loss=1 / 3, grad_norm=0.2, lr=1e-3, skipped_steps=0, entropy=0.7)
    return StepMetrics(
        step=step,
        rollout=rollout if step else None,
        train=train if step else None,
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
