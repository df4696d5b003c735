"""A run directory as a run of many steps would leave it, with made-up figures: for the page of `make watch`."""

import json
from pathlib import Path

import numpy as np

from recipe.run.conditions import Conditions, mean_share
from recipe.run.directory import SampleRecord
from recipe.run.journal import encode
from recipe.run.sample_index import index_line
from recipe.run.shown_tokens import ShownTokens, write_tokens
from recipe.run.status import RunState, StatusWriter

GROUP = 8
"""Samples of a prompt."""
WORDS = [
    "so",
    "we",
    "add",
    "both",
    "numbers",
    "carry",
    "one",
    "then",
    "check",
    "that",
    "it",
    "is",
    "even",
    "let",
    "x",
    "be",
]


def write_run(run: Path, steps: int, samples: int, characters: int = 500, state: RunState = RunState.FINISHED) -> None:
    """Writes a run of so many steps of so many samples each, whose responses have about so many characters."""
    (run / "rollouts").mkdir(parents=True)
    draw = np.random.default_rng(1)
    misc = {"name": run.name, "price": 2.5}
    config = {
        "rollout": {
            "num_rollout": steps,
            "rollout_max_response_len": 8192,
            "partial_rollout": False,
            "dynamic_sampling_filter_path": None,
        },
        "eval": {"eval_prompt_data": [["aime", "aime.jsonl"]]},
        "checkpoint": {"save": None, "save_interval": 20},
        "misc": misc,
    }
    manifest = {"name": run.name, "config": config, "instead_of": {"misc.seed": 1234}, "versions": {"packages": {}}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    status = StatusWriter(run, steps, gpus=8, price=2.5)
    with (
        (run / "metrics.jsonl").open("wb") as metrics,
        (run / "samples.jsonl").open("wb") as index,
        (run / "conditions.jsonl").open("wb") as conditions,
    ):
        metrics.write(encode({"step": 0, "seconds_step": 60.0, **_evaluation(0.2)}))
        for step in range(1, steps + 1):
            records = made_up_samples(draw, step, samples, characters)
            (run / "rollouts" / f"{step - 1:06}.jsonl").write_bytes(b"".join(encode(vars(one)) for one in records))
            index.write(encode(index_line(step - 1, records)))
            conditions.write(encode(_conditions(step, samples).as_line()))
            metrics.write(encode(_line(step, steps, records)))
    write_tokens(run, steps - 1, [_tokens(draw, line) for line in range(min(GROUP, samples))])
    status.count(steps)
    status.close(state, "all rollouts are done")


def made_up_samples(draw: np.random.Generator, step: int, count: int, characters: int) -> list[SampleRecord]:
    """The samples of a step."""
    right = draw.random(count) < 0.2 + 0.6 * step / (step + 500)
    lengths = np.clip(draw.lognormal(7.5, 0.6, count), 1, 8192).astype(int)
    text = " ".join(draw.choice(WORDS, max(1, characters // 5)).tolist())
    return [
        SampleRecord(
            index=step * count + number,
            group_index=(step * count + number) // GROUP,
            prompt_index=number // GROUP,
            prompt=f"What is {step} + {number}?",
            response=f"{text} \\boxed{{{step + number + (not right[number])}}}",
            label=str(step + number),
            prompt_length=20,
            response_length=int(lengths[number]),
            finish_reason="length" if lengths[number] == 8192 else "stop",
            weight_versions=[step - 1],
            mean_log_prob=-0.4,
            reward=float(right[number]),
            advantage=float(right[number]) - 0.5,
            grade="truncated" if lengths[number] == 8192 else "graded",
            answer=str(step + number + (not right[number])),
        )
        for number in range(count)
    ]


def _line(step: int, steps: int, records: list[SampleRecord]) -> dict[str, object]:
    rewards = [record.reward for record in records]
    seconds = {"rollout": 70.0 + step % 7, "log_probs": 0.0, "train": 25.0, "update_weights": 1.5}
    names = ("loss", "grad_norm", "entropy", "clip_share", "policy_kl", "kl", "logprob_diff_mean", "logprob_kl")
    more = ("truncated_share", "dropped_groups", "grader_failed", "engine_restarts", "zero_std_share", "tis_weight")
    wave = 0.02 * (1 + np.sin(step / 40))
    return {
        "step": step,
        "rollout_id": step - 1,
        "samples": len(records),
        "reward": float(np.mean(rewards)),
        "reward_ci95_low": float(np.mean(rewards)) - 0.05,
        "reward_ci95_high": float(np.mean(rewards)) + 0.05,
        "reward_std": float(np.std(rewards)),
        "response_length": float(np.mean([record.response_length for record in records])),
        **{name: wave * (place + 1) for place, name in enumerate(names)},
        **dict.fromkeys(more, wave),
        "draft_accept_length": 2.4,
        "rollout_tokens_per_second": 9000.0 + step,
        "tokens_per_second": 7000.0 + step,
        "max_memory_reserved": 60e9,
        "seconds_step": sum(seconds.values()) + 1.0,
        **{f"seconds_{name}": value for name, value in seconds.items()},
        **(_evaluation(0.2 + 0.4 * step / steps) if step % 20 == 0 else {}),
    }


def _evaluation(mean: float) -> dict[str, float]:
    return {"eval/aime": mean, "eval/aime_ci95_low": mean - 0.05, "eval/aime_ci95_high": mean + 0.05}


def _conditions(step: int, samples: int) -> Conditions:
    course = tuple((number * 0.7, round(samples * (1 - (number / 100) ** 3))) for number in range(101))
    return Conditions(step, int(400e9), int(1000e9), course, mean_share(course))


def _tokens(draw: np.random.Generator, line: int) -> ShownTokens:
    count = 300
    log_probs = -draw.exponential(0.5, count)
    return ShownTokens(
        line=line,
        pieces=[f" {word}" for word in draw.choice(WORDS, count).tolist()],
        log_probs=log_probs.tolist(),
        advantages=[0.5] * count,
        trainer_log_probs=(log_probs + draw.normal(0, 0.02, count)).tolist(),
    )
