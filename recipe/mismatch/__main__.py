"""How much of a run's train/rollout difference each cause makes, from a step that it kept.

python -m recipe.mismatch runs/NAME [--step N] [--samples N] [--json]

The samples of the step are scored again by the engine, which reads them whole, and by the trainer, in one process: as
in the run, with the engine's routing, and in fp32. On a CPU for the tiny model, on one GPU for what fits it.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recipe.again.alone import read_config, weights_of
from recipe.again.scores import scores
from recipe.config import Architecture, Config, Resolved
from recipe.experience import sequence_weights
from recipe.messages import Scores, TrainSample
from recipe.mismatch import engine
from recipe.mismatch.bill import DECODING, ENGINE, OLDER, ROUTING, TRAINER, Bill, Floats, Part
from recipe.run.journal import Journal
from recipe.run.kept_steps import KeptStep, read_step, steps_in
from recipe.system.errors import UserError, run_main

WORST_LAYERS = 5


@dataclass(frozen=True)
class Scored:
    """A step's samples by everybody who scored them."""

    step: int
    config: Config
    kept: KeptStep
    own: Scores
    """The trainer in the run's precision, by its own routing."""
    told: Scores
    """The same, where the engine took the tokens."""
    exact: Scores
    """The same in fp32."""
    again: Scores | None
    """The engine, which read the samples whole; None where its log-probs are of another temperature."""

    def of(self, scores: Scores) -> Floats:
        """[T] log-probs of the trained tokens."""
        return self._trained([scores.log_probs[sample.index] for sample in self.kept.samples])

    def _trained(self, each: Sequence[NDArray[Any] | None]) -> Floats:
        pairs = zip(each, self.kept.samples, strict=True)
        return np.concatenate([one[sample.loss_mask] for one, sample in pairs if one is not None]).astype(np.float64)

    @property
    def sampled(self) -> Floats:
        """[T] the engine's, when it made the tokens."""
        return self._trained([sample.rollout_log_probs for sample in self.kept.samples])

    @property
    def versions(self) -> Floats:
        """[T] of the weights that made the tokens."""
        return self._trained(self.kept.versions)

    @property
    def replays(self) -> bool:
        """Whether the run's trainer took tokens where the engine did."""
        return self.config.grpo.replays_rollouts

    def bill(self) -> Bill:
        """The run's difference, in parts."""
        whole = self.of(self.told if self.replays else self.own) - self.sampled
        return Bill.of(whole, [*self._of_engine(), *self._of_trainer()])

    def _of_engine(self) -> Iterator[Part]:
        """From the engine when it sampled to the trainer in fp32 with its routing."""
        versions, newest = self.versions, self.step - 1
        exact = self.of(self.exact)
        again = exact if self.again is None else self.of(self.again)
        older = exact if self.replays else again  # which replays older routing, too
        for version in sorted({*versions.tolist()} - {newest}):
            of_version = np.where(versions == version, older - self.sampled, 0.0)
            yield Part(OLDER, f"{int((versions == version).sum())} tokens of version {version:.0f}", of_version)
        current = np.where(versions == newest, again - self.sampled, 0.0)
        if self.again is None:
            yield Part(ENGINE, "its precision and kernels, when it sampled", current)
            return
        yield Part(DECODING, "the engine token by token, and whole", current)
        counts = (versions == newest) | (not self.replays)
        of_engine = np.where(counts, exact - again, 0.0)
        yield Part(ENGINE, "its precision and kernels, beside the trainer in fp32", of_engine)

    def _of_trainer(self) -> Iterator[Part]:
        if self.config.model.bf16:
            yield Part(TRAINER, "its bf16, beside fp32", self.of(self.told) - self.of(self.exact))
        if not self.replays:
            yield Part(ROUTING, "the trainer's own experts, and the engine's", self.of(self.own) - self.of(self.told))

    def saved_by_replay(self) -> Floats:
        """[T] what the trainer's own routing would change."""
        return self.of(self.own) - self.of(self.told)

    def rerouted(self) -> list[float]:
        """Of each layer with experts the share of response tokens that the trainer takes elsewhere than the engine."""
        shares = []
        for sample in self.kept.samples:
            theirs, ours = self.told.routed_experts[sample.index], self.own.routed_experts[sample.index]
            response = slice(len(sample.prompt), None)
            shares.append((np.sort(theirs, -1) != np.sort(ours, -1)).any(-1)[response])
        result: list[float] = np.concatenate(shares).mean(0).tolist()
        return result

    def weighted_mean(self, difference: Floats) -> float:
        """Mean |difference| by the weights that tokens have in the loss, as the run's metrics have it."""
        counts = [int(sample.loss_mask.sum()) for sample in self.kept.samples]
        grpo = self.config.grpo
        weights = sequence_weights(counts, per_token=grpo.calculate_per_token_loss or grpo.dr_grpo)
        return float(np.repeat(weights, counts) @ np.abs(difference))


