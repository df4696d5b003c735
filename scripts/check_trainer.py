#!/usr/bin/env python3
"""What only a GPU can show of the trainer, on 1 dense and 2 MoE layers at the true widths with a small vocabulary.

- bf16 log-probabilities and gradients stay as near to transformers' in fp32 as transformers' own in bf16 do;
- CPU Adam, whose pipeline needs a GPU, takes the steps of torch's on the GPU, in training with MTP too;
- other means give the same steps: each attention kernel, permutation by gathers, half of the optimizer in host memory,
  packs that share their prompts, a checkpoint written beside training;
- the experts' weight gradients by one kernel are those of a product an expert;
- a pack of 32,768 tokens with the full vocabulary: peak memory of the log-prob pass and its gradient.

    scripts/check_trainer.py [parity] [options] [prompts] [saves] [experts] [waits] [adam] [memory]
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from glm_flash import CONFIG, environment, write_synthetic
from trainer_ranks import CPU_ADAM, RECOMPUTE, alone, plain_config, rank_alone

from recipe.megatron.adam import SLOT_ELEMENTS, MasterAdam
from recipe.megatron.log_probs import VocabularyShard, chunked_log_probs
from recipe.megatron.step import forward_backward
from recipe.megatron.swiglu import swiglu
from recipe.megatron.weights import named_weights
from recipe.messages import Progress, TrainSample
from recipe.smoke.random_model import Load
from recipe.weights.table import placements

VOCABULARY = 8192
TOKENS, SEQUENCES = 2048, 4
MTP = "--mtp-num-layers 1 --enable-mtp-training"


def write_inputs(folder: Path) -> None:
    """The checkpoint that all load."""
    write_synthetic(folder, 2, deviation=0.02, vocab_size=VOCABULARY, eos_token_id=[1], pad_token_id=0)


def samples(one_prompt: bool = False) -> list[TrainSample]:
    """Random sequences in the small vocabulary."""
    pack = Load(TOKENS, SEQUENCES, 1, VOCABULARY).pack(0)
    for sample in pack:
        if one_prompt:
            sample.prompt[:] = pack[0].prompt
    return pack


def of_transformers(folder: Path, dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Response log-probabilities, and the gradients of their weighted sum by name (without routed experts)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).cuda()
    found = []
    for sample in samples():
        ids = torch.from_numpy(sample.tokens).cuda()
        logits = model(input_ids=ids[None]).logits[0, :-1].float()
        chosen = logits.log_softmax(-1).gather(1, ids[1:, None])[-sample.response_length :, 0]
        (-sample.weight * chosen.sum()).backward()
        found.append(chosen.detach().cpu())
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return found, {name: grad for name, grad in gradients.items() if ".mlp.experts." not in name}


def of_ours(folder: Path) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The same of the trainer, in bf16."""
    rank = rank_alone(plain_config(folder, "--loss-type sft --n-samples-per-prompt 1"), load=True)
    by_index = rank.log_probs([samples()]).log_probs
    forward_backward(rank.replicas, [samples()], rank.loss_function)
    table = placements(rank.architecture, with_mtp=False)
    gradients: dict[str, torch.Tensor] = {}
    for name, weight in named_weights(rank.chunks).items():
        if not table[name].is_expert and hasattr(weight, "main_grad"):
            whole = weight.main_grad.view(-1, *table[name].hf_shape).float().cpu()
            gradients |= dict(zip(table[name].hf_names, whole, strict=True))
    return [torch.from_numpy(by_index[number]) for number in range(SEQUENCES)], gradients


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Mean absolute difference."""
    return (torch.cat(found) - torch.cat(expected)).abs().mean().item()


def angle(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest of the parameters' 1 - cosine between gradients."""
    both = ((found[name].flatten().double(), expected[name].flatten().double()) for name in expected)
    return max(1 - (torch.dot(a, b) / (a.norm() * b.norm())).item() for a, b in both if b.norm() > 0)


