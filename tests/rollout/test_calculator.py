"""The worked example: a calculator that the model calls."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from fake_engines import FakeEngine, serving

from recipe.config import RolloutConfig
from recipe.data.prompts import Prompt
from recipe.data.tiny_tokenizer import build_tiny_tokenizer
from recipe.generation.custom_generate import Generation
from recipe.generation.examples import calculator
from recipe.rewards import REWARD_RULES, Grader, RewardType
from recipe.rollout.client import ClientOptions, RolloutClient
from recipe.sampling.sample import SampleGroup, grade_group
from recipe.sampling.sampling_params import SamplingParams

PATH = "recipe.generation.examples.calculator:generate"
ROLLOUT = RolloutConfig(
    num_rollout=1, rollout_batch_size=1, rollout_max_response_len=60, custom_generate_function_path=PATH
)


async def test_calls_are_answered_and_only_the_models_own_words_are_learned() -> None:
    tokenizer = build_tiny_tokenizer()
    turns = ["<tool_call>37*48</tool_call>", "<tool_call>one</tool_call>", "\\boxed{1776}"]

    async def say(body: dict[str, Any]) -> web.Response:
        """The next turn, ended as an engine ends it."""
        assert "</tool_call>" in body["sampling_params"][0]["stop"]
        turn = turns[len(engine.bodies) - 1]
        ids = tokenizer.encode(turn, add_special_tokens=False)
        ended = {"type": "stop", **({"matched": calculator.END} if turn.endswith(calculator.END) else {})}
        meta = {"finish_reason": ended, "weight_version": "1", "output_token_logprobs": [[-0.5, i, None] for i in ids]}
        text = turn.removesuffix(calculator.END)
        return web.json_response([{"text": text, "output_ids": ids, "meta_info": meta}])

    engine, group = FakeEngine(say), SampleGroup.of(Prompt(0, (), "", (5, 6), "1776"), 0, 1)
    options = ClientOptions(generation=Generation.of(ROLLOUT, tokenizer, 128))
    async with serving(engine) as urls, RolloutClient(urls, options) as client:
        await client.generate(group, SamplingParams(max_new_tokens=60), [1])
    [sample] = group.samples
    told = ["<tool_response>1776</tool_response>", "<tool_response>error</tool_response>"]
    assert sample.response == turns[0] + told[0] + turns[1] + told[1] + turns[2]
    learned = [token for token, mask in zip(sample.response_ids, sample.loss_mask, strict=True) if mask]
    assert tokenizer.decode(learned) == "".join(turns)
    with Grader(REWARD_RULES[RewardType.MATH]) as grader:
        await grade_group(grader, group)
    assert sample.reward == 1.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("so <tool_call>99*99", "9801"),
        ("<tool_call>7-10", "-3"),
        ("<tool_call>1<tool_call>2+2", "4"),
        ("<tool_call>9**9", "error"),
        ("<tool_call>1+1 ", "error"),
        ("<tool_call>" + "9" * 5000 + "*9", "error"),
    ],
)
def test_what_the_calculator_says(text: str, said: str) -> None:
    assert calculator.answer(text) == f"<tool_response>{said}</tool_response>"


def test_the_task_keeps_its_held_out_questions_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["calculator", "--output", str(tmp_path), "--seed", "3"])
    calculator.main()
    lines = {path.stem: [*map(json.loads, path.read_text().splitlines())] for path in tmp_path.glob("*.jsonl")}
    factors = {
        name: {tuple(sorted(line["prompt"][0]["content"].rstrip("=").split("*"))) for line in of_file}
        for name, of_file in lines.items()
    }
    assert len(factors["heldout"]) == calculator.HELDOUT
    assert not factors["heldout"] & (factors["train"] | factors["warmup"])
    calls = [line for line in lines["warmup"] if calculator.END in line["response"]]
    assert len(calls) / len(lines["warmup"]) == pytest.approx(calculator.CALLING_SHARE, abs=0.02)
    assert all(line["response"].endswith(f"\\boxed{{{line['label']}}}") for line in calls)


def test_the_example_is_short() -> None:
    assert len(Path(calculator.__file__).read_text().splitlines()) < 120
