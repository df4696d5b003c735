"""What the MTP layer should learn from, for its drafts to be accepted: sampled tokens, or the policy's distribution.

    python scripts/bench_mtp_target.py [--seeds 1 2 3] [--steps 40] [--stale 0] [--targets sampled soft ...] [flags]

The tiny model learns by GRPO from its own rollouts, as in the recipe `tiny`. Beside it copies of the MTP layer learn
from the same rollouts and hidden states, each with an Adam of its own: the policy is the same for all. With p the
policy's distribution of a token x and q the draft's, a copy's loss of the token is one of

    sampled      -log q(x), as --enable-mtp-training has it
    by-sequence  the same, but every response weighs the same, and not every token
    soft         -sum_y p(y) log q(y), whose gradient is what that of `sampled` is in expectation
    variation    1 - sum_y min(p(y), q(y))

Before anything learns from a new rollout, it says what share of the first drafts SGLang would accept:

    likeliest  p(argmax q): as it drafts unless told otherwise
    drawn      sum_y min(p(y), q(y)): with --sglang-speculative-use-rejection-sampling

Beside them a copy that learns nothing. All begin with an MTP layer that has learned from samples of the policy that the
run begins with. With `--stale N` everything learns from rollouts that are N steps old. `make train-tiny` must have made
the checkpoint and the questions, or flags of the recipe name others.
"""

import argparse
import statistics
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from recipe.again.alone import alone, in_process, packed, trainer_alone
from recipe.again.step import with_advantages
from recipe.config import Architecture, Config, resolve
from recipe.data.prompts import PromptFormat, read_prompts
from recipe.data.tokenizer import load_tokenizer
from recipe.experience import optimizer_batches
from recipe.messages import TrainSample
from recipe.rewards.comparing import plainly_equal
from recipe.rewards.functions import REWARD_RULES, RewardType
from recipe.system.errors import UserError, run_main
from recipe.system.seeds import derive

if TYPE_CHECKING:
    from recipe.engines.embedded.running_sequence import RunningSequence, Sampling
    from recipe.megatron.microbatch import MicroBatch
    from recipe.megatron.rank import TrainerRank

ONE_OF_EACH = ("--recipe", "tiny", "--actor-num-gpus-per-node", "1", "--rollout-num-gpus", "1")
CONTEXT = 128
"""Tokens of the longest prompt and response."""
WARM_UP_STEPS, WARM_UP_LR = 150, 2e-3
"""Of the MTP layer that all copies begin with; the learning rate rises for a tenth of the steps, and then falls."""
PARTS = 3
"""Of a run, told apart."""
SAME_POLICY = 1e-3
"""Nats a token that trainer and engine are at most apart."""
IDLE, SAMPLED = "none", "sampled"

Figures = dict[str, float]
Graded = list[tuple[TrainSample, int, float]]
"""Samples, each with the number of its group and its reward."""


def likeliest(log_p: Tensor, log_q: Tensor) -> Tensor:
    """[N] with what chance the likeliest token of q is accepted, of log-probabilities [N, V]."""
    return log_p.gather(1, log_q.argmax(-1, keepdim=True))[:, 0].exp()


def drawn(log_p: Tensor, log_q: Tensor) -> Tensor:
    """[N] with what chance a token drawn from q is accepted (Leviathan et al., arXiv:2211.17192, section 3.2)."""
    return torch.minimum(log_p, log_q).exp().sum(-1)


def _cross_entropy(log_p: Tensor, log_q: Tensor, tokens: Tensor) -> Tensor:
    return -log_q.gather(1, tokens[:, None])[:, 0]


ACCEPTED = {"likeliest": likeliest, "drawn": drawn}
LOSSES: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    SAMPLED: _cross_entropy,
    "by-sequence": _cross_entropy,
    "soft": lambda log_p, log_q, _: -(log_p.exp() * log_q).sum(-1),
    "variation": lambda log_p, log_q, _: 1 - drawn(log_p, log_q),
}
"""[N] of log p and log q [N, V] and the sampled tokens [N]."""