def score(run: Path, step: int, samples: int | None) -> Scored:
    """Scores the step again. Raises UserError for a step that was not kept, or whose weights are not there."""
    config = read_config(run)
    architecture = Architecture.from_checkpoint(config.model.hf_checkpoint)
    whole = read_step(run, step)
    resolved, weights = Resolved(config, architecture, {}, ()), weights_of(config, step)
    kept = KeptStep(whole.samples[:samples], whole.versions[:samples])

    def again(given: Sequence[TrainSample], *, bf16: bool, export: Path | None = None) -> Scores:
        return scores(config, architecture, weights, given, bf16=bf16, export=export)

    bf16 = config.model.bf16
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "hf"
        print("scored by the trainer ...", flush=True)
        own = again([replace(one, routed_experts=None) for one in kept.samples], bf16=bf16, export=exported)
        print("by the engine ...", flush=True)
        read = engine.scores(resolved, exported, kept.samples, Path(folder) / "engine.log")
    told_so = [_routed(sample, read) for sample in kept.samples]
    print("and by the trainer with the engine's experts ...", flush=True)
    told = again(told_so, bf16=bf16)
    exact = again(told_so, bf16=False) if bf16 else told
    comparable = config.rollout.rollout_temperature == 1.0
    return Scored(step, config, kept, own, told, exact, read if comparable else None)


def _routed(sample: TrainSample, read: Scores) -> TrainSample:
    """With the experts that the run replayed or, where it replayed none, those that the engine has now told."""
    routed = sample.routed_experts
    return replace(sample, routed_experts=read.routed_experts[sample.index] if routed is None else routed)


def page(scored: Scored, measured: float | None) -> Iterator[str]:
    """What a terminal shows."""
    bill = scored.bill()
    tokens = len(scored.sampled)
    yield f"step {scored.step}: {len(scored.kept.samples)} samples, {tokens} trained tokens, nats a token"
    yield ""
    yield from bill.lines()
    yield ""
    final = scored.of(scored.told if scored.replays else scored.own) - scored.sampled
    said = "" if measured is None else f"; in the run {measured:.5f}"
    yield f"mean difference by the loss's weights: {scored.weighted_mean(final):.5f} now{said}"
    if scored.replays:
        saved = np.abs(scored.saved_by_replay())
        yield f"without replay the trainer's own experts would change a token by {saved.mean():.5f} nats, mean"
    rerouted = sorted(enumerate(scored.rerouted()), key=lambda one: -one[1])[:WORST_LAYERS]
    worst = ", ".join(f"{layer} ({share:.1%})" for layer, share in rerouted)
    yield f"layers with experts whose routers take most response tokens elsewhere than the engine: {worst}"
    rollout = scored.config.rollout
    if rollout.rollout_top_p < 1 or rollout.rollout_top_k != -1:
        yield "top-p and top-k sample from a truncated distribution, which no log-prob here shows"
    if scored.again is None:
        yield "--rollout-temperature is not 1: SGLang tells no log-probs of what it reads at another temperature"
    yield f"cheapest cure: {bill.cheapest_cure or 'none needed'}"


def measured_in(run: Path, step: int) -> float | None:
    """`logprob_diff_mean` of the step's line; None if there is none."""
    lines = (line for line in Journal(run / "metrics.jsonl").read() if line["step"] == step)
    return next((line.get("logprob_diff_mean") for line in lines), None)


def as_json(scored: Scored, measured: float | None) -> str:
    """The same for programs."""
    bill = scored.bill()
    document = {
        "step": scored.step,
        "tokens": len(scored.sampled),
        "measured_in_run": measured,
        "together": asdict(bill.whole),
        "parts": [asdict(part) for part in bill.parts],
        "rerouted": scored.rerouted(),
        "cheapest_cure": bill.cheapest_cure,
    }
    return json.dumps(document, indent=1)


def main() -> None:
    parser = argparse.ArgumentParser(description="The bill of a train/rollout mismatch.")
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--step", type=int, help="a step that it kept; default: the newest")
    parser.add_argument("--samples", type=int, help="score the first so many of its samples only")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    if arguments.samples is not None and arguments.samples < 1:
        raise UserError(f"--samples {arguments.samples} must be at least 1")
    kept = steps_in(arguments.run)
    step = arguments.step if arguments.step is not None else (kept[-1] if kept else 0)
    scored = score(arguments.run, step, arguments.samples)
    measured = measured_in(arguments.run, step)
    print(as_json(scored, measured) if arguments.json else "\n".join(page(scored, measured)))


if __name__ == "__main__":
    run_main(main)
