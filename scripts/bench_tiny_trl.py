"""One run of TRL's GRPOTrainer on the tiny model: the comparison side of bench_tiny.py, which starts it.

Runs in TRL's own virtual environment, and takes nothing from the recipe but the reward rule. Same checkpoint, prompts,
chat template, batch and sampling as ours. Before the first step and after every --eval-interval steps it samples
answers to every held-out question, timed apart. Writes a JSON object: settings, versions, steps, evaluations.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from recipe.rewards.comparing import plainly_equal
from recipe.rewards.functions import REWARD_RULES, RewardRule, RewardType

Rewards = Callable[[Sequence[str], Sequence[str]], list[float]]
"""Responses, labels -> rewards."""


def load_rewards(rule: RewardRule) -> Rewards:
    """The recipe's rule without algebra, which sums of integers do not need: what takes it is wrong."""

    def grade(responses: Sequence[str], labels: Sequence[str]) -> list[float]:
        answers = [rule.extract(response).answer for response in responses]
        equal = [
            answer is not None and plainly_equal(answer, label) for answer, label in zip(answers, labels, strict=True)
        ]
        return [rule.correct if right else rule.wrong for right in equal]

    return grade


class HeldOut:
    """Samples answers to every held-out question, all in one batch."""

    def __init__(
        self, path: Path, samples: int, tokenizer: PreTrainedTokenizerBase, rewards: Rewards, max_new_tokens: int
    ) -> None:
        lines = read_lines(path) * samples
        self._labels = [line["label"] for line in lines]
        texts = [
            tokenizer.apply_chat_template(line["prompt"], tokenize=False, add_generation_prompt=True) for line in lines
        ]
        self._inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        self._tokenizer = tokenizer
        self._rewards = rewards
        self._sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        self._max_new_tokens = max_new_tokens

    @torch.no_grad()
    def mean_reward(self, model: PreTrainedModel) -> float:
        model.eval()
        output = model.generate(**self._inputs, max_new_tokens=self._max_new_tokens, **self._sampling)
        model.train()
        completions = output[:, self._inputs["input_ids"].shape[1] :]
        texts = self._tokenizer.batch_decode(completions, skip_special_tokens=True)
        return statistics.fmean(self._rewards(texts, self._labels))


class TimedGRPOTrainer(trl.GRPOTrainer):
    """Adds up the time of generating and of all that comes before the forward pass."""

    generating = 0.0
    preparing = 0.0

    def _generate_single_turn(self, *args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = super()._generate_single_turn(*args, **options)
        self.generating += time.perf_counter() - began
        return result

    def _generate_and_score_completions(self, *args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = super()._generate_and_score_completions(*args, **options)
        self.preparing += time.perf_counter() - began
        return result


class Recorder(TrainerCallback):
    """Times steps and evaluates between them; an evaluation is in no step's time."""

    def __init__(self, held_out: HeldOut, eval_interval: int, target: float) -> None:
        self._held_out = held_out
        self._eval_interval = eval_interval
        self._target = target
        self.trainer: TimedGRPOTrainer
        self.steps: list[dict[str, float]] = []
        self.evals: list[dict[str, float]] = []
        self._step_began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._evaluate(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        total, trainer = time.perf_counter() - self._step_began, self.trainer
        scoring = trainer.preparing - trainer.generating
        self.steps.append({"rollout": trainer.generating, "reward": scoring, "train": total - trainer.preparing})
        if state.global_step % self._eval_interval == 0:
            self._evaluate(state.global_step)
            control.should_training_stop |= self.evals[-1]["reward"] >= self._target
        self._begin_step()

    def _evaluate(self, step: int) -> None:
        self.evals.append({"step": step, "reward": self._held_out.mean_reward(self.trainer.model)})
        print(f"step {step}: held-out reward {self.evals[-1]['reward']:.3f}", flush=True)
        self._begin_step()

    def _begin_step(self) -> None:
        self.trainer.generating = self.trainer.preparing = 0.0
        self._step_began = time.perf_counter()


def trainer_settings(arguments: argparse.Namespace, scratch: str) -> trl.GRPOConfig:
    """TRL's fastest settings for this model on a CPU, with the recipe's algorithm."""
    return trl.GRPOConfig(
        output_dir=scratch,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=arguments.seed,
        per_device_train_batch_size=arguments.prompts * arguments.generations,
        num_generations=arguments.generations,
        max_completion_length=arguments.max_completion_length,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        loss_type=arguments.loss_type,
        learning_rate=arguments.lr,
        lr_scheduler_type="constant_with_warmup",
        weight_decay=0.0,
        adam_beta2=arguments.adam_beta2,
        max_grad_norm=1.0,
        max_steps=arguments.steps,
        warmup_steps=arguments.warmup_steps,
        gradient_checkpointing=False,
        shuffle_dataset=True,
        dataloader_pin_memory=False,
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(arguments.threads)
    transformers.set_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, experts_implementation=arguments.experts
    )
    questions = Dataset.from_list([{k: line[k] for k in ("prompt", "label")} for line in read_lines(arguments.train)])
    rewards = load_rewards(REWARD_RULES[RewardType(arguments.rm_type)])
    held_out = HeldOut(arguments.heldout, arguments.eval_samples, tokenizer, rewards, arguments.max_completion_length)
    recorder = Recorder(held_out, arguments.eval_interval, arguments.target)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = recorder.trainer = TimedGRPOTrainer(
            model=model,
            reward_funcs=lambda completions, label, **_: rewards([turn[0]["content"] for turn in completions], label),
            args=trainer_settings(arguments, scratch),
            train_dataset=questions,
            processing_class=tokenizer,
            callbacks=[recorder],
        )
        trainer.train()
    return {
        "settings": {name: str(value) for name, value in vars(arguments).items()},
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
        "steps": recorder.steps,
        "evals": recorder.evals,
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face checkpoint to start from")
    parser.add_argument("--train", type=Path, required=True, help="prompt file")
    parser.add_argument("--heldout", type=Path, required=True, help="held-out prompt file")
    parser.add_argument("--rm-type", choices=tuple(RewardType), required=True, help="the recipe's reward rule")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--eval-interval", type=int, default=10)
    parser.add_argument("--eval-samples", type=int, default=1, help="answers to every held-out question")
    parser.add_argument("--target", type=float, default=0.9, help="held-out reward to stop at")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--max-completion-length", type=int, default=12)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--warmup-steps", type=int, default=0)
    parser.add_argument("--adam-beta2", type=float, default=0.999)
    parser.add_argument("--loss-type", default="grpo")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--experts", choices=("eager", "grouped_mm", "batched_mm"), default="eager")
    arguments = parser.parse_args()
    arguments.output.write_text(json.dumps(run(arguments), indent=1))


if __name__ == "__main__":
    main()