class Rollouts:
    """Samples of the policy, made in this process."""

    def __init__(self, config: Config, seed: int) -> None:
        from recipe.engines.embedded.forward import RowModel
        from recipe.engines.embedded.fused import FusedModel
        from recipe.engines.embedded.generation import Generation
        from recipe.engines.embedded.weights import WeightTable

        folder, data = config.model.hf_checkpoint, config.data
        self._settings, self._seed = config.rollout, seed
        self._rule = REWARD_RULES[RewardType.MATH]
        self._tokenizer = load_tokenizer(folder)
        layout = PromptFormat(data.input_key, data.label_key, apply_chat_template=data.apply_chat_template)
        longest = CONTEXT - config.rollout.rollout_max_response_len
        self._prompts = read_prompts(data.prompt_data[0].path, self._tokenizer, layout, max_tokens=longest)
        architecture = Architecture.from_checkpoint(folder)
        self._ends = architecture.eos_token_ids
        model = FusedModel(architecture)
        rows = config.rollout.rollout_batch_size * config.rollout.n_samples_per_prompt
        self._generation = Generation(RowModel(model, CONTEXT), rows, "", lambda _: "", lambda _: None)
        self._weights = WeightTable(model)

    @torch.inference_mode()
    def make(self, weights: Iterable[tuple[str, Tensor]], step: int) -> Graded:
        """The rollout of a step with these weights."""
        from recipe.engines.embedded.running_sequence import RunningSequence

        self._weights.replace(weights)
        order = np.random.default_rng(derive(self._seed, "prompts", step)).permutation(len(self._prompts))
        asked = [
            (group, self._prompts[line], derive(self._seed, "sample", step, group, number))
            for group, line in enumerate(order[: self._settings.rollout_batch_size])
            for number in range(self._settings.n_samples_per_prompt)
        ]
        sequences = [RunningSequence(prompt.ids, self._sampling(seed)) for _, prompt, seed in asked]
        self._generation.waiting.extend(sequences)
        while self._generation.waiting or self._generation.running:
            self._generation.admit()
            if self._generation.running:
                self._generation.decode()
        return [
            (_sample(number, sequence), group, self._reward(sequence.output_ids, prompt.label))
            for number, (sequence, (group, prompt, _)) in enumerate(zip(sequences, asked, strict=True))
        ]

    def _sampling(self, seed: int) -> "Sampling":
        from recipe.engines.embedded.running_sequence import Sampling

        return Sampling(
            max_new_tokens=self._settings.rollout_max_response_len,
            temperature=self._settings.rollout_temperature,
            greedy=False,
            top_p=1.0,
            top_k=len(self._tokenizer),
            seed=seed,
            stop=(),
            stop_token_ids=self._ends,
        )

    def _reward(self, ids: list[int], label: str) -> float:
        """By the rule of the recipe `tiny`, without algebra."""
        answer = self._rule.extract(str(self._tokenizer.decode(ids, skip_special_tokens=True))).answer
        is_right = answer is not None and plainly_equal(answer, label)
        return self._rule.correct if is_right else self._rule.wrong


def _sample(index: int, sequence: "RunningSequence") -> TrainSample:
    count = len(sequence.output_ids)
    return TrainSample(
        index=index,
        tokens=np.array(sequence.known_ids, dtype=np.int64),
        loss_mask=np.ones(count, dtype=np.bool_),
        rollout_log_probs=np.array(sequence.log_probs, dtype=np.float32),
        sources=np.ones(count, dtype=np.int64),
    )


class Drafter:
    """A copy of the MTP layer's parameters, and what it learns from."""

    def __init__(self, target: str, parameters: Mapping[str, Tensor], config: Config) -> None:
        self.target, settings = target, config.optimizer
        self.parameters = {
            name: one.detach().clone().requires_grad_(target != IDLE) for name, one in parameters.items()
        }
        decayed = [parameter for parameter in self.parameters.values() if parameter.dim() > 1]
        others = [parameter for parameter in self.parameters.values() if parameter.dim() == 1]
        self._clip_grad = settings.clip_grad
        self._adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
        )

    def step(self, learning_rate: float) -> None:
        """Learns from the gradients since the last step."""
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self._clip_grad)
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        self._adam.zero_grad()


