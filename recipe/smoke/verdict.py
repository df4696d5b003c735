"""Whether a node is good: the bars, and what a smoke run that stays below them says of the node."""

from collections.abc import Iterator

from recipe.plan.hardware import GB, Gpu
from recipe.plan.node import Rates
from recipe.smoke.measured import Interruption, Learning, Measured
from recipe.system.shutdown import SAVED_STATUS

MATMUL_SHARE = 0.65
"""Least share of the data sheet's bf16 FLOP/s. A sound H200 reached 0.80; one that is capped, hot or shared falls below
this."""
GPU_MEMORY_SHARE = 0.7
"""Least share of the data sheet's bandwidth; a copy usually reaches 0.9 of it."""
BUS_SHARE = 0.5
"""Least share of PCIe's bandwidth, all GPUs at once. GPUs that share a switch or a link of half the
width fall below."""
ALL_REDUCE_SHARE = 0.5
"""Least share of NVLink's bandwidth. NCCL reaches 0.75 and more on it, and a tenth where it goes
by PCIe or the host."""
HOST_GB_PER_GPU = 8.0
"""GB/s of host memory a GPU: below, CPU Adam of the 8-GPU recipe takes 14 s and more, with eight GPUs."""
MOST_BEFORE, LEAST_AFTER = 0.5, 0.9
"""Held-out share of right answers. The warm-up boxes 40% of its answers, so that there is something to learn."""
MOST_LOGPROB_DIFF = 0.03
"""Nats a token. Other systems see 0.01 to 0.03 in bf16; weights that do not arrive, or other kernels, give more."""
LEAST_ACCEPT_LENGTH = 1.3
"""Tokens a verification. Drafts of a layer that knows nothing bring 1.0; those of one that never gets its weights fall
while the policy moves."""
ACCEPT_LENGTH_FALL = 0.1
"""Share that the acceptance length may lose between the first and the last quarter of the steps."""


def reasons(measured: Measured) -> list[str]:
    """Why the node is not good, a clause each; none if it is."""
    found = [*measured.findings, *measured.failures]
    if measured.rates is not None and measured.kind is not None:
        found += _slow(measured.rates, measured.kind, measured.gpus)
    if measured.learning is not None:
        found += _not_learned(measured.learning)
    if measured.interruption is not None:
        found += _not_resumed(measured.interruption)
    if measured.projection is not None:
        found += [f"{measured.projection.recipe} does not fit: {problem}" for problem in measured.projection.problems]
    return found


def _slow(rates: Rates, kind: Gpu, gpus: int) -> Iterator[str]:
    bars = (
        ("bf16 matrix products reach", rates.matmul, kind.flops, MATMUL_SHARE, 1e12, "TFLOP/s"),
        ("GPU memory reaches", rates.gpu_memory, kind.memory_bandwidth, GPU_MEMORY_SHARE, GB, "GB/s"),
        ("copies to and from the host reach", rates.bus, kind.pcie_bandwidth, BUS_SHARE, GB, "GB/s"),
        ("NCCL's all-reduce reaches", rates.all_reduce, kind.link_bandwidth, ALL_REDUCE_SHARE, GB, "GB/s"),
    )
    for what, reached, sheet, share, unit, name in bars:
        if reached is not None and reached < share * sheet:
            yield (
                f"{what} {reached / unit:.0f} {name}, {reached / sheet:.0%} of the data sheet's {sheet / unit:.0f} "
                f"(at least {share:.0%})"
            )
    if rates.host_memory < gpus * HOST_GB_PER_GPU * GB:
        yield (
            f"host memory reaches {rates.host_memory / GB:.0f} GB/s, and CPU Adam of {gpus} GPUs needs "
            f"{gpus * HOST_GB_PER_GPU:.0f}"
        )


def _not_learned(learning: Learning) -> Iterator[str]:
    if learning.before > MOST_BEFORE:
        yield f"the warm-up left nothing to learn: held-out {learning.before:.2f} before GRPO, above {MOST_BEFORE}"
    if learning.after is None:
        yield "GRPO was not scored after its steps"
    elif learning.after < LEAST_AFTER:
        yield (
            f"it did not learn: held-out {learning.before:.2f} before and {learning.after:.2f} after "
            f"{learning.steps} steps, below {LEAST_AFTER}"
        )
    if learning.logprob_diff_mean > MOST_LOGPROB_DIFF:
        yield (
            f"trainer and engine differ by {learning.logprob_diff_mean:.3f} nats a token, more than "
            f"{MOST_LOGPROB_DIFF}: weights that do not arrive, or kernels that do not agree"
        )
    now, first = learning.accept_length, learning.first_accept_length
    if now is not None and now < LEAST_ACCEPT_LENGTH:
        yield f"drafts are hardly accepted: {now:.2f} tokens a verification, below {LEAST_ACCEPT_LENGTH}"
    if now is not None and first is not None and now < (1 - ACCEPT_LENGTH_FALL) * first:
        yield f"drafts are accepted less and less: {first:.2f} tokens a verification at first, {now:.2f} at last"


def _not_resumed(interruption: Interruption) -> Iterator[str]:
    if interruption.status != SAVED_STATUS:
        yield (
            f"the run that got a SIGTERM after step {interruption.step} ended with status {interruption.status}, not "
            f"saved with {SAVED_STATUS}: {interruption.last_words}"
        )
    elif interruption.resumed_status:
        yield f"the resumed run ended with status {interruption.resumed_status}: {interruption.last_words}"
    elif not interruption.goes_on:
        yield f"the resumed run does not go on from step {interruption.step}"
