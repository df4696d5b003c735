#!/usr/bin/env python3
"""Real SGLang on one GPU through this project's rollout code: how fast it starts, generates, gives its memory back and
takes new weights, at the true size with random weights; on a machine without a GPU, the tiny model.

    scripts/bench_rollout.py [--parts speed,memory,...] [--layers 47] [--seconds 600] [--results DIR]

speed   start-up; tokens/s at 1, 32, 128 and 256 requests at once, ours beside `sglang.bench_serving` on the same server
memory  release and resume by tag: seconds, and the GPU's memory before and after
sync    all layers from a process on the same GPU, which holds them a second time: seconds and GB/s
equal   after an update, log-probabilities and acceptance equal those of an engine that was started with these weights
eagle   as speed, with EAGLE by the MTP layer at a given acceptance length
routing tokens/s of ours without and with the experts that the engine took (--use-rollout-routing-replay)

Every part has its limit of time, and its figures are printed and written (DIR/results.jsonl) as soon as they are known.
"""

import argparse
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from engine_bench import FIRST, START_LIMIT_S, Bench, difference, ours, probe, prompts_of, release, resume, theirs

from recipe.config.sglang_rules import find_sglang_python
from recipe.sampling.http import ask_blocking
from recipe.sampling.routing import RouterShape
from recipe.smoke.decode import write_draft
from recipe.system.errors import UserError, run_main

LIMITS = {"speed": 330.0, "memory": 60.0, "sync": 150.0, "equal": 100.0, "eagle": 330.0, "routing": 330.0}
"""Seconds of each part at most, besides the start of its engines; less where less is left of --seconds."""
IN_TEN_MINUTES = [part for part in LIMITS if part != "routing"]
EAGLE = (
    *("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "2"),
    *("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "3"),
)
TOLERANCE = 0.02
"""Nats between the log-probabilities of two engines with equal weights."""


def compare_speed(bench: Bench, part: str, url: str, folder: Path, vocabulary: int) -> None:
    """Ours and theirs at every load."""
    ours(bench, url, vocabulary, 8, 16)  # whatever is compiled at first use
    for at_once in bench.at_once:
        count = max(2, 2 * at_once)
        mine = ours(bench, url, vocabulary, at_once, count)
        bench.tell(part, f"{at_once} at once, ours", tokens_per_s=mine)
        other = theirs(bench, url, folder, at_once, count, log_probs=True)
        bench.tell(part, f"{at_once} at once, bench_serving", tokens_per_s=other, ours_over_theirs=mine / other)
    most = max(bench.at_once)
    if most >= 16:
        grouped = ours(bench, url, vocabulary, most, 2 * most, n_samples=8)
        bench.tell(part, f"{most} at once, ours, groups of 8", tokens_per_s=grouped)
    plain = theirs(bench, url, folder, most, 2 * most, log_probs=False)
    again = ours(bench, url, vocabulary, most, 2 * most)
    bench.tell(
        part, f"{most} at once, theirs without log-probs, ours again", theirs=plain, ours=again, ratio=again / plain
    )


def full_size_arguments(bench: Bench) -> list[str]:
    """Of an engine with random weights."""
    if not bench.on_gpu:
        return ["--load-format", "dummy"]
    most = max(bench.at_once)
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512) if size < most] + [most]
    return [
        *("--load-format", "dummy", "--mem-fraction-static", str(bench.memory_fraction)),
        *("--max-running-requests", str(most), "--cuda-graph-bs-decode", *map(str, sizes)),
    ]


def run_main_engine(bench: Bench, parts: Sequence[str], limited: Callable[..., Bench]) -> None:
    """speed, memory and sync, on one engine."""
    folder, architecture = bench.model("model", bench.layers)
    vocabulary = architecture.vocab_size
    first = limited(parts[0], starts=1)
    with first.started(parts[0], "engine", folder, *full_size_arguments(first)) as engine:
        work: dict[str, Callable[[Bench], None]] = {
            "speed": lambda part: compare_speed(part, "speed", engine.url, folder, vocabulary),
            "memory": lambda part: measure_memory(part, engine.url),
            "sync": lambda part: measure_sync(part, engine.url, folder, vocabulary),
        }
        for part in parts:
            attempt(part, lambda part=part: work[part](first if part == parts[0] else limited(part)))  # type: ignore[misc]


def measure_memory(bench: Bench, url: str) -> None:
    """Each tag by itself, then all."""
    for tags in (("kv_cache",), ("weights",), ("kv_cache", "weights", "cuda_graph")):
        before = bench.gpu_gib()
        gone = release(bench, url, *tags)
        between = bench.gpu_gib()
        back = resume(bench, url, *tags)
        bench.tell(
            "memory",
            " ".join(tags),
            release_s=gone,
            resume_s=back,
            gib_before=before,
            gib_released=between,
            gib_after=bench.gpu_gib(),
        )