def three_norms(folder: Path, flags: str, one_prompt: bool = False, together: bool = True) -> list[float]:
    """Gradient norms of three optimizer steps, the samples together in a pack or each in its own."""
    rank = rank_alone(plain_config(folder, f"{MTP} {RECOMPUTE} {flags} --lr 1e-4"), load=True)
    packs = [samples(one_prompt)] if together else [[sample] for sample in samples(one_prompt)]
    return [rank.train_step(packs).metrics["grad_norm"] for _ in range(3)]


def norms_around_a_save(folder: Path, flags: str) -> tuple[list[float], list[float]]:
    """Gradient norms of two steps after a checkpoint was begun, and of the same steps resumed from it."""
    with tempfile.TemporaryDirectory() as name:
        flags = f"{flags} --lr 1e-4 --save {name} --load {name}"
        found = alone(_norms, folder, flags, True)
        return found, alone(_norms, folder, flags, False)


def _norms(folder: Path, flags: str, saves: bool) -> list[float]:
    rank = rank_alone(plain_config(folder, flags), load=True)
    if saves:
        rank.train_step([samples()])
        assert rank.config.checkpoint.save is not None
        rank.save(rank.config.checkpoint.save, Progress(rollouts=1, optimizer_steps=1))
    norms = [rank.train_step([samples()]).metrics["grad_norm"] for _ in range(2)]
    rank.close()
    return norms


def expert_gradient_distance() -> tuple[float, float]:
    """The kernel's gradients of 64 experts beside fp64 products, written and added: largest relative difference."""
    from recipe.megatron.grouped_gradient import add_grouped_products

    generator = torch.Generator("cuda").manual_seed(0)
    counts = [0, 1, 63, 64, 65, *torch.randint(0, 900, (58,), generator=torch.Generator().manual_seed(0)).tolist(), 0]
    offsets = torch.tensor(counts).cumsum(0, dtype=torch.int32).cuda()
    grad, rows = (
        torch.randn(sum(counts), width, device="cuda", generator=generator).bfloat16() for width in (3072, 2048)
    )
    total = torch.full((64, 3072, 2048), float("nan"), device="cuda")
    parts = zip(grad.split(counts), rows.split(counts), strict=True)
    exact = torch.stack([left.double().t() @ right.double() for left, right in parts])
    found = []
    for times in (1, 2):
        add_grouped_products(total, grad, rows, offsets, overwrite=times == 1)
        found.append(((total - times * exact).norm() / (times * exact).norm()).item())
    return found[0], found[1]


def swiglu_distance() -> float:
    """SwiGLU of bf16 rows and its gradients, weighted and not, beside fp64: largest relative difference."""
    generator = torch.Generator("cuda").manual_seed(0)
    found = []
    for rows, width, weighted in ((1001, 1536, True), (1001, 1536, False), (77, 10240, False)):
        gate_up, grad = (
            torch.randn(rows, size, device="cuda", generator=generator).bfloat16() for size in (2 * width, width)
        )
        inputs = [gate_up.requires_grad_()]
        if weighted:
            inputs.append(torch.rand(rows, device="cuda", generator=generator).requires_grad_())
        output = swiglu(*inputs)
        exact_inputs = [one.detach().double().requires_grad_() for one in inputs]
        gate, up = exact_inputs[0].chunk(2, dim=-1)
        exact = torch.nn.functional.silu(gate) * up * (exact_inputs[1][:, None] if weighted else 1)
        pairs = [
            (output, exact),
            *zip(
                torch.autograd.grad(output, inputs, grad),
                torch.autograd.grad(exact, exact_inputs, grad.double()),
                strict=True,
            ),
        ]
        found += [((one - right).norm() / right.norm()).item() for one, right in pairs]
    return max(found)


