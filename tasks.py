"""invoke tasks: each prints the command that it runs, and with --dry-run only prints it.

What they run stands in the table of targets. Those that need GPUs run in the image; inside it they run directly.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from invoke import Context, Exit, Task

from recipe.container.build import DEFAULT_LOCK, IMAGE, Build, build_image
from recipe.container.provenance import inside_image
from recipe.container.run import ContainerRun, run_in_image
from recipe.container.targets import TARGETS, Place, Target
from recipe.system.errors import USER_ERROR_STATUS, UserError

COMMON = {"dry_run": "print the command and stop", "args": "further arguments, passed on as they are"}
IN_IMAGE = {
    "image": "name of the image, where it runs in one",
    "base_dir": "folder of model and data",
    "work_dir": "gets the folders runs/ and build/",
    **COMMON,
}
RECIPE = "glm4.7-flash-8gpu"
MEASURED_TUNE = ("python", "-m", "recipe.smoke.measure")
BASE_DIR = "data"


def run(command: Sequence[str], args: str, dry_run: bool) -> None:
    """Prints the command and carries it out, and ends with its exit status if it fails."""
    program, *words = command
    command = [sys.executable if program == "python" else program, *words, *split(args)]
    print("+", shlex.join(command), flush=True)
    if not dry_run and (status := subprocess.run(command, check=False).returncode):
        raise Exit(code=status if status > 0 else 128 - status)


def run_target(
    target: Target, flags: list[str], args: str, dry_run: bool, image: str, base_dir: str, work_dir: str
) -> None:
    """`run`, in the image on this machine's GPUs where that is the target's place and this is not the image."""
    os.environ["BASE_DIR"] = base_dir
    command = [*target.command, *flags]
    if inside_image() or not goes_to_gpus(target.place):
        run(command, args, dry_run)
    else:
        run_container(container_of(target, [*command, *split(args)], image, base_dir, work_dir), dry_run)


def goes_to_gpus(place: Place) -> bool:
    """Whether what runs there runs on this machine's GPUs."""
    if place is not Place.EITHER:
        return place is Place.IMAGE
    from recipe.plan.machine import read_gpus  # takes as long as all other imports, which every task would wait for

    return bool(read_gpus())


def container_of(target: Target, command: list[str], image: str, base_dir: str, work_dir: str) -> ContainerRun:
    """The container that a target runs in. A BASE_DIR that is named must exist, whatever the target needs of it."""
    needs = target.needs or "." * (base_dir != BASE_DIR)
    if "--hf-checkpoint" in command:
        needs = "."
    return ContainerRun(
        command,
        image,
        data=Path(base_dir),
        needs=needs,
        work_dir=Path(work_dir),
        several_nodes=target.several_nodes,
    )


def run_container(container: ContainerRun, dry_run: bool) -> None:
    """Prints a container's command line and runs it, and ends with its exit status if it fails."""
    print("+", container.command_line(), flush=True)
    if not dry_run:
        with telling_mistakes():
            status = run_in_image(container)
        if status:
            raise Exit(code=status)


def split(args: str) -> list[str]:
    """ARGS as words, quoted as for a shell. Ends with a sentence where a quotation is left open."""
    try:
        return shlex.split(args)
    except ValueError as error:
        raise Exit(f"error: ARGS {args!r} cannot be split into words: {error}", code=USER_ERROR_STATUS) from None


@contextmanager
def telling_mistakes() -> Iterator[None]:
    """A user's mistake ends with its sentence and no traceback."""
    try:
        yield
    except UserError as error:
        raise Exit(f"error: {error}", code=USER_ERROR_STATUS) from None


def in_processes(command: Sequence[str], processes: int) -> list[str]:
    """How `python -m MODULE` is started in so many processes."""
    if processes == 1:
        return list(command)
    python, *module = command
    return [python, "-m", "recipe.conversion.torchrun", f"--nproc-per-node={processes}", *module]


def target_task(name: str, flags: dict[str, str]) -> Callable[[Callable[..., None]], Task]:
    """Makes a function the task of a target of the table, with its sentence."""

    def make(body: Callable[..., None]) -> Task:
        body.__doc__ = TARGETS[name].help
        return Task(body, name=name, help=flags)

    return make


