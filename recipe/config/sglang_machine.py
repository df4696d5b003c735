"""Rules of the engines that depend on whether SGLang computes on GPUs: what its kernels there take, and what those for
CPUs do not."""

from collections.abc import Iterator

from recipe.config.architecture import Architecture
from recipe.config.schema import Config

LATENT_SIZES = (512, 64)
"""kv_lora_rank and qk_rope_head_dim that SGLang's kernels of latent attention are made for."""


def problems_on_machine(config: Config, architecture: Architecture, *, on_gpus: bool) -> Iterator[str]:
    """What SGLang would fail over when it has started, a sentence each."""
    if config.rollout.engine != "sglang" or not config.needs_engine:
        return
    if on_gpus:
        yield from _of_gpus(config, architecture)
    elif "speculative_algorithm" in config.sglang.args:
        yield (
            f"--sglang-speculative-algorithm {config.sglang.args['speculative_algorithm']} needs GPUs: SGLang's "
            "attention for CPUs cannot verify drafts; leave it out (--sglang-speculative-algorithm false)"
        )


def _of_gpus(config: Config, architecture: Architecture) -> Iterator[str]:
    if not config.model.bf16:
        yield (
            "--fp32 with SGLang on GPUs: its kernels there have no float32, and the engine fails while it starts; give "
            "--bf16, or --device cpu"
        )
    sizes = architecture.kv_lora_rank, architecture.qk_rope_head_dim
    if sizes != LATENT_SIZES:
        yield (
            f"kv_lora_rank {sizes[0]} with qk_rope_head_dim {sizes[1]} ({config.model.hf_checkpoint / 'config.json'}): "
            f"SGLang's attention kernels for GPUs take {LATENT_SIZES[0]} with {LATENT_SIZES[1]} only; use a model of "
            "these sizes, or --device cpu"
        )


def machine_suits_sglang(config: Config, architecture: Architecture) -> Iterator[str]:
    """With --device auto it is known only where the run is to start: see `recipe.plan.preflight`."""
    if config.cluster.device != "auto":
        yield from problems_on_machine(config, architecture, on_gpus=config.cluster.device == "cuda")