def adam_distance(offloaded: float) -> tuple[float, float]:
    """Our Adam, this share of it in host memory, beside torch's on the GPU, given the same gradients after clipping:
    largest difference of the fp32 masters after five steps of 1e-3, and the share of bf16 weights that differ."""
    generator = torch.Generator("cuda").manual_seed(0)
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}
    sizes = (1, SLOT_ELEMENTS - 1, 2 * SLOT_ELEMENTS + 12345)
    weights = [torch.randn(size, device="cuda", generator=generator).bfloat16() for size in sizes]
    ours = [torch.nn.Parameter(weight.clone()) for weight in weights]
    exact = [torch.nn.Parameter(weight.float()) for weight in weights]
    optimizer, reference = MasterAdam(ours, **settings), torch.optim.AdamW(exact, fused=True, **settings)
    optimizer.offload(offloaded)
    optimizer.allocate()
    optimizer.begin()
    for _ in range(5):
        for mine, theirs in zip(ours, exact, strict=True):
            theirs.grad = torch.randn(theirs.shape, device="cuda", generator=generator)
            mine.decoupled_grad = 2 * theirs.grad  # type: ignore[attr-defined]
        for group in optimizer.param_groups:
            group["clip"] = 0.5
        optimizer.step()
        reference.step()
    pairs = list(zip(ours, exact, strict=True))
    far = max((optimizer.state[a]["master_param"].cuda() - b).abs().max().item() for a, b in pairs)
    differ = sum((a != b.bfloat16()).sum().item() for a, b in pairs) / sum(sizes)
    return far, differ


