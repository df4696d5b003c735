"""A tiny checkpoint, and an engine that is compared with transformers."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Glm4MoeLiteForCausalLM

from recipe.data.prompts import Prompt
from recipe.engines.process import EngineProcess
from recipe.messages import RoutedExperts
from recipe.sampling.sampling_params import SamplingParams
from recipe.weight_sync.tensor import Bucket
from recipe.weights.tiny import write_tiny_checkpoint

CONTEXT = 64
PROMPT = [7, 3, 9, 11, 4, 8, 20]
GREEDY = SamplingParams(max_new_tokens=16, temperature=0)


class Kind(StrEnum):
    """The servers that keep one contract."""

    EMBEDDED = "embedded"
    SGLANG = "sglang"


class EngineUnderTest:
    """Blocking calls to an engine, and the model it should be equal to."""

    def __init__(self, process: EngineProcess, checkpoint: Path, kind: Kind) -> None:
        self.kind = kind
        self.tolerance = {Kind.EMBEDDED: 1e-5, Kind.SGLANG: 2e-3}[kind]
        """Of log-probs, in nats: SGLang's kernels round more, by up to 2e-4 here."""
        self.process = process
        self.url = process.url
        self.checkpoint = checkpoint
        self.reference = load_reference(checkpoint)

    def request(self, method: str, path: str, body: object | None = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=240) as response:
                return response.status, _decoded(response.read())
        except urllib.error.HTTPError as error:
            return error.code, _decoded(error.read())

    def post(self, path: str, body: object | None = None) -> Any:
        status, answer = self.request("POST", path, {} if body is None else body)
        assert status == 200, answer
        return answer

    def refuse(self, path: str, body: object) -> str:
        """The sentence of an error in SGLang's shape."""
        status, answer = self.request("POST", path, body)
        assert status == 400
        assert set(answer) == {"error"}
        return str(answer["error"]["message"])

    def flush(self) -> None:
        """Forgets cached prompts, so that what follows does not depend on what was before; SGLang refuses to until it
        has put away what it has answered."""
        deadline = time.monotonic() + 60
        while (answer := self.request("POST", "/flush_cache", {}))[0] != 200:
            assert time.monotonic() < deadline, answer
            time.sleep(0.05)

    def update(self, weights: dict[str, torch.Tensor], version: str = "2") -> tuple[int, Any]:
        """The answer to a tensor update, in a session of its own."""
        payload = Bucket.of(list(weights.items())).payload()
        self.post("/begin_weight_update")
        answer = self.request("POST", "/update_weights_from_tensor", tensor_update(payload, version))
        self.post("/end_weight_update")
        return answer

    def load(self, checkpoint: Path, version: str) -> None:
        """Reads a checkpoint."""
        self.post("/update_weights_from_disk", disk_update(checkpoint, version))

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, first_seed: int = 0) -> list[Any]:
        """An answer for each prompt, whose seeds are `first_seed` and those that follow it."""
        answers: list[Any] = self.post("/generate", generation(prompts, sampling, first_seed))
        return answers

    def generate_one(self, prompt: Sequence[int], sampling: SamplingParams, seed: int = 0) -> Any:
        return self.generate([prompt], sampling, seed)[0]


def generation(prompts: Sequence[Sequence[int]], sampling: SamplingParams, first_seed: int = 0) -> dict[str, Any]:
    """What the client sends to /generate."""
    return {
        "input_ids": prompts,
        "sampling_params": [sampling.request(seed) for seed in range(first_seed, first_seed + len(prompts))],
        "return_logprob": True,
    }


def routed_by(reference: Glm4MoeLiteForCausalLM, ids: Sequence[int]) -> RoutedExperts:
    """[N - 1, M, K] the experts that transformers takes for all tokens but the last, in ascending order."""
    layers = [layer.mlp for layer in reference.model.layers if hasattr(layer.mlp, "route_tokens_to_experts")]
    taken: list[torch.Tensor] = []

    def note(mlp: Any, inputs: tuple[Any, ...]) -> None:
        taken.append(mlp.route_tokens_to_experts(mlp.gate(inputs[0]))[0])

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    with torch.no_grad():
        reference(torch.tensor([list(ids[:-1])]))
    for hook in hooks:
        hook.remove()
    return torch.stack(taken, 1).sort(-1).values.to(torch.uint8).numpy()


def tensor_update(payload: str, version: str) -> dict[str, Any]:
    """What the client sends to /update_weights_from_tensor."""
    return {
        "serialized_named_tensors": [payload],
        "load_format": "flattened_bucket",
        "flush_cache": True,
        "weight_version": version,
    }


def disk_update(checkpoint: Path | str, version: str) -> dict[str, Any]:
    """What the client sends to /update_weights_from_disk."""
    return {"model_path": str(checkpoint), "flush_cache": True, "weight_version": version}


def _decoded(content: bytes) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError:
        return content.decode()


def load_reference(checkpoint: Path) -> Glm4MoeLiteForCausalLM:
    return Glm4MoeLiteForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def make_checkpoint(folder: Path, seed: int, changes: Mapping[str, object] | None = None) -> Path:
    """A tiny checkpoint, its config.json with `changes`, and weights large enough that tokens and experts are clearly
    preferred."""
    write_tiny_checkpoint(folder, seed, changes)
    generator = torch.Generator().manual_seed(seed)
    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        for name, tensor in weights.items():
            if name.endswith("e_score_correction_bias"):
                weights[name] = torch.randn(tensor.shape, generator=generator) * 0.1
            elif tensor.dim() > 1:
                weights[name] = tensor * 5
        save_file(weights, file, {"format": "pt"})
    return folder


def log_probs_of(reference: Glm4MoeLiteForCausalLM, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """[len(ids) - 1]: the log-prob of each token but the first, by transformers' plain forward pass."""
    with torch.no_grad():
        logits = reference(torch.tensor([ids])).logits[0, :-1] / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def make_prompt(index: int, ids: tuple[int, ...]) -> Prompt:
    return Prompt(index, (), "", ids, "0")


def shared_segments(pid: int) -> set[str]:
    """The shared-memory segments that torch has made in process `pid`."""
    return {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(f"torch_{pid}_")}


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by name."""
    return {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}


def greedy_result(engine: EngineUnderTest) -> tuple[list[int], torch.Tensor]:
    """Tokens and their log-probs, with nothing cached."""
    engine.flush()
    answer = engine.generate_one(PROMPT, GREEDY)
    return answer["output_ids"], torch.tensor([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])


def assert_equals_fresh_load(engine: EngineUnderTest, checkpoint: Path) -> None:
    """Greedy tokens' log-probs are those that transformers has with the checkpoint's weights."""
    ids, log_probs = greedy_result(engine)
    expected = log_probs_of(load_reference(checkpoint), PROMPT + ids)[len(PROMPT) - 1 :]
    assert torch.allclose(log_probs, expected, atol=engine.tolerance, rtol=0)
