"""Routers take tokens where they are told to, on every layout; what they do by themselves is recorded as it is."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from trainer_support import on_ranks, random_checkpoint, random_samples, scheduled, tiny_config
from transformers import AutoModelForCausalLM

from recipe.config import Architecture
from recipe.config.checks import MOST_REPLAYED_EXPERTS
from recipe.messages import NOT_ROUTED, Progress, RoutedExperts, Scores, StepReport, TrainSample

MTP = {"mtp_num_layers": 1, "enable_mtp_training": True}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS = [
    pytest.param(2, {"expert_model_parallel_size": 2} | RECOMPUTED, id="EP2-recompute"),
    pytest.param(2, {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "allgather"}, id="EP2-allgather"),
    pytest.param(2, TP2, id="TP2+SP"),
    pytest.param(2, PP2 | {"num_layers_per_virtual_pipeline_stage": 1} | RECOMPUTED, id="PP2xVPP2-recompute"),
    pytest.param(2, {"context_parallel_size": 2}, id="CP2"),
    pytest.param(
        8,
        TP2 | PP2 | {"context_parallel_size": 2, "expert_model_parallel_size": 4}
        | {"decoder_last_pipeline_num_layers": 1, "moe_permute_fusion": True},
        id="TP2xPP2xCP2xEP4",
    ),
]  # fmt: skip


@cache
def architecture() -> Architecture:
    return Architecture.from_checkpoint(random_checkpoint())


def told(samples: list[TrainSample], seed: int) -> list[TrainSample]:
    """The samples with experts drawn at random, of which every third sample tells those of its first tokens only, and
    the third pair nothing. Two that share a prompt have its experts alike."""
    draw = np.random.default_rng(seed)
    layers = sum(architecture().moe_layer_freq)
    scores = draw.random((128, layers, architecture().n_routed_experts))
    experts = scores.argsort(-1)[..., : architecture().num_experts_per_tok].astype(np.uint8)
    result, prompts = [], {}
    for number, sample in enumerate(samples):
        own = experts[draw.integers(0, 64) :][: sample.length - 1].copy()
        prompt = prompts.setdefault(sample.prompt.tobytes(), own[: len(sample.prompt)])
        own[: len(prompt)] = prompt
        known = len(own) - 2 if number % 3 == 2 else len(own)
        result.append(replace(sample, routed_experts=None if number in (4, 5) else own[:known]))
    return result


def config_of(ranks: int, perf: dict, **groups: dict):
    return tiny_config(
        random_checkpoint(),
        cluster={"actor_num_gpus_per_node": ranks},
        perf={"use_dynamic_batch_size": True, "max_tokens_per_gpu": 64} | perf,
        mtp=MTP,
        **groups,
    )


def step_as_told(
    trainer, samples: list[TrainSample], folder: Path
) -> tuple[Scores, StepReport, dict[str, torch.Tensor]]:
    """Log-probs, and a step whose clipped gradients are ten times Adam's first moments."""
    from megatron.core.dist_checkpointing import load_plain_tensors

    trainer.load()
    packs = scheduled(trainer, samples)
    scores, report = trainer.log_probs(packs), trainer.train_step(packs)
    trainer.save(folder, Progress(rollouts=1))
    saved = load_plain_tensors(str(folder / "iter_0000001"))
    return scores, report, {name: tensor for name, tensor in saved.items() if "exp_avg." in name}


def together(parts: list[Scores]) -> Scores:
    return sum(parts, Scores({}))


R3 = {"use_rollout_routing_replay": True}


@cache
def alone_as_told() -> tuple[Scores, StepReport, dict[str, torch.Tensor]]:
    with tempfile.TemporaryDirectory() as folder:
        samples = told(random_samples(8, seed=3), seed=4)
        return on_ranks(step_as_told, config_of(1, {}, grpo=R3), samples, Path(folder))[0]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "perf"), LAYOUTS)
def test_what_is_replayed_is_the_same_on_every_layout(ranks: int, perf: dict, tmp_path: Path) -> None:
    scores, report, gradients = alone_as_told()
    parts = on_ranks(step_as_told, config_of(ranks, perf, grpo=R3), told(random_samples(8, seed=3), seed=4), tmp_path)
    found = together([part for part, _, _ in parts])
    assert found.log_probs.keys() == scores.log_probs.keys()
    for index, expected in scores.log_probs.items():
        np.testing.assert_allclose(found.log_probs[index], expected, atol=2e-5, rtol=0)
    _, of_layout, of_layouts_gradients = parts[0]
    assert of_layout.metrics.keys() == report.metrics.keys() >= {"routing_disagreement", "mtp_loss"}
    for metric, value in report.metrics.items():
        np.testing.assert_allclose(of_layout.metrics[metric], value, rtol=1e-5, atol=1e-6, err_msg=metric)
    assert 0.5 < report.metrics["routing_disagreement"] < 1
    assert len(gradients) > 50
    for name, gradient in gradients.items():
        scale = gradient.abs().max().clamp_min(1e-12)
        assert ((of_layouts_gradients[name] - gradient).abs().max() / scale).item() < 1e-5, name


