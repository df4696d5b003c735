"""The targets that `make` and `invoke` have in common: what each runs, where, and what it needs. `make help` reads the
names and sentences from this file's text."""

from dataclasses import dataclass
from enum import StrEnum

MODEL = "GLM-4.7-Flash"
"""The folder in BASE_DIR that `make download` makes."""
ONE_NODE, SEVERAL_NODES = "scripts/run-glm4.7-30B-A3B-8gpus.sh", "scripts/run-glm4.7-30B-A3B.sh"


class Place(StrEnum):
    """Where a target runs; inside the image it always runs right there."""

    HOST = "host"
    """In the environment that invoke is in."""
    IMAGE = "image"
    """In the image, with all GPUs."""
    EITHER = "either"
    """In the image where there are GPUs, else as on the host."""


@dataclass(frozen=True)
class Target:
    """A target of `make`, and the task of `invoke` of that name."""

    name: str
    help: str
    """A sentence, with the time that it takes."""
    command: tuple[str, ...] = ()
    """What it ends with, `python` being the environment's own; flags follow."""
    place: Place = Place.HOST
    several_nodes: bool = False
    """Whether processes on other machines must reach it."""
    needs: str = ""
    """A folder that BASE_DIR must hold; `.`: BASE_DIR itself."""


_ALL = (
    Target(
        "image",
        "build the image with everything that the GPU targets need (about 7 minutes and 25 GB of disk)",
    ),
    Target(
        "shell",
        "open a shell in the image, with the GPUs",
        (),
        Place.IMAGE,
    ),
    Target(
        "download",
        "model and data sets into BASE_DIR, pinned and verified (60 GB, about 10 minutes)",
        ("python", "-m", "recipe.download", "all"),
    ),
    Target(
        "convert",
        "BASE_DIR's model into torch_dist, which training starts from (60 GB more, about 3 minutes)",
        ("python", "-m", "recipe.conversion.convert"),
    ),
    Target(
        "export",
        "a run's newest checkpoint as a Hugging Face directory, runs/NAME/hf (60 GB, about 3 minutes)",
        ("python", "-m", "recipe.conversion.export"),
    ),
    Target(
        "train-8gpu",
        "train on one node of 8 GPUs, in the image (2 to 7 minutes a step, by recipe)",
        (ONE_NODE,),
        Place.IMAGE,
        needs=MODEL,
    ),
    Target(
        "train-8gpu-mtp",
        "the same, with the MTP layer trained and drafting, in the image",
        (ONE_NODE, "--recipe", "glm4.7-flash-8gpu-mtp"),
        Place.IMAGE,
        needs=MODEL,
    ),
    Target(
        "train-16gpu",
        "train on two nodes of 8 GPUs: MASTER_ADDR is this one, BASE_DIR shared; in the image",
        (SEVERAL_NODES, "--recipe", "glm4.7-flash-16gpu"),
        Place.IMAGE,
        several_nodes=True,
        needs=MODEL,
    ),
    Target(
        "train-24gpu",
        "train on three nodes of 8 GPUs, in the image",
        (SEVERAL_NODES, "--recipe", "glm4.7-flash-24gpu"),
        Place.IMAGE,
        several_nodes=True,
        needs=MODEL,
    ),
    Target(
        "join",
        "on every other node of such a run: join the one at MASTER_ADDR, in the image with its GPUs",
        ("python", "-m", "recipe.cluster.join"),
        Place.IMAGE,
        several_nodes=True,
        needs=".",
    ),
    Target(
        "smoke",
        "whether this node is good, by the whole loop on a small model: make smoke NUM_GPUS=2 PRICE=3 (6 to 9 minutes)",
        ("python", "-m", "recipe.smoke"),
        Place.EITHER,
    ),
    Target(
        "bench",
        "the trainer's speed on one GPU beside transformers', in the image",
        ("python", "scripts/bench_trainer.py"),
        Place.IMAGE,
    ),
    Target(
        "watch",
        "a page on which the runs in runs/ are watched, at 127.0.0.1, PORT 8642: make watch PORT=8700",
        ("python", "-m", "recipe.run.watch"),
    ),
    Target(
        "report",
        "what the run NAME achieved, and runs/NAME/report.html to send on: make report NAME=run WITH=another",
        ("python", "-m", "recipe.run.report"),
    ),
    Target(
        "mismatch",
        "how much of the train/rollout difference each cause makes: make mismatch NAME=run STEP=21 (a minute and more)",
        ("python", "-m", "recipe.mismatch"),
        Place.EITHER,
    ),
    Target(
        "eval",
        "score a model: make eval MODEL=DIR DATA=aime.jsonl (default: the tiny model)",
        ("python", "-m", "evaluation.aime"),
    ),
    Target(
        "plan",
        'memory, disk, time and money of a run: make plan RECIPE=glm4.7-flash-16gpu ARGS="--gpu H200 --price 3"',
        ("python", "-m", "recipe.plan"),
    ),
    Target(
        "tune",
        "settings of speed with which a run costs less: make tune RECIPE=... (half a minute; MEASURE=1: on this node)",
        ("python", "-m", "recipe.plan.tune"),
    ),
    Target(
        "test",
        "run the tests, in as many processes as there are cores",
        ("python", "-m", "pytest"),
    ),
    Target(
        "lint",
        "ruff, mypy, shellcheck and hadolint",
        ("make", "lint"),
    ),
)
TARGETS = {target.name: target for target in _ALL}