def measure_sync(bench: Bench, url: str, folder: Path, vocabulary: int) -> None:
    """As in colocated training: the engine gives back all, the trainer holds its model, the engine takes the memory of
    its weights again and gets new ones, then, when the trainer is gone, that of its cache."""
    probes = {}
    for round_, seeds in enumerate(((1,), (2, 1))):
        release(bench, url, "kv_cache", "weights")
        with bench.trainer(folder) as trainer:
            for seed in seeds:
                size = trainer.draw(seed, bench.left)
                if seed == seeds[0]:
                    holding = bench.gpu_gib()
                    resume(bench, url, "weights")
                seconds = trainer.send(url, f"{round_}{seed}", bench.left)
                bench.tell(
                    "sync",
                    f"{size / 1e9:.1f} GB, seed {seed}",
                    seconds=seconds,
                    gb_per_s=size / 1e9 / seconds,
                    gib_trainer_alone=holding,
                    gib_both=bench.gpu_gib(),
                )
        resume(bench, url, "kv_cache")
        probes[round_] = probe(bench, url, vocabulary, f"{round_}1")
    bench.tell("sync", "same weights after others between", **difference(probes[0], probes[1]))


def measure_equal(bench: Bench) -> None:
    """An engine that had other weights, and generated with them, beside one that was started with the new ones."""
    old, architecture = bench.model("old", bench.equal_layers)
    new, _ = bench.model("new", bench.equal_layers)
    vocabulary = architecture.vocab_size
    with bench.trainer(old) as trainer, ExitStack() as stack:
        arguments = ["--mem-fraction-static", "0.25", "--disable-shared-experts-fusion"] if bench.on_gpu else []
        arguments += [*EAGLE, "--cuda-graph-bs-decode", "1", "8"] if bench.on_gpu else []
        engines = {}
        for seed, folder in enumerate((old, new)):
            trainer.draw(seed, bench.left)
            trainer.write(folder, bench.left)
            engines[folder] = stack.enter_context(bench.started("equal", folder.name, folder, *arguments))
        before = probe(bench, engines[old].url, vocabulary, FIRST)
        fresh = probe(bench, engines[new].url, vocabulary, FIRST)
        bench.tell("equal", "other weights", **difference(before, fresh))
        trainer.send(engines[old].url, "1", bench.left)
        found = difference(probe(bench, engines[old].url, vocabulary, "1"), fresh)
        bench.tell("equal", "after the update", **found, ok=found["max_gap"] <= TOLERANCE)
        if bench.on_gpu:
            lengths = {folder.name: accept_length(bench, engine.url, vocabulary) for folder, engine in engines.items()}
            bench.tell("equal", "acceptance length", **lengths)
            release(bench, engines[old].url, "kv_cache", "weights")
            resume(bench, engines[old].url, "weights")
            trainer.send(engines[old].url, "2", bench.left)
            resume(bench, engines[old].url, "kv_cache")
            found = difference(probe(bench, engines[old].url, vocabulary, "2"), fresh)
            length = accept_length(bench, engines[old].url, vocabulary)
            bench.tell("equal", "after release, resume and update", **found, accept_length=length)
        seconds = trainer.send(engines[old].url, "3", bench.left, check=True)
        bench.tell("equal", "checksums of all tensors are equal", seconds=seconds)


def accept_length(bench: Bench, url: str, vocabulary: int) -> float:
    """Tokens a step of the large model, greedily."""

    body = {
        "input_ids": [list(prompt.ids) for prompt in prompts_of(8, 16, vocabulary, seed=2)],
        "sampling_params": {"temperature": 0, "max_new_tokens": 64, "ignore_eos": True},
    }
    answers = ask_blocking("POST", f"{url}/generate", body, timeout_s=bench.left)
    return float(np.mean([answer["meta_info"]["spec_accept_length"] for answer in answers]))


def measure_eagle(bench: Bench) -> None:
    """Throughput with drafts by the MTP layer, of which a given number is accepted whatever it says."""
    if not bench.on_gpu:
        bench.tell("eagle", "left out", reason="SGLang speculates on GPUs only")
        return
    folder, architecture = bench.model("model", bench.layers)
    # The loader of random weights cannot make the MTP layer (0.5.17: Glm4MoeLiteModelNextN has no start_layer).
    write_draft(draft := bench.folder / "draft", folder, architecture)
    arguments = ["--speculative-draft-model-path", str(draft), "--speculative-draft-load-format", "auto"]
    environment = {
        "SGLANG_SIMULATE_ACC_LEN": str(bench.accept_length),
        "SGLANG_SIMULATE_ACC_TOKEN_MODE": "real-draft-token",
    }
    arguments += [*full_size_arguments(bench), *EAGLE]
    with bench.started("eagle", "eagle", folder, *arguments, environment=environment) as engine:
        compare_speed(bench, "eagle", engine.url, folder, architecture.vocab_size)