def recorded(trainer, samples: list[TrainSample]) -> Scores:
    trainer.load()
    return trainer.log_probs(scheduled(trainer, samples))


R2 = {"use_routing_replay": True}


@cache
def routed_by_transformers() -> dict[int, RoutedExperts]:
    """[L - 1, M, K] sorted, of each sample alone."""
    model = AutoModelForCausalLM.from_pretrained(random_checkpoint(), dtype=torch.float32)
    found = {}
    for sample in random_samples(8, seed=3):
        with chooses(model, None) as taken, torch.no_grad():
            model(input_ids=torch.from_numpy(sample.tokens)[None])
        found[sample.index] = torch.stack(taken, 1).sort(-1).values.numpy().astype(np.uint8)[:-1]
    return found


@contextmanager
def chooses(model, experts: torch.Tensor | None) -> Iterator[list[torch.Tensor]]:
    """transformers' layers take tokens to `experts` [L, M, K] where these are known; yields what they take."""
    taken: list[torch.Tensor] = []
    layers = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "route_tokens_to_experts")]

    def routing(mlp, number: int):
        def route(router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            scores = router_logits.sigmoid()
            chosen = (scores + mlp.gate.e_score_correction_bias).topk(mlp.top_k, dim=-1).indices
            if experts is not None:
                chosen = torch.where(experts[:, number] == NOT_ROUTED, chosen, experts[:, number].long())
            taken.append(chosen)
            weights = scores.gather(1, chosen)
            return chosen, weights / (weights.sum(-1, keepdim=True) + 1e-20) * mlp.routed_scaling_factor

        return route

    for number, mlp in enumerate(layers):
        mlp.route_tokens_to_experts = routing(mlp, number)
    yield taken


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "perf"), [pytest.param(1, {}, id="single"), *LAYOUTS])
def test_what_the_routers_take_is_recorded_on_every_layout(ranks: int, perf: dict) -> None:
    """Layers of all stages, tokens of all ranks, as transformers takes them."""
    found = together(on_ranks(recorded, config_of(ranks, perf, grpo=R2), random_samples(8, seed=3)))
    expected = routed_by_transformers()
    assert found.routed_experts.keys() == expected.keys()
    for index, experts in expected.items():
        np.testing.assert_array_equal(np.sort(found.routed_experts[index], -1), experts)


def a_step(trainer, samples: list[TrainSample], replayed: bool) -> tuple[StepReport, dict[str, torch.Tensor]]:
    """One by its own routing, or by what a pass before it took, told in another order."""
    trainer.load()
    routed = trainer.log_probs(scheduled(trainer, samples)).routed_experts if replayed else {}
    turned = {index: experts[..., ::-1] for index, experts in routed.items()}
    told_so = [replace(sample, routed_experts=turned.get(sample.index)) for sample in samples]
    report = trainer.train_step(scheduled(trainer, told_so))
    return report, {name: weight.clone() for name, weight in trainer.weights()}


@pytest.mark.slow
@pytest.mark.parametrize("perf", [{}, RECOMPUTED], ids=["kept", "recomputed"])
def test_a_trainer_that_replays_itself_takes_the_same_step_bit_for_bit(perf: dict) -> None:
    [(by_itself, weights)], [(replayed, replayed_weights)] = (
        on_ranks(a_step, config_of(1, perf, grpo=R2), random_samples(8, seed=3), again) for again in (False, True)
    )
    assert replayed.metrics == by_itself.metrics | {"routing_disagreement": 0.0}
    for name, weight in weights.items():
        assert torch.equal(weight, replayed_weights[name]), name


def gradients_as_told(trainer, samples: list[TrainSample]) -> tuple[dict[int, np.ndarray], dict[str, torch.Tensor]]:
    from recipe.megatron.step import forward_backward

    trainer.load()
    scores = trainer.log_probs([samples])
    forward_backward(trainer.replicas, [samples], trainer.loss_function)
    return scores.log_probs, {name: parameter.main_grad for name, parameter in trainer.chunks[0].named_parameters()}


