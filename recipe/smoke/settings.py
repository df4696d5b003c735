"""What a smoke run does, and the command lines of its steps."""

import sys
from dataclasses import dataclass
from pathlib import Path

from recipe.system.errors import UserError

GPU_COUNTS = (1, 2, 4, 8)
"""Over which the experts of the 8-GPU recipe spread evenly."""
CPU_RANKS = 2
REQUESTS_PER_GPU = 64
"""That generate at once: as many as its CUDA graphs take."""


@dataclass(frozen=True)
class Settings:
    """What one smoke run is to do."""

    directory: Path
    """Gets everything: the task, the model, the runs and what they came to."""
    gpus: int
    """0: it runs on the CPU."""
    seed: int
    warm_up_steps: int | None
    """Supervised steps; None: as many as the recipe says."""
    interrupt_after: int
    """Steps after which GRPO is sent a SIGTERM."""
    engine: str
    """Where a CPU generates; GPUs always do it with SGLang."""
    flags: tuple[str, ...]
    """Further ones, for GRPO."""

    @property
    def ranks(self) -> int:
        return self.gpus or CPU_RANKS

    @property
    def task(self) -> Path:
        """The questions."""
        return self.directory / "task"

    @property
    def untrained(self) -> Path:
        """The model at first."""
        return self.directory / "untrained"

    @property
    def model(self) -> Path:
        """The model after its warm-up."""
        return self.directory / "model"

    @property
    def grpo(self) -> Path:
        """The run directory of GRPO."""
        return self.directory / "grpo"

    @property
    def checkpoints(self) -> Path:
        return self.grpo / "checkpoints"

    def warm_up_flags(self) -> list[str]:
        """Flags of the supervised run."""
        words = ["--recipe", "smoke-sft"] if self.gpus else ["--recipe", "tiny-sft", "--enable-mtp-training"]
        words += [*self._flags("sft", self.untrained), "--prompt-data", str(self.task / "warmup.jsonl")]
        if (steps := self.warm_up_steps) is not None:
            schedule = {"num-rollout": steps, "lr-decay-iters": steps, "lr-warmup-iters": steps // 10}
            words += [word for name, value in schedule.items() for word in (f"--{name}", str(value))]
        return [*words, "--save-hf", str(self.model)]

    def grpo_flags(self) -> list[str]:
        """Flags of GRPO, from its beginning."""
        words = ["--recipe", "smoke" if self.gpus else "smoke-cpu", *self._flags("grpo", self.model)]
        words += ["--ref-load", str(self.model), "--prompt-data", str(self.task / "train.jsonl")]
        words += ["--eval-prompt-data", "heldout", str(self.task / "heldout.jsonl")]
        if not self.gpus:
            words += ["--rollout-engine", self.engine]
        else:
            words += ["--rollout-num-gpus-per-engine", str(self.gpus), "--sglang-ep-size", str(self.gpus)]
            words += ["--sglang-max-running-requests", str(REQUESTS_PER_GPU * self.gpus)]
        if self.gpus > 1:
            words += ["--sglang-enable-dp-attention", "--sglang-enable-dp-lm-head"]
            words += ["--sglang-moe-dense-tp-size", "1", "--sglang-dp-size", str(self.gpus)]
        return [*words, *self.flags]

    def _flags(self, name: str, checkpoint: Path) -> list[str]:
        """Flags that every run has."""
        words = ["--name", name, "--runs-dir", str(self.directory), "--hf-checkpoint", str(checkpoint)]
        words += ["--actor-num-gpus-per-node", str(self.ranks), "--expert-model-parallel-size", str(self.ranks)]
        return [*words, "--seed", str(self.seed)]


def train_command(flags: list[str]) -> list[str]:
    """A run of the loop."""
    return [sys.executable, "-m", "recipe.train", *flags]


def gpus_to_use(asked: int | None, here: int) -> int:
    """As many as asked for, or the most that suit. Raises UserError for a number that does not."""
    suitable = [count for count in GPU_COUNTS if count <= here]
    if asked is None:
        return max(suitable, default=0)
    if asked not in suitable:
        raise UserError(
            f"--num-gpus {asked}: the smoke run spreads its experts over 1, 2, 4 or 8 GPUs, and this machine has {here}"
        )
    return asked
