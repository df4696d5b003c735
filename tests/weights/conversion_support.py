"""Checkpoints to convert, and the commands that convert them."""

import json
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from forked_commands import Forked, run_module
from safetensors.torch import load_file, save_file
from torch import Tensor
from trainer_support import random_checkpoint

from recipe.system.ports import LOCAL, reserve_port_with

MTP = ("--mtp-num-layers", "1")
WEIGHTS = "model.safetensors"


def run_conversion(name: str, *words: object, processes: int = 1) -> tuple[int, str]:
    """Runs a module of recipe.conversion, alone or with as many others as torchrun would start. Exit status of the
    first process, and what it printed."""
    command = (f"recipe.conversion.{name}", list(map(str, words)))
    with ExitStack() as stack:
        port, reservation = reserve_port_with(LOCAL, ())
        stack.callback(reservation.close)
        met = {"MASTER_ADDR": LOCAL, "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)} if processes > 1 else {}
        started = [
            stack.enter_context(Forked(run_module, *command, met | ({"RANK": str(rank)} if met else {})))
            for rank in range(processes)
        ]
        ended = [one.end() for one in started]
    assert len({status for status, _ in ended}) == 1, ended
    return ended[0]


def run_by_torchrun(name: str, *words: object, processes: int) -> tuple[int, str]:
    """The same as users start it."""
    torchrun = ["-m", "recipe.conversion.torchrun", f"--nproc-per-node={processes}"]
    command = [sys.executable, *torchrun, "-m", f"recipe.conversion.{name}", *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    return ended.returncode, ended.stdout + ended.stderr


def convert(source: Path, target: Path, *flags: object, processes: int = 1) -> str:
    """Converts with --verify. What it printed."""
    words = ("--hf-checkpoint", source, "--save", target, "--verify", *flags)
    status, output = run_conversion("convert", *words, processes=processes)
    assert status == 0, output
    return output


def export(source: Path, origin: Path, target: Path, *, processes: int = 1) -> str:
    """Exports with --verify. What it printed."""
    words = ("--load", source, "--hf-checkpoint", origin, "--save", target, "--verify")
    status, output = run_conversion("export", *words, processes=processes)
    assert status == 0, output
    return output


def copy_of(source: Path, target: Path) -> Path:
    """A copy of a checkpoint to spoil."""
    shutil.copytree(source, target)
    return target


def rewrite(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Replaces the weights of a checkpoint."""
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def set_config(directory: Path, **values: object) -> None:
    """Changes fields of config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def split_into_shards(directory: Path, *, shards: int = 3) -> None:
    """Distributes the weights over several files with an index."""
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        names = sorted(tensors)[number::shards]
        save_file({name: tensors[name] for name in names}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def bf16_checkpoint(target: Path) -> Path:
    """The random checkpoint in bf16, its router biases in fp32 with bits that bf16 cannot hold."""
    copy_of(random_checkpoint(), target)
    tensors = load_file(target / WEIGHTS)
    rewrite(target, {name: t if "e_score" in name else t.to(torch.bfloat16) for name, t in tensors.items()})
    set_config(target, dtype="bfloat16")
    return target


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, types, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