def log_prob_memory(tokens: int) -> tuple[float, float]:
    """Peak GiB of the pass over `tokens` tokens with the full vocabulary besides its inputs, and what one fp32 tensor
    of all logits would take."""
    import torch.distributed as dist

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    hidden = torch.randn(tokens, CONFIG["hidden_size"], device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(CONFIG["vocab_size"], CONFIG["hidden_size"], device="cuda", dtype=torch.bfloat16)
    weight = weight.mul_(0.02).requires_grad_()
    targets = torch.randint(0, CONFIG["vocab_size"], (tokens,), device="cuda")
    before = torch.cuda.memory_allocated()
    assert dist.group.WORLD is not None
    shard = VocabularyShard(dist.group.WORLD, 0)
    log_probs, entropy = chunked_log_probs(hidden, weight, targets, temperature=1.0, shard=shard, chunk_size=8192)
    (log_probs.sum() + 0.0 * entropy.sum()).backward()
    return (torch.cuda.max_memory_allocated() - before) / 2**30, tokens * CONFIG["vocab_size"] * 4 / 2**30


def show_environment() -> None:
    print(environment(), flush=True)


def check_parity(folder: Path) -> Iterator[tuple[str, bool]]:
    exact, exact_gradients = alone(of_transformers, folder, torch.float32)
    theirs, their_gradients = alone(of_transformers, folder, torch.bfloat16)
    ours, our_gradients = alone(of_ours, folder)
    near, reference = distance(ours, exact), distance(theirs, exact)
    yield f"log-probs: ours {near:.5f} from fp32 on average, transformers' bf16 {reference:.5f}", near < 1.3 * reference
    near, reference = angle(our_gradients, exact_gradients), angle(their_gradients, exact_gradients)
    yield f"gradients: 1 - cosine at most {near:.5f}, transformers' bf16 {reference:.5f}", near < 1.5 * reference


def check_adam(folder: Path) -> Iterator[tuple[str, bool]]:
    for offloaded in (0.0, 0.5, 1.0):
        far, differ = alone(adam_distance, offloaded)
        told = f"masters {far:.1e} from torch's after five steps of 1e-3, {differ:.1e} of bf16 weights differ"
        yield f"Adam, {offloaded:.0%} in host memory: {told}", far < 3e-6 and differ < 1e-4
    norms, host_norms = (alone(three_norms, folder, flags) for flags in ("", CPU_ADAM))
    far = drift(host_norms, norms)
    yield f"training with it: gradient norms {norms} and {host_norms}, {far:.1e} apart", far < 1e-2


def drift(found: list[float], expected: list[float]) -> float:
    """Largest relative difference."""
    return max(abs(a - b) / b for a, b in zip(found, expected, strict=True))


def check_options(folder: Path) -> Iterator[tuple[str, bool]]:
    base = alone(three_norms, folder, "--attention-backend flash")
    options = {
        "cuDNN's attention": "--attention-backend fused",
        "attention by matrix products": "--attention-backend unfused",
        "permutation by gathers": "--moe-permute-fusion",
        "half of the optimizer in host memory": f"{CPU_ADAM} --optimizer-offload-fraction 0.5",
        "small chunks of logits": "--log-probs-chunk-size 300",
    }
    for name, flags in options.items():
        far = drift(alone(three_norms, folder, flags), base)
        yield f"{name}: gradient norms of three steps {far:.1e} apart", far < 1e-2


def check_prompts(folder: Path) -> Iterator[tuple[str, bool]]:
    for backend in ("flash", "fused"):
        flags = f"--attention-backend {backend}"
        together, separate = (alone(three_norms, folder, flags, True, one_pack) for one_pack in (True, False))
        far = drift(together, separate)
        yield f"{backend} attention, packs that share a prompt: {far:.1e} from samples apart", far < 1e-2


def check_saves(folder: Path) -> Iterator[tuple[str, bool]]:
    for flags in ("--async-save", f"--async-save {CPU_ADAM}"):
        found, resumed = norms_around_a_save(folder, f"--moe-permute-fusion {flags}")
        far = drift(resumed, found)
        yield f"{flags}: resumed from a checkpoint written beside training, {far:.1e} apart", far < 1e-3


def waits(folder: Path) -> list[str]:
    """Where a forward and backward pass, warmed up, makes the process wait for the GPU, as torch can tell."""
    rank = rank_alone(plain_config(folder, "--moe-permute-fusion"), load=True)
    for _ in range(2):
        forward_backward(rank.replicas, [samples()], rank.loss_function)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        forward_backward(rank.replicas, [samples()], rank.loss_function)
        torch.cuda.set_sync_debug_mode("default")
    return [f"{one.filename}:{one.lineno}" for one in caught if "called a synchronizing" in str(one.message)]


def check_waits(folder: Path) -> Iterator[tuple[str, bool]]:
    found = alone(waits, folder)
    yield f"a forward and backward pass waits for the GPU {len(found)} times {sorted(set(found))}", not found


def check_experts(_: Path) -> Iterator[tuple[str, bool]]:
    written, added = alone(expert_gradient_distance)
    yield f"experts' weight gradients: {written:.1e} from fp64 written, {added:.1e} added", max(written, added) < 1e-5
    far = alone(swiglu_distance)
    yield f"SwiGLU and its gradients: {far:.1e} from fp64", far < 3e-3


def check_memory(_: Path) -> Iterator[tuple[str, bool]]:
    peak, whole = alone(log_prob_memory, 32768)
    yield (
        f"32,768 tokens, whole vocabulary: peak {peak:.2f} GiB, {whole:.1f} for the logits alone in fp32",
        peak < whole / 4,
    )


CHECKS = {
    "parity": check_parity,
    "options": check_options,
    "prompts": check_prompts,
    "saves": check_saves,
    "experts": check_experts,
    "waits": check_waits,
    "adam": check_adam,
    "memory": check_memory,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", choices=CHECKS, default=list(CHECKS))
    checks = parser.parse_args().checks
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "hf"
        alone(show_environment)
        alone(write_inputs, folder)
        for check in checks:
            for told, holds in CHECKS[check](folder):
                failures += not holds
                print(f"{'ok  ' if holds else 'FAIL'} {told}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main())
