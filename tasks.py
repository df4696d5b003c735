"""invoke tasks: each prints the command that it runs, and with --dry-run only prints it.

Those that need GPUs run in the image; inside the image they run directly.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from invoke import Context, Exit, task

from recipe.container.build import DEFAULT_LOCK, IMAGE, Build, build_image
from recipe.container.provenance import inside_image
from recipe.container.run import ContainerRun, run_in_image
from recipe.plan.machine import read_gpus
from recipe.system.errors import USER_ERROR_STATUS, UserError

COMMON = {"dry_run": "print the command and stop", "args": "further arguments, passed on as they are"}
IN_IMAGE = {
    "image": "name of the image, where it runs in one",
    "base_dir": "folder of model and data",
    "work_dir": "gets the folders runs/ and build/",
    **COMMON,
}
RECIPE = "glm4.7-flash-8gpu"
BASE_DIR = "data"
LAUNCH_ONE_NODE, LAUNCH_NODES = "scripts/run-glm4.7-30B-A3B-8gpus.sh", "scripts/run-glm4.7-30B-A3B.sh"


def run(command: list[str], args: str, dry_run: bool) -> None:
    """Prints the command and carries it out, and ends with its exit status if it fails."""
    command += shlex.split(args)
    print("+", shlex.join(command), flush=True)
    if not dry_run and (status := subprocess.run(command, check=False).returncode):
        raise Exit(code=status if status > 0 else 128 - status)


def run_with_gpus(
    command: list[str],
    args: str,
    dry_run: bool,
    image: str,
    base_dir: str,
    work_dir: str,
    several_nodes: bool = False,
) -> None:
    """`run`, in the image on this machine's GPUs, or right here if this is the image."""
    os.environ["BASE_DIR"] = base_dir
    if inside_image():
        run(command, args, dry_run)
        return
    command += shlex.split(args)
    container = ContainerRun(command, image, True, Path(base_dir), Path(work_dir), several_nodes)
    run_container(container, dry_run)


def run_container(container: ContainerRun, dry_run: bool) -> None:
    """Prints a container's command line and runs it, and ends with its exit status if it fails."""
    print("+", container.command_line(), flush=True)
    if not dry_run:
        with telling_mistakes():
            status = run_in_image(container)
        if status:
            raise Exit(code=status)


@contextmanager
def telling_mistakes() -> Iterator[None]:
    """A user's mistake ends with its sentence and no traceback."""
    try:
        yield
    except UserError as error:
        raise Exit(f"error: {error}", code=USER_ERROR_STATUS) from None


def module(name: str, processes: int = 1) -> list[str]:
    """How a module of the recipe is started, in so many processes."""
    if processes == 1:
        return [sys.executable, "-m", name]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc-per-node={processes}", "-m", name]


def all_cores() -> int:
    """Processes that share a copy of many gigabytes."""
    return min(8, len(os.sched_getaffinity(0)))


@task(
    help={
        "tag": "name of the image",
        "base_image": "instead of the one that the Dockerfile names by digest",
        "lock": "the packages, with hashes",
        "dry_run": COMMON["dry_run"],
    }
)
def image(
    _: Context, tag: str = IMAGE, base_image: str = "", lock: str = str(DEFAULT_LOCK), dry_run: bool = False
) -> None:
    """Build the image, with everything from the lock (about 7 minutes and 25 GB of disk)."""
    build = Build(tag, base_image, Path(lock))
    print("+", shlex.join(build.command()), flush=True)
    if not dry_run:
        with telling_mistakes():
            print("built", tag, build_image(build))


@task(
    help={
        "command": "to run instead of a shell",
        "gpus": "--no-gpus leaves them out",
        "several_nodes": "use this machine's network, so that other machines reach it",
        **{name: IN_IMAGE[name] for name in ("image", "base_dir", "work_dir", "dry_run")},
    }
)
def shell(
    _: Context,
    command: str = "",
    image: str = IMAGE,
    base_dir: str = BASE_DIR,
    work_dir: str = ".",
    gpus: bool = True,
    several_nodes: bool = False,
    dry_run: bool = False,
) -> None:
    """Open a shell in the image, or run one command in it."""
    container = ContainerRun(shlex.split(command), image, gpus, Path(base_dir), Path(work_dir), several_nodes)
    run_container(container, dry_run)


@task(help=IN_IMAGE)
def train_8gpu(
    _: Context,
    image: str = IMAGE,
    base_dir: str = BASE_DIR,
    work_dir: str = ".",
    args: str = "",
    dry_run: bool = False,
) -> None:
    """Train on one node of 8 GPUs."""
    run_with_gpus([LAUNCH_ONE_NODE], args, dry_run, image, base_dir, work_dir)


@task(help=IN_IMAGE)
def train_8gpu_mtp(
    _: Context,
    image: str = IMAGE,
    base_dir: str = BASE_DIR,
    work_dir: str = ".",
    args: str = "",
    dry_run: bool = False,
) -> None:
    """Train on one node of 8 GPUs, the MTP layer too, and draft with it."""
    run_with_gpus([LAUNCH_ONE_NODE, "--recipe", "glm4.7-flash-8gpu-mtp"], args, dry_run, image, base_dir, work_dir)