def measure_routing(bench: Bench) -> None:
    """Every load on an engine that keeps nothing, and on one that tells where it took each token: one wave of answers
    that end together, then three times as many of different lengths, as in a run."""
    folder, architecture = bench.model("model", bench.layers)
    vocabulary, shape = architecture.vocab_size, RouterShape.of(architecture)
    plain: dict[tuple[int, int], float] = {}
    for name, further, routers in (("plain", (), None), ("routed", ("--enable-return-routed-experts",), shape)):
        with bench.started("routing", name, folder, *full_size_arguments(bench), *further) as engine:
            ours(bench, engine.url, vocabulary, 8, 16, routers=routers)
            for at_once, waves in product(bench.at_once, (1, 3)):
                count, spread = waves * at_once, waves > 1
                speed = ours(bench, engine.url, vocabulary, at_once, count, routers=routers, spread=spread)
                beside = {"of_plain": speed / plain[at_once, waves]} if routers else {}
                plain.setdefault((at_once, waves), speed)
                lengths = "lengths differ" if spread else "one wave"
                bench.tell("routing", f"{at_once} at once, {lengths}, {name}", tokens_per_s=speed, **beside)


def attempt(part: str, work: Callable[[], None]) -> bool:
    """Carries out a part; what it fails with is printed, and the others go on. Whether it came to its end."""
    try:
        work()
    except (UserError, RuntimeError, TimeoutError, subprocess.SubprocessError, OSError, AssertionError) as error:
        print(f"{part:7} FAILED: {type(error).__name__}: {str(error)[:3000]}", flush=True)
        return False
    return True


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(IN_TEN_MINUTES), help=f"of {', '.join(LIMITS)}, in this order")
    parser.add_argument("--layers", type=int, help="of the model (default: all)")
    parser.add_argument("--equal-layers", type=int, default=4, help="of the two engines that are compared")
    parser.add_argument("--at-once", default="1,32,128,256", help="requests under way")
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--memory-fraction", type=float, default=0.62, help="SGLang's --mem-fraction-static")
    parser.add_argument(
        "--accept-length", type=float, default=2.4, help="of EAGLE's drafts, with the token that follows"
    )
    parser.add_argument("--bucket-mib", type=int, default=1024, help="of weights on their way at once")
    parser.add_argument("--seconds", type=float, default=600, help="for everything")
    parser.add_argument(
        "--results", type=Path, default=Path("build/bench-rollout"), help="directory of figures and logs"
    )
    parser.add_argument("--engine-args", default="", help="further arguments of SGLang")
    parser.add_argument("--engine-python", type=Path, help="where SGLang is installed")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    parts = [part for part in LIMITS if part in options.parts.split(",")]
    if not parts:
        raise UserError(f"--parts {options.parts} names none of {', '.join(LIMITS)}")
    python = find_sglang_python(options.engine_python)
    if python is None:
        raise UserError("SGLang is not installed: name its interpreter with --engine-python, or `make install-sglang`")
    options.results.mkdir(parents=True, exist_ok=True)
    ending = time.monotonic() + options.seconds
    done = []
    with tempfile.TemporaryDirectory(prefix="bench-rollout-") as name:
        bench = Bench(
            folder=Path(name),
            results=options.results.resolve(),
            layers=options.layers,
            equal_layers=options.equal_layers,
            on_gpu=torch.cuda.is_available(),
            python=python,
            input_len=options.input_len,
            output_len=options.output_len,
            at_once=tuple(int(word) for word in options.at_once.split(",")),
            memory_fraction=options.memory_fraction,
            accept_length=options.accept_length,
            bucket_bytes=options.bucket_mib << 20,
            engine_args=tuple(options.engine_args.split()),
        )

        def limited(part: str, starts: int = 0) -> Bench:
            limit = LIMITS[part] + starts * START_LIMIT_S
            return replace(bench, deadline=min(ending, time.monotonic() + limit))

        on_main = [part for part in parts if part in ("speed", "memory", "sync")]
        if on_main:
            done.append(attempt(on_main[0], lambda: run_main_engine(bench, on_main, limited)))
        if "equal" in parts:
            done.append(attempt("equal", lambda: measure_equal(limited("equal", starts=2))))
        if "eagle" in parts:
            done.append(attempt("eagle", lambda: measure_eagle(limited("eagle", starts=1))))
        if "routing" in parts:
            done.append(attempt("routing", lambda: measure_routing(limited("routing", starts=2))))
    return 0 if all(done) else 1


if __name__ == "__main__":
    run_main(main)
