#!/usr/bin/env python3
"""Every layout of the trainer beside one GPU: the same batch gives the same gradients, losses and gradient norms.

On two GPUs, over NCCL, with a small model of the real one's kernel sizes (MLA's heads, MTP layer, 16 experts):
gradients of every parameter, then losses and gradient norms of three optimizer steps. In fp32 they are one GPU's to
1e-4. In bf16 they are as close to one GPU's as one GPU comes to itself with other kernels: each parameter's difference
is at most three times the largest that another attention kernel or another permutation makes. Differences of gradients
are norms: of the difference, by that of the gradient; all experts of a layer count as one parameter.

    scripts/check_layouts.py [--layouts DP2 EP2 ...] [--precisions fp32 bf16] [--device cpu]
    scripts/check_layouts.py --faults [--device cpu]

With `--device cpu` a smaller model runs over gloo. With `--faults` ranks fail instead, see `rank_faults.py`. Ends with
1 if a row fails.
"""

import argparse
import math
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rank_faults
import torch
from glm_flash import TINY, write_synthetic
from torch import Tensor
from trainer_ranks import CPU_ADAM, RECOMPUTE, Ranks, build_rank

from recipe.batching.schedule import schedule
from recipe.config import resolve
from recipe.messages import StepReport, TrainSample
from recipe.system.errors import UserError, run_main

if TYPE_CHECKING:
    from recipe.megatron.layout import Rendezvous
    from recipe.megatron.model import PolicyModel
    from recipe.megatron.rank import TrainerRank

STEPS = 3
SEED = 7
EXACT = 1e-4
"""Allowed relative difference in fp32."""
FACTOR = 3.0
"""Allowed in bf16, in differences that other kernels make."""
NEGLIGIBLE = 0.01
"""Losses and norms well below this are compared absolutely."""

RANKS = 2
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
LAYOUTS = {
    # EP2-recipe: with what else the 8-GPU recipe sets.
    "DP2": "",
    "EP2": "--expert-model-parallel-size 2",
    "EP2-recipe": f"--expert-model-parallel-size 2 {RECOMPUTE} {CPU_ADAM}",
    "TP2+SP": TP2,
    "TP2+SP+EP2": f"{TP2} --expert-model-parallel-size 2",
    "PP2-uneven": "--pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 1",
    "CP2": "--context-parallel-size 2",
}
PRECISIONS = {"fp32": "--no-bf16 --moe-permute-fusion", "bf16": "--moe-permute-fusion"}


OTHERS = {
    "attention by products": "--attention-backend unfused",
    "megatron's permutation": "--no-moe-permute-fusion",
}


@dataclass(frozen=True)
class Scale:
    """A model and a batch for it."""

    model: Mapping[str, object]
    deviation: float
    """Of weight matrices: large enough that routing and attention matter, too small to blow rounding up."""
    samples: int
    prompt: int
    """Tokens of a prompt, which two samples share."""
    response: int
    """Most tokens of a response."""
    max_tokens: int
    """Of a pack."""
    attention: str
    """In bf16."""
    other_kernels: Mapping[str, str]
    """For bf16."""

    @property
    def vocabulary(self) -> int:
        size = self.model["vocab_size"]
        assert isinstance(size, int)
        return size


SCALES = {
    "cuda": Scale(
        # MLA's head sizes, which the kernels know, stay those of the real model.
        model={
            "vocab_size": 4096,
            "hidden_size": 512,
            "intermediate_size": 1024,
            "moe_intermediate_size": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "n_routed_experts": 16,
            "q_lora_rank": 256,
            "eos_token_id": [1],
            "pad_token_id": 0,
        },
        deviation=0.04,
        samples=16,
        prompt=64,
        response=200,
        max_tokens=1024,
        attention="flash",
        other_kernels=OTHERS | {"cuDNN's attention": "--attention-backend fused"},
    ),
    "cpu": Scale(
        model=TINY,
        deviation=0.08,
        samples=8,
        prompt=16,
        response=60,
        max_tokens=400,
        attention="auto",
        other_kernels=OTHERS,
    ),
}