class Bench:
    """The policy of a rank, and drafters beside it."""

    def __init__(self, rank: "TrainerRank", config: Config) -> None:
        [self._model] = rank.chunks
        [self.layer] = self._model.mtp.layers
        self._scale, self._config = config.mtp.mtp_loss_scaling_factor, config
        for module in self.layer.modules():
            if hasattr(module, "gradient_accumulation_fusion"):
                module.gradient_accumulation_fusion = False  # it adds to a buffer of megatron's, and copies have none

    def packs(self, samples: Graded) -> list[list[TrainSample]]:
        """The microbatches of the only optimizer step of a rollout."""
        [batch] = optimizer_batches(with_advantages(samples, self._config), self._config)
        return packed(batch, self._config)

    def add_gradients(self, samples: Graded, drafters: Iterable[Drafter]) -> None:
        """What each of the drafters learns from a rollout."""
        for pack in self.packs(samples):
            batch, hidden, log_p = self._policy(pack)
            assert batch.inputs.mtp is not None
            assert batch.mtp_weights is not None
            for drafter in drafters:
                if drafter.target == IDLE:
                    continue
                weights = _by_sequence(pack) if drafter.target == "by-sequence" else batch.mtp_weights
                loss = LOSSES[drafter.target]
                of_tokens = loss(log_p, self._draft(drafter, batch, hidden), batch.inputs.mtp.ask.targets)
                (self._scale * (weights * of_tokens).sum()).backward()

    @torch.no_grad()
    def figures(self, samples: Graded, drafters: Mapping[str, Drafter]) -> Figures:
        """Means over the tokens of a rollout: the policy's entropy, and what is accepted of each drafter."""
        sums, count = Figures(), 0
        for pack in self.packs(samples):
            batch, hidden, log_p = self._policy(pack)
            count += len(log_p)
            found = {"entropy": -(log_p.exp() * log_p).sum(-1)}
            for name, drafter in drafters.items():
                log_q = self._draft(drafter, batch, hidden)
                found |= {f"{name}/{kind}": accepted(log_p, log_q) for kind, accepted in ACCEPTED.items()}
            sums = {name: sums.get(name, 0.0) + float(values.sum()) for name, values in found.items()}
        return {name: total / count for name, total in sums.items()}

    @torch.no_grad()
    def _policy(self, pack: Sequence[TrainSample]) -> tuple["MicroBatch", Tensor, Tensor]:
        """The pack, its hidden states [U, 1, H] and, of the tokens that are drafted, the policy's log-probs [N, V]."""
        from recipe.megatron.microbatch import build_microbatch
        from recipe.megatron.step import token_layout

        batch = build_microbatch(pack, token_layout(with_mtp=True))
        inputs, mtp = batch.inputs, batch.inputs.mtp
        assert mtp is not None
        embedded = self._model.embedding(inputs.input_ids, inputs.position_ids)
        hidden = self._model.decoder(hidden_states=embedded, attention_mask=None, packed_seq_params=inputs.sequences)
        if mtp.rows is not None:
            hidden = hidden.index_select(0, mtp.rows)
        return batch, hidden, self._log_probs(hidden, mtp.ask.index + 1)

    def _draft(self, drafter: Drafter, batch: "MicroBatch", hidden: Tensor) -> Tensor:
        """Its log-probs [N, V] of the tokens that are drafted."""
        mtp = batch.inputs.mtp
        assert mtp is not None
        with torch.no_grad():
            embedded = self._model.embedding(mtp.next_ids, mtp.position_ids)
        given = {
            "input_ids": mtp.next_ids,
            "position_ids": mtp.position_ids,
            "hidden_states": hidden.clone().requires_grad_(torch.is_grad_enabled()),
            "attention_mask": None,
            "packed_seq_params": mtp.sequences,
            "embedding": lambda input_ids, position_ids: embedded,
        }
        whole = dict(self.layer.named_buffers()) | drafter.parameters
        predicted, _, _ = torch.func.functional_call(self.layer, whole, kwargs=given)
        return self._log_probs(predicted, mtp.ask.index)

    def _log_probs(self, hidden: Tensor, rows: Tensor) -> Tensor:
        logits = hidden.squeeze(1).index_select(0, rows) @ self._model.output_layer.weight.detach().t()
        return (logits.float() / self._model.temperature).log_softmax(-1)


def _by_sequence(pack: Sequence[TrainSample]) -> Tensor:
    """[N] the weights that the policy's loss has."""
    return torch.from_numpy(
        np.concatenate([np.full(sample.mtp_mask.sum(), sample.weight, dtype=np.float32) for sample in pack])
    )


