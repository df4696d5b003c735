"""invoke tasks: each prints the command that it runs, and with --dry-run only prints it."""

import os
import shlex
import subprocess
import sys

from invoke import Context, Exit, task

COMMON = {"dry_run": "print the command and stop", "args": "further arguments, passed on as they are"}
RECIPE = "glm4.7-flash-8gpu"


def run(command: list[str], args: str, dry_run: bool) -> None:
    """Prints the command and carries it out, and ends with its exit status if it fails."""
    command += shlex.split(args)
    print("+", shlex.join(command), flush=True)
    if not dry_run and (status := subprocess.run(command, check=False).returncode):
        raise Exit(code=status if status > 0 else 128 - status)


def module(name: str, processes: int = 1) -> list[str]:
    """How a module of the recipe is started, in so many processes."""
    if processes == 1:
        return [sys.executable, "-m", name]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc-per-node={processes}", "-m", name]


def all_cores() -> int:
    """Processes that share a copy of many gigabytes."""
    return min(8, len(os.sched_getaffinity(0)))


@task(help={"base_dir": "gets GLM-4.7-Flash/, dapo-math-17k/ and aime-2024/", **COMMON})
def download(_: Context, base_dir: str = "data", args: str = "", dry_run: bool = False) -> None:
    """Download the model and the data sets, pinned and verified (about 60 GB)."""
    run([*module("recipe.download"), "all", "--base-dir", base_dir], args + " --dry-run" * dry_run, dry_run=False)


@task(
    help={
        "recipe": f"whose model flags are used (default: {RECIPE}); with its mtp_num_layers the MTP layer goes along",
        "hf_checkpoint": "directory of the Hugging Face checkpoint",
        "save": "directory to write",
        "processes": "that share the work (default: the cores, at most 8)",
        "verify": "read back and compare every tensor bit for bit",
        **COMMON,
    }
)
def convert(
    _: Context,
    hf_checkpoint: str,
    save: str,
    recipe: str = RECIPE,
    processes: int = 0,
    verify: bool = False,
    args: str = "",
    dry_run: bool = False,
) -> None:
    """Convert a Hugging Face checkpoint into torch_dist, which training starts from under any layout."""
    flags = ["--recipe", recipe, "--hf-checkpoint", hf_checkpoint, "--save", save, *["--verify"] * verify]
    run([*module("recipe.weights.convert"), *flags, "--check"], args, dry_run)
    run([*module("recipe.weights.convert", processes or all_cores()), *flags], args, dry_run)


@task(
    help={
        "load": "torch_dist directory, or training checkpoints, of which the newest is taken",
        "hf_checkpoint": "the checkpoint that training started from",
        "save": "directory to write",
        "processes": "that share the work (default: the cores, at most 8)",
        "verify": "read back and compare every tensor bit for bit",
        **COMMON,
    }
)
def export(
    _: Context,
    load: str,
    hf_checkpoint: str,
    save: str,
    processes: int = 0,
    verify: bool = False,
    args: str = "",
    dry_run: bool = False,
) -> None:
    """Export a torch_dist checkpoint as a Hugging Face directory for transformers and SGLang."""
    command = module("recipe.weights.export", processes or all_cores())
    command += ["--load", load, "--hf-checkpoint", hf_checkpoint, "--save", save, *["--verify"] * verify]
    run(command, args, dry_run)


@task(
    help={
        "data": "AIME problems, a JSON object a line",
        "model": "Hugging Face directory; an engine is started",
        "checkpoint": "or a torch_dist directory, or training checkpoints, whose newest is taken",
        "url": "or the address of a running server",
        "hf_checkpoint": "configuration and tokenizer, for a --checkpoint of no run and a --url elsewhere",
        "profile": "model-card: sampled as for the model card",
        "save": "directory of the result; an interrupted one goes on",
        **COMMON,
    }
)
def eval(
    _: Context,
    data: str,
    model: str = "",
    checkpoint: str = "",
    url: str = "",
    hf_checkpoint: str = "",
    profile: str = "",
    save: str = "",
    args: str = "",
    dry_run: bool = False,
) -> None:
    """Score a model on AIME, with intervals and a report."""
    given = {
        "--model": model,
        "--checkpoint": checkpoint,
        "--url": url,
        "--hf-checkpoint": hf_checkpoint,
        "--data": data,
        "--profile": profile,
        "--save": save,
    }
    flags = [word for flag, value in given.items() if value for word in (flag, value)]
    run([*module("evaluation.aime"), *flags], args, dry_run)