def all_cores() -> int:
    """Processes that share a copy of many gigabytes."""
    return min(8, len(os.sched_getaffinity(0)))


@target_task(
    "image",
    {
        "tag": "name of the image",
        "base_image": "instead of the one that the Dockerfile names by digest",
        "lock": "the packages, with hashes",
        "dry_run": COMMON["dry_run"],
    },
)
def image(
    _: Context, tag: str = IMAGE, base_image: str = "", lock: str = str(DEFAULT_LOCK), dry_run: bool = False
) -> None:
    build = Build(tag, base_image, Path(lock))
    print("+", shlex.join(build.command()), flush=True)
    if not dry_run:
        with telling_mistakes():
            print("built", tag, build_image(build))


@target_task(
    "shell",
    {
        "command": "to run instead of a shell",
        "gpus": "--no-gpus leaves them out",
        "several_nodes": "use this machine's network, so that other machines reach it",
        **{name: IN_IMAGE[name] for name in ("image", "base_dir", "work_dir", "dry_run")},
    },
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
    container = container_of(TARGETS["shell"], split(command), image, base_dir, work_dir)
    run_container(replace(container, gpus=gpus, several_nodes=several_nodes), dry_run)


def gpu_task(name: str) -> Task:
    """The task of a target that needs no flags of its own."""

    def body(
        _: Context,
        image: str = IMAGE,
        base_dir: str = BASE_DIR,
        work_dir: str = ".",
        args: str = "",
        dry_run: bool = False,
    ) -> None:
        run_target(TARGETS[name], [], args, dry_run, image, base_dir, work_dir)

    return target_task(name, IN_IMAGE)(body)


train_8gpu, train_8gpu_mtp = gpu_task("train-8gpu"), gpu_task("train-8gpu-mtp")
train_16gpu, train_24gpu, join = gpu_task("train-16gpu"), gpu_task("train-24gpu"), gpu_task("join")
bench = gpu_task("bench")


@target_task(
    "smoke",
    {
        "num_gpus": "1, 2, 4 or 8 (default: all)",
        "device": "cpu: leave GPUs alone",
        "engine": "where a CPU generates: embedded or sglang; GPUs always do it with SGLang",
        "price": "dollars a GPU and hour",
        "name": "of its directory in runs/",
        **IN_IMAGE,
    },
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
    flags = ["--device", device, "--engine", engine, "--price", f"{price:g}", "--name", name]
    flags += ["--num-gpus", str(num_gpus)] * bool(num_gpus)
    target = replace(TARGETS["smoke"], place=Place.HOST) if device == "cpu" else TARGETS["smoke"]
    run_target(target, flags, args, dry_run, image, base_dir, work_dir)


@target_task("watch", {"runs": "the folder of the runs, or one run", "port": "of this machine's own address", **COMMON})
def watch(_: Context, runs: str = "runs", port: int = 8642, args: str = "", dry_run: bool = False) -> None:
    run([*TARGETS["watch"].command, runs, "--port", str(port)], args, dry_run)


@target_task("report", {"name": "of the run", "with_run": "name of a run to compare it with", **COMMON})
def report(_: Context, name: str = "tiny", with_run: str = "", args: str = "", dry_run: bool = False) -> None:
    compared = ["--with", f"runs/{with_run}"] if with_run else []
    run([*TARGETS["report"].command, f"runs/{name}", *compared], args, dry_run)


@target_task("mismatch", {"name": "of the run", "step": "a step that it kept (default: the newest)", **IN_IMAGE})
def mismatch(
    _: Context,
    name: str = "tiny",
    step: int = 0,
    image: str = IMAGE,
    base_dir: str = BASE_DIR,
    work_dir: str = ".",
    args: str = "",
    dry_run: bool = False,
) -> None:
    flags = [f"runs/{name}", *(["--step", str(step)] * bool(step))]
    run_target(TARGETS["mismatch"], flags, args, dry_run, image, base_dir, work_dir)


@target_task("test", COMMON)
def run_tests(_: Context, args: str = "", dry_run: bool = False) -> None:
    run(TARGETS["test"].command, args, dry_run)


@target_task("lint", {"dry_run": COMMON["dry_run"]})
def lint(_: Context, dry_run: bool = False) -> None:
    run(TARGETS["lint"].command, "", dry_run)


@target_task("download", {"base_dir": "gets GLM-4.7-Flash/, dapo-math-17k/ and aime-2024/", **COMMON})
def download(_: Context, base_dir: str = "data", args: str = "", dry_run: bool = False) -> None:
    run([*TARGETS["download"].command, "--base-dir", base_dir], args, dry_run)


@target_task(
    "convert",
    {
        "recipe": f"whose model flags are used (default: {RECIPE}); with its mtp_num_layers the MTP layer goes along",
        "hf_checkpoint": "directory of the Hugging Face checkpoint",
        "save": "directory to write",
        "processes": "that share the work (default: the cores, at most 8)",
        "verify": "read back and compare every tensor bit for bit",
        **COMMON,
    },
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
    flags = ["--recipe", recipe, "--hf-checkpoint", hf_checkpoint, "--save", save, *["--verify"] * verify]
    command = TARGETS["convert"].command
    run([*command, *flags, "--check"], args, dry_run)
    run([*in_processes(command, processes or all_cores()), *flags], args, dry_run)


@target_task(
    "export",
    {
        "load": "torch_dist directory, or training checkpoints, of which the newest is taken",
        "hf_checkpoint": "the checkpoint that training started from",
        "save": "directory to write",
        "processes": "that share the work (default: the cores, at most 8)",
        "verify": "read back and compare every tensor bit for bit",
        **COMMON,
    },
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
    command = in_processes(TARGETS["export"].command, processes or all_cores())
    command += ["--load", load, "--hf-checkpoint", hf_checkpoint, "--save", save, *["--verify"] * verify]
    run(command, args, dry_run)


@target_task(
    "eval",
    {
        "data": "AIME problems, a JSON object a line",
        "model": "Hugging Face directory; an engine is started",
        "checkpoint": "or a torch_dist directory, or training checkpoints, whose newest is taken",
        "url": "or the address of a running server",
        "hf_checkpoint": "configuration and tokenizer, for a --checkpoint of no run and a --url elsewhere",
        "profile": "model-card: sampled as for the model card",
        "save": "directory of the result; an interrupted one goes on",
        **COMMON,
    },
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
    run([*TARGETS["eval"].command, *flags], args, dry_run)


MACHINE = {
    "gpu": "H100-80GB, H200-141GB, A100-80GB, A100-40GB, or one with other memory in GiB: H100=94",
    "host_memory": "of a machine",
    "price": "dollars a GPU and hour",
}


@target_task("plan", {"recipe": f"to plan (default: {RECIPE})", **MACHINE, "json": "JSON instead of a page", **COMMON})
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
    machine = ["--gpu", gpu, "--host-memory", host_memory, "--price", f"{price:g}"]
    run([*TARGETS["plan"].command, "--recipe", recipe, *machine, *["--json"] * json], args, dry_run)


@target_task(
    "tune",
    {
        "recipe": f"to tune (default: {RECIPE})",
        **MACHINE,
        "write": "a new recipe, FILE.toml, with the cheapest settings",
        "measure": "what this node reaches first, in 3 minutes; gpu and host_memory are this node's then",
        **IN_IMAGE,
    },
)
def tune(
    _: Context,
    recipe: str = RECIPE,
    gpu: str = "H100-80GB",
    host_memory: str = "1TB",
    price: float = 2.5,
    write: str = "",
    measure: bool = False,
    image: str = IMAGE,
    base_dir: str = BASE_DIR,
    work_dir: str = ".",
    args: str = "",
    dry_run: bool = False,
) -> None:
    further = ["--price", f"{price:g}", *(["--write", write] if write else [])]
    if measure:
        target = replace(TARGETS["tune"], command=MEASURED_TUNE, place=Place.EITHER)
        run_target(target, ["--recipe", recipe, *further], args, dry_run, image, base_dir, work_dir)
    else:
        machine = ["--gpu", gpu, "--host-memory", host_memory]
        run([*TARGETS["tune"].command, "--recipe", recipe, *machine, *further], args, dry_run)
