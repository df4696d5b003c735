"""Weights of GLM-4.7-Flash's architecture that count, for benchmarks without the real ones: the likeliest token after t
is t + 1, with a probability near one half, and the MTP layer thinks so too, so speculation has something to accept.

Every seed gives other weights and other log-probabilities, in which every layer and every expert has its part.
"""

import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self

import torch
from glm_flash import CONFIG
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from recipe.config import Architecture
from recipe.weight_sync.checksum import ExpectedChecksums
from recipe.weight_sync.sync import WeightSync
from recipe.weights.hf_files import write_checkpoint
from recipe.weights.table import Placement, placements
from recipe.weights.tiny import tiny_config

DEVIATION = 0.02
INTO_RESIDUAL = ("o_proj", "down_proj")
LOOPBACK = "127.0.0.1"


def write_model(folder: Path, *, layers: int | None, tiny: bool) -> Architecture:
    """Writes configuration and tokenizer, the tiny model's or those of the true widths, and no weights."""
    vocabulary = 128 if tiny else int(str(CONFIG["vocab_size"]))
    config = tiny_config(vocabulary, [2], 0) if tiny else CONFIG | {"topk_method": "noaux_tc", "num_hidden_layers": 47}
    config |= {"num_hidden_layers": layers} if layers is not None else {}
    config |= {"max_position_embeddings": 1024} if tiny else {}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(vocabulary)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return Architecture.from_checkpoint(folder)


class CountingWeights:
    """All tensors of a model, on a device, in megatron's form: the experts of a layer together."""

    def __init__(self, architecture: Architecture, device: str, dtype: torch.dtype) -> None:
        """Not yet drawn."""
        self.table = placements(architecture, with_mtp=True)
        self._layers = architecture.num_hidden_layers
        self._head_scale = 1.12 * math.log(architecture.vocab_size) / architecture.hidden_size
        self._held = {
            name: torch.empty(
                (*entry.grid, *entry.hf_shape), device=device, dtype=torch.float32 if entry.is_fp32 else dtype
            )
            for name, entry in self.table.items()
        }

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._held.values())

    def draw(self, seed: int) -> None:
        """Other weights, in place."""
        device = next(iter(self._held.values())).device
        generator = torch.Generator(device).manual_seed(seed)
        named = {entry.hf_names[0]: self._held[name] for name, entry in self.table.items()}
        for name, entry in self.table.items():
            self._fill(self._held[name], entry, generator)
        named["lm_head.weight"].copy_(named["model.embed_tokens.weight"].roll(1, 0) * self._head_scale)

    def _fill(self, tensor: Tensor, entry: Placement, generator: torch.Generator) -> None:
        name = entry.hf_names[0]
        if entry.is_fp32:
            tensor.normal_(0, 0.1, generator=generator)
        elif len(entry.hf_shape) == 1:
            tensor.fill_(1)
        elif "eh_proj" in name:  # [h, 2h]: what the next token's embedding says
            tensor.zero_()
            tensor.diagonal().fill_(1)
        elif "embed_tokens" in name:
            tensor.normal_(0, 1, generator=generator)
        else:
            narrow = any(part in name for part in INTO_RESIDUAL)
            tensor.normal_(0, DEVIATION / math.sqrt(self._layers) if narrow else DEVIATION, generator=generator)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face's tensors, as views."""
        for name, entry in self.table.items():
            yield from zip(entry.hf_names, self._held[name].view(-1, *entry.hf_shape), strict=True)

    def write(self, folder: Path) -> None:
        """A checkpoint with the configuration and tokenizer of `folder`, in their place."""
        companions = folder.rename(folder.with_name(folder.name + ".companions"))
        write_checkpoint(((name, tensor.cpu()) for name, tensor in self), folder, companions)


class TrainerProcess:
    """A process of its own on the same device that holds a model and sends it. What takes more than the seconds given
    with it ends the process and raises TimeoutError."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype, bucket_bytes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, folder, device, dtype, bucket_bytes), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def draw(self, seed: int, seconds: float) -> int:
        """Other weights. Returns their size in bytes."""
        return int(self._ask(("draw", seed), seconds))

    def send(self, url: str, version: str, seconds: float, *, check: bool = False) -> float:
        """The seconds that it took to send all to the engine at `url`, and with `check` to compare checksums."""
        return self._ask(("send", url, version, check), seconds)

    def write(self, folder: Path, seconds: float) -> float:
        """Makes `folder` a checkpoint. Returns the seconds."""
        return self._ask(("write", folder), seconds)

    def _ask(self, what: tuple[object, ...], seconds: float) -> float:
        self._pipe.send(what)
        if not self._pipe.poll(seconds):
            self._process.kill()
            raise TimeoutError(f"{what[0]} took more than {seconds:.0f} s")
        answer = self._pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return float(answer)


def _work(pipe: Connection, folder: Path, device: str, dtype: torch.dtype, bucket_bytes: int) -> None:
    architecture = Architecture.from_checkpoint(folder)
    weights = CountingWeights(architecture, device, dtype)

    def checksums() -> ExpectedChecksums:
        return ExpectedChecksums(architecture.num_hidden_layers, architecture.n_routed_experts)

    def carry_out(what: tuple[object, ...]) -> float:
        match what:
            case ("draw", int(seed)):
                weights.draw(seed)
                return weights.nbytes
            case ("send", str(url), str(version), bool(check)):
                sync = WeightSync("tensor", bucket_bytes, 1, LOOPBACK, checksums if check else None)
                started = time.monotonic()
                sync.send(weights, {0: url}, version).check_taken()
                return time.monotonic() - started
            case ("write", Path() as target):
                started = time.monotonic()
                weights.write(target)
                return time.monotonic() - started
        raise ValueError(what)

    while True:
        try:
            what = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(carry_out(what))
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