@task(help=IN_IMAGE)
def train_16gpu(
    _: Context,
    image: str = IMAGE,
    base_dir: str = BASE_DIR,
    work_dir: str = ".",
    args: str = "",
    dry_run: bool = False,
) -> None:
    """Train on two nodes of 8 GPUs; MASTER_ADDR names this one, the other has joined by `invoke join`."""
    run_with_gpus(
        [LAUNCH_NODES, "--recipe", "glm4.7-flash-16gpu"], args, dry_run, image, base_dir, work_dir, several_nodes=True
    )


@task(help=IN_IMAGE)
def train_24gpu(
    _: Context,
    image: str = IMAGE,
    base_dir: str = BASE_DIR,
    work_dir: str = ".",
    args: str = "",
    dry_run: bool = False,
) -> None:
    """Train on three nodes of 8 GPUs; MASTER_ADDR names this one, the others have joined by `invoke join`."""
    run_with_gpus(
        [LAUNCH_NODES, "--recipe", "glm4.7-flash-24gpu"], args, dry_run, image, base_dir, work_dir, several_nodes=True
    )


@task(help=IN_IMAGE)
def join(
    _: Context,
    image: str = IMAGE,
    base_dir: str = BASE_DIR,
    work_dir: str = ".",
    args: str = "",
    dry_run: bool = False,
) -> None:
    """Join the run whose first node is MASTER_ADDR; BASE_DIR is the storage that all nodes share."""
    command = ["python", "-m", "recipe.cluster.join"]
    run_with_gpus(command, args, dry_run, image, base_dir, work_dir, several_nodes=True)


@task(help=IN_IMAGE)
def bench(
    _: Context,
    image: str = IMAGE,
    base_dir: str = BASE_DIR,
    work_dir: str = ".",
    args: str = "",
    dry_run: bool = False,
) -> None:
    """Measure the trainer on one GPU beside transformers."""
    run_with_gpus(["python", "scripts/bench_trainer.py"], args, dry_run, image, base_dir, work_dir)


@task(
    help={
        "num_gpus": "1, 2, 4 or 8 (default: all)",
        "device": "cpu: leave GPUs alone",
        "engine": "where a CPU generates: embedded or sglang; GPUs always do it with SGLang",
        "price": "dollars a GPU and hour",
        "name": "of its directory in runs/",
        **IN_IMAGE,
    }
)
def smoke(
    _: Context,
    num_gpus: int = 0,
    device: str = "auto",
    engine: str = "embedded",
    price: float = 2.5,
    name: str = "smoke",
    image: str = IMAGE,
    base_dir: str = BASE_DIR,
    work_dir: str = ".",
    args: str = "",
    dry_run: bool = False,
) -> None:
    """Say whether this node is good, in minutes; in the image where there are GPUs, else with what a CPU can."""
    flags = ["--device", device, "--engine", engine, "--price", f"{price:g}", "--name", name]
    flags += ["--num-gpus", str(num_gpus)] * bool(num_gpus)
    if device == "cpu" or not read_gpus():
        run([*module("recipe.smoke"), *flags], args, dry_run)
    else:
        run_with_gpus(["python", "-m", "recipe.smoke", *flags], args, dry_run, image, base_dir, work_dir)


@task(help={"name": "of the run", **COMMON})
def report(_: Context, name: str = "tiny", args: str = "", dry_run: bool = False) -> None:
    """Show what a run achieved, and where its time went."""
    run([*module("recipe.run.report"), f"runs/{name}"], args, dry_run)


@task(name="test", help=COMMON)
def run_tests(_: Context, args: str = "", dry_run: bool = False) -> None:
    """Run the tests."""
    run(module("pytest"), args, dry_run)


@task(help={"dry_run": COMMON["dry_run"]})
def lint(_: Context, dry_run: bool = False) -> None:
    """ruff, mypy, shellcheck and hadolint."""
    run(["make", "lint"], "", dry_run)


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
    run([*module("recipe.conversion.convert"), *flags, "--check"], args, dry_run)
    run([*module("recipe.conversion.convert", processes or all_cores()), *flags], args, dry_run)


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
    command = module("recipe.conversion.export", processes or all_cores())
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


@task(
    help={
        "recipe": f"to plan (default: {RECIPE})",
        "gpu": "H100-80GB, H200-141GB, A100-80GB, A100-40GB, or one with other memory in GiB: H100=94",
        "host_memory": "of a machine",
        "price": "dollars a GPU and hour",
        "json": "JSON instead of a page",
        **COMMON,
    }
)
def plan(
    _: Context,
    recipe: str = RECIPE,
    gpu: str = "H100-80GB",
    host_memory: str = "1TB",
    price: float = 2.5,
    json: bool = False,
    args: str = "",
    dry_run: bool = False,
) -> None:
    """Say what a run takes, before anything is launched: memory, disk, time and money."""
    machine = ["--gpu", gpu, "--host-memory", host_memory, "--price", f"{price:g}"]
    run([*module("recipe.plan"), "--recipe", recipe, *machine, *["--json"] * json], args, dry_run)