def random_samples(scale: Scale) -> list[TrainSample]:
    """Pairs of responses of different lengths to the same prompt, with everything that the loss reads."""
    draw = np.random.default_rng(SEED)
    prompts = draw.integers(0, scale.vocabulary, (scale.samples // 2, scale.prompt))
    samples = []
    for index in range(scale.samples):
        length = int(draw.integers(scale.response // 4, scale.response))
        mask = np.ones(length, dtype=np.bool_)
        mask[draw.integers(0, length)] = False
        tokens = np.concatenate([prompts[index // 2], draw.integers(0, scale.vocabulary, length)])
        samples.append(
            TrainSample(
                index=index,
                tokens=tokens,
                loss_mask=mask,
                weight=1 / (scale.samples * mask.sum()),
                mtp_weight=1 / (scale.samples * scale.response),
                advantages=draw.normal(size=length).astype(np.float32),
                rollout_log_probs=-np.abs(draw.normal(size=length)).astype(np.float32),
            )
        )
    return samples


@dataclass(frozen=True)
class Found:
    """What a layout makes of the batch."""

    gradients: Path
    """A file of fp32 gradients by Hugging Face name."""
    losses: list[float]
    """The policy's, its entropy and the MTP layer's, of every step."""
    norms: list[float]
    """Of the policy's and of the MTP layer's gradients, of every step."""


@dataclass(frozen=True)
class _Gradients:
    """A pipeline chunk, as `gathered_weights` reads it, that shows the gradients of its parameters for these."""

    chunk: "PolicyModel"

    @property
    def config(self) -> Any:
        return self.chunk.config

    @property
    def decoder(self) -> Any:
        return self.chunk.decoder

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, parameter.main_grad) for name, parameter in self.chunk.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.chunk.named_buffers()


def gradients_of(rank: "TrainerRank") -> dict[str, Tensor]:
    """The whole model's, by Hugging Face name, where the backward pass has left them; a collective."""
    from recipe.megatron.weights import gathered_weights

    for replica in rank.replicas:
        for group in replica.bucket_groups + replica.expert_parallel_bucket_groups:
            _gather_sums(group)
    chunks: Any = [_Gradients(chunk) for chunk in rank.chunks]
    gathered = gathered_weights(chunks, rank.architecture)
    return {name: tensor.float().cpu().clone() for name, tensor in gathered if "e_score_correction" not in name}


def _gather_sums(group: Any) -> None:
    """A bucket's sums over data-parallel ranks, of which each rank holds its own part, become whole on all of them."""
    ranks = group.intra_distributed_optimizer_instance_group
    for bucket in group.buckets:
        own = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
        torch.distributed.all_gather_into_tensor(bucket.grad_data, own, group=ranks)


def run_layout(rendezvous: "Rendezvous", flags: str, scale: Scale, file: Path) -> Found:
    """Gradients, which rank 0 writes to `file`, and three steps."""
    from recipe.megatron.step import forward_backward

    rank = build_rank(resolve(flags.split()).config, rendezvous)
    rank.load()
    perf, samples = rank.config.perf, random_samples(scale)
    plan = schedule(
        [sample.length for sample in samples],
        data_parallel_size=rank.config.data_parallel_size,
        max_tokens=scale.max_tokens * perf.context_parallel_size,
    )
    own = rank.own_shard([[[samples[i] for i in pack] for pack in packs] for packs in plan])
    forward_backward(rank.replicas, own, rank.loss_function).read()
    gradients = gradients_of(rank)
    if rendezvous.rank == 0:
        torch.save(gradients, file)
    reports = [rank.train_step(own) for _ in range(STEPS)]
    rank.close()
    return Found(file, *_numbers(reports))


def _numbers(reports: list[StepReport]) -> tuple[list[float], list[float]]:
    losses: list[float] = []
    norms: list[float] = []
    for report in reports:
        losses += [report.metrics[name] for name in ("loss", "entropy", "mtp_loss")]
        norms += [report.metrics[name] for name in ("grad_norm", "mtp_grad_norm")]
    return losses, norms


@dataclass(frozen=True)
class Difference:
    """Relative, of one layout or kernel from another."""

    gradients: dict[str, float]
    """By parameter."""
    losses: float
    norms: float

    @classmethod
    def of(cls, found: Found, expected: Found) -> "Difference":
        ours, theirs = (torch.load(one.gradients, mmap=True) for one in (found, expected))
        assert ours.keys() == theirs.keys()
        apart: dict[str, float] = defaultdict(float)
        whole: dict[str, float] = defaultdict(float)
        for name, tensor in theirs.items():
            parameter = re.sub(r"\.experts\.\d+\.", ".experts.*.", name)
            apart[parameter] += (ours[name].double() - tensor).square().sum().item()
            whole[parameter] += tensor.double().square().sum().item()
        if empty := [name for name, square in whole.items() if square == 0]:
            raise UserError(f"one GPU has no gradient of {', '.join(empty)}: nothing can be compared with it")
        gradients = {name: (square / whole[name]) ** 0.5 for name, square in apart.items()}
        return cls(gradients, _apart(found.losses, expected.losses), _apart(found.norms, expected.norms))

    @classmethod
    def largest(cls, others: list["Difference"]) -> "Difference":
        """Of several, at each parameter."""
        gradients = {name: max(one.gradients[name] for one in others) for name in others[0].gradients}
        return cls(gradients, max(one.losses for one in others), max(one.norms for one in others))

    @classmethod
    def everywhere(cls, value: float, like: "Difference") -> "Difference":
        """The same at every parameter."""
        return cls(dict.fromkeys(like.gradients, value), value, value)


def _apart(found: list[float], expected: list[float]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(abs(ours - theirs) / (abs(theirs) + NEGLIGIBLE) for ours, theirs in pairs)


def row(name: str, found: Difference, unit: Difference, allowed: float, seconds: float) -> tuple[str, bool]:
    """A line of the table, and whether the layout's differences are at most `allowed` times the `unit`'s, of which the
    nearest to that is shown."""
    shares = {parameter: _share(one, unit.gradients[parameter]) for parameter, one in found.gradients.items()}
    worst = max(shares, key=lambda parameter: shares[parameter])
    figures = [
        f"{found.gradients[worst]:.1e} ({allowed * unit.gradients[worst]:.1e})",
        f"{found.losses:.1e} ({allowed * unit.losses:.1e})",
        f"{found.norms:.1e} ({allowed * unit.norms:.1e})",
    ]
    holds = max(shares[worst], _share(found.losses, unit.losses), _share(found.norms, unit.norms)) <= allowed
    return line("ok" if holds else "FAIL", name, *figures, f"{seconds:.1f} s", worst), holds


def _share(one: float, unit: float) -> float:
    return 0.0 if one == 0 else one / unit if unit else math.inf


def line(verdict: str, name: str, *figures: str) -> str:
    """The columns, as `row` fills them."""
    gradients, losses, norms, seconds, worst = figures
    return f"{verdict:4} {name:34} {gradients:>19} {losses:>19} {norms:>19} {seconds:>7}  {worst}"


def base_flags(checkpoint: Path, device: str) -> str:
    """Of training with MTP on the random batch."""
    scale = SCALES[device]
    return (
        f"--hf-checkpoint {checkpoint} --prompt-data /dev/null --rm-type math --num-rollout 4 "
        f"--rollout-batch-size {scale.samples // 2} --n-samples-per-prompt 2 --rollout-max-response-len 16 "
        f"--rollout-engine embedded --colocate --device {device} --use-dynamic-batch-size "
        f"--max-tokens-per-gpu {scale.max_tokens} --lr 1e-4 --weight-decay 0.1 --entropy-coef 0.01 "
        "--mtp-num-layers 1 --enable-mtp-training --distributed-timeout-minutes 2 --log-probs-chunk-size 300"
    )


class Comparison:
    """One precision's table."""

    def __init__(self, precision: str, device: str, folder: Path, ranks: Ranks) -> None:
        self.precision, self.scale, self.folder, self.ranks = precision, SCALES[device], folder, ranks
        attention = self.scale.attention if precision == "bf16" else "unfused"
        self.flags = f"{base_flags(folder / 'hf', device)} {PRECISIONS[precision]} --attention-backend {attention}"

    def rows(self, layouts: list[str]) -> Iterator[tuple[str, bool]]:
        """The table's lines, and whether what they say is well."""
        started = time.monotonic()
        kernels = self.scale.other_kernels if self.precision == "bf16" else {}
        single, *others = self.ranks.apart(
            run_layout, [self._work("one", 1, ""), *(self._work(name, 1, flags) for name, flags in kernels.items())]
        )
        spent = time.monotonic() - started
        yield (
            f"{self.precision}: one GPU{f' with {len(kernels)} other kernels' * bool(kernels)} took {spent:.1f} s",
            True,
        )
        yield line("", "", "gradients (allowed)", "losses", "norms", "", "gradient nearest to what is allowed"), True
        unit, allowed = None, EXACT
        if kernels:
            apart = {name: Difference.of(one, single) for name, one in zip(kernels, others, strict=True)}
            unit, allowed = Difference.largest(list(apart.values())), FACTOR
            for name, one in apart.items():
                yield row(f"one GPU, {name}", one, unit, allowed, 0.0)
        for name in layouts:
            started = time.monotonic()
            found, *_ = self.ranks.together(run_layout, *self._work(name, RANKS, LAYOUTS[name]))
            difference = Difference.of(found, single)
            unit = unit or Difference.everywhere(1.0, difference)
            yield row(name, difference, unit, allowed, time.monotonic() - started)

    def _work(self, name: str, ranks: int, flags: str) -> tuple[str, Scale, Path]:
        file = self.folder / f"{self.precision} {name}.pt"
        return f"{self.flags} --actor-num-gpus-per-node {ranks} {flags}", self.scale, file


def write_model(folder: Path, scale: Scale) -> None:
    """The checkpoint that every layout loads: a dense layer, three MoE layers and the MTP layer."""
    write_synthetic(folder, 3, deviation=scale.deviation, spread=0.1, **scale.model)


def compare(device: str, folder: Path, layouts: list[str], precisions: list[str]) -> Iterator[tuple[str, bool]]:
    """The tables' lines, and whether what they say is well."""
    with Ranks(RANKS, device) as ranks:
        write_model(folder / "hf", SCALES[device])
        for precision in precisions:
            yield from Comparison(precision, device, folder, ranks).rows(layouts)


def provoke(device: str, folder: Path) -> Iterator[tuple[str, bool]]:
    """Likewise of ranks that fail."""
    write_model(folder / "hf", SCALES[device])
    for told, holds in rank_faults.check(device, folder):
        yield f"{'ok' if holds else 'FAIL':4} {told}", holds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--faults", action="store_true", help="do ranks that fail get named?")
    parser.add_argument("--device", choices=SCALES, default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and torch.cuda.device_count() < RANKS:
        raise UserError(f"{RANKS} GPUs are needed, and {torch.cuda.device_count()} are here; or give --device cpu")
    started, failures = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as name:
        if options.faults:
            lines = provoke(options.device, Path(name))
        else:
            lines = compare(options.device, Path(name), options.layouts, options.precisions)
        for told, holds in lines:
            failures += not holds
            print(told, flush=True)
    print(f"{failures} rows fail; {time.monotonic() - started:.0f} s in all")
    return int(failures > 0)


if __name__ == "__main__":
    run_main(main)