def warm_up(config: Config, architecture: Architecture, steps: int, path: Path) -> None:
    """Writes the parameters of an MTP layer that has learned from samples of the policy."""
    torch.set_num_threads(1)
    with trainer_alone(config, architecture) as rank:
        bench, rollouts = Bench(rank, config), Rollouts(config, derive(config.misc.seed, "warm-up"))
        drafter = Drafter(SAMPLED, dict(bench.layer.named_parameters()), config)
        weights = list(rank.weights())
        for step in range(1, steps + 1):
            bench.add_gradients(rollouts.make(weights, step), [drafter])
            drafter.step(WARM_UP_LR * min(1.0, 10 * step / steps, 1.2 * (1 - step / (steps + 1))))
        torch.save({name: one.detach() for name, one in drafter.parameters.items()}, path)


def measure(
    config: Config, architecture: Architecture, start: Path, seed: int, steps: int, stale: int, targets: Sequence[str]
) -> list[Figures]:
    """The figures of each step of a run."""
    torch.set_num_threads(1)
    with trainer_alone(config, architecture) as rank:
        bench, rollouts, begun = Bench(rank, config), Rollouts(config, seed), torch.load(start)
        drafters = {target: Drafter(target, begun, config) for target in (IDLE, *targets)}
        waiting, found = deque[Graded](), list[Figures]()
        for step in range(1, steps + 1):
            made = rollouts.make(rank.weights(), step)
            rewards = statistics.fmean(reward for _, _, reward in made)
            found.append(bench.figures(made, drafters) | {"reward": rewards})
            waiting.append(made)
            learned = waiting.popleft() if len(waiting) > stale else waiting[0]
            bench.add_gradients(learned, drafters.values())
            for target in targets:
                drafters[target].step(rank.optimization.learning_rate)
            apart = rank.train_step(bench.packs(learned)).metrics["logprob_diff_mean"]
            assert stale or apart < SAME_POLICY, f"the rollouts are {apart} nats a token from the policy"
        return found


def report(runs: Sequence[Sequence[Figures]], targets: Sequence[str]) -> str:
    """By part of a run the means over its steps and over the runs, and in brackets by how much a target's copy is
    better than the first target's, in each run."""
    steps = len(runs[0])
    parts = [slice(max(1, steps * part // PARTS), steps * (part + 1) // PARTS) for part in range(PARTS)]

    def means(name: str, part: slice) -> list[float]:
        return [statistics.fmean(figures[name] for figures in run[part]) for run in runs]

    def cell(name: str, part: slice, beside: str | None = None) -> str:
        values = means(name, part)
        told = f"{statistics.fmean(values):.4f}"
        if beside is None:
            return told
        apart = [one - other for one, other in zip(values, means(beside, part), strict=True)]
        return f"{told} ({', '.join(f'{one:+.4f}' for one in apart)})"

    columns = [f"steps {part.start + 1} to {part.stop}" for part in parts]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (PARTS + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cell(name, part) for part in parts) + " |" for name in ("entropy", "reward")]
    for kind in ACCEPTED:
        for target in (IDLE, *targets):
            beside = None if target in (IDLE, targets[0]) else f"{targets[0]}/{kind}"
            cells = [cell(f"{target}/{kind}", part, beside) for part in parts]
            lines.append(f"| {kind}: {target} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--stale", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=tuple(LOSSES), default=tuple(LOSSES))
    parser.add_argument("--warm-up-steps", type=int, default=WARM_UP_STEPS)
    arguments, flags = parser.parse_known_args()
    if arguments.steps < 2 * PARTS:
        raise UserError(f"--steps {arguments.steps}: {PARTS} parts of a run are told apart; give more")
    resolved = resolve([*ONE_OF_EACH, *flags])
    config, architecture = alone(resolved.config, None), resolved.architecture
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "mtp.pt"
        in_process(warm_up, config, architecture, arguments.warm_up_steps, start)
        what = (arguments.steps, arguments.stale, tuple(arguments.targets))
        runs = [in_process(measure, config, architecture, start, seed, *what) for seed in arguments.seeds]
    print(report(runs, arguments.targets))


if __name__ == "__main__":
    run_main(main)