@pytest.mark.slow
def test_loss_and_gradients_are_those_of_a_plain_model_that_routes_so() -> None:
    samples = told(random_samples(8, seed=3), seed=4)
    results = [
        on_ranks(gradients_as_told, config_of(1, perf, grpo=R3 | {"loss_type": "policy_loss"}), samples)[0]
        for perf in ({}, RECOMPUTED)
    ]
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), f"{name}: recomputation changes it"
    model = AutoModelForCausalLM.from_pretrained(random_checkpoint(), dtype=torch.float32)
    for sample in samples:
        experts = np.full((sample.length, 3, architecture().num_experts_per_tok), NOT_ROUTED, dtype=np.uint8)
        # A prompt that several samples share goes where the first of them says.
        first = next(one for one in samples if one.prompt.tobytes() == sample.prompt.tobytes())
        if sample.routed_experts is not None and first.routed_experts is not None:
            experts[: len(sample.routed_experts)] = sample.routed_experts
            experts[: len(sample.prompt)] = first.routed_experts[: len(sample.prompt)]
        with chooses(model, torch.from_numpy(experts)):
            logits = model(input_ids=torch.from_numpy(sample.tokens)[None]).logits[0, :-1]
        targets = torch.from_numpy(sample.tokens[1:])[:, None]
        log_probs = logits.log_softmax(-1).gather(1, targets)[-sample.response_length :, 0]
        np.testing.assert_allclose(results[0][0][sample.index], log_probs.detach().numpy(), atol=2e-5, rtol=0)
        # One step a rollout: the ratio is 1, and the loss' gradient that of -advantage x log-prob.
        weights = torch.from_numpy(sample.loss_mask.astype(np.float32) * np.float32(sample.weight))
        assert sample.advantages is not None
        (-(torch.from_numpy(sample.advantages) * weights) * log_probs).sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    same = {
        "decoder.layers.{}.mlp.router.weight": "model.layers.{}.mlp.gate.weight",
        "decoder.layers.{}.mlp.experts.linear_fc2": "model.layers.{}.mlp.experts.down_proj",
        "decoder.layers.{}.self_attention.linear_proj.weight": "model.layers.{}.self_attn.o_proj.weight",
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    }
    for ours, theirs in same.items():
        for layer in (1, 2, 3):
            gradient, reference = results[0][1][ours.format(layer)], expected[theirs.format(layer)]
            assert reference is not None
            scale = reference.abs().max().clamp_min(1e-12)
            assert ((gradient - reference).abs().max() / scale).item() < 1e-5, ours.format(layer)


def test_a_pack_tells_its_routers_what_its_samples_say() -> None:
    """A shared prompt by its first sample, what is unknown by nobody; each layer its own."""
    from recipe.megatron.microbatch import TokenLayout, build_microbatch

    def sample(index: int, tokens: list[int], rows: int, first: int) -> TrainSample:
        experts = np.array([[[first + row, 50 + row], [100 + row, 150 + row]] for row in range(rows)], dtype=np.uint8)
        return TrainSample(index, np.array(tokens), np.ones(len(tokens) - 2, dtype=np.bool_), 1.0,
                           routed_experts=experts)  # fmt: skip

    samples = [sample(0, [1, 2, 3, 4], 3, 0), sample(1, [1, 2, 5, 6, 7], 3, 20)]
    layout = TokenLayout(moe_layers=(1, 0), token_multiple=2)
    halves = [build_microbatch(samples, replace(layout, tensor_rank=rank)).inputs.sequences for rank in (0, 1)]
    routed = torch.cat([half.routing.experts for half in halves if half.routing is not None], 1).tolist()
    counted = torch.cat([half.routing.in_response for half in halves if half.routing is not None]).tolist()
    assert counted == [False, False, True, True, True, False]
    # Rows: the prompt 1 2, the first response's 3, the second's 5 6 (of which only 5 is known), padding.
    assert [row[0] for row in routed[1]] == [0, 1, 2, 22, NOT_ROUTED, NOT_ROUTED]
    assert [row[1] for row in routed[0]] == [150, 151, 152, 152, NOT_ROUTED, NOT_ROUTED]
    assert build_microbatch(samples, TokenLayout()).inputs.sequences.routing is None


def test_a_byte_numbers_the_experts() -> None:
    assert MOST_REPLAYED_EXPERTS == NOT_ROUTED == 255
