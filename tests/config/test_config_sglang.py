from pathlib import Path

import pytest
from config_support import Refusal, Try, WriteCheckpoint

from recipe.config import resolve
from recipe.config.loading import shipped_recipes
from recipe.config.sglang_rules import EngineLayout
from recipe.system.errors import UserError

PIPELINE = ("--sglang-pp-size", "2", "--sglang-dp-size", "4", "--sglang-ep-size", "4")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--update-weight-in-flight", "keep"],
            "--update-weight-in-flight keep and --colocate do not go together: engines give their memory to the ",
        ),
        (
            [*("--update-weight-in-flight", "recompute", "--no-colocate", "--rollout-num-gpus", "8"), *PIPELINE],
            "--update-weight-in-flight recompute and --sglang-pp-size 2 do not go together: SGLang's pipeline stages",
        ),
        (["--rollout-num-gpus", "16"], "--colocate shares the trainer's 8 GPUs, but --rollout-num-gpus says 16"),
        (
            ["--no-colocate", "--rollout-num-gpus", "12"],
            "--rollout-num-gpus-per-engine 8 does not divide the 12 GPUs of the engines",
        ),
        (["--sglang-dp-size", "3"], "--sglang-dp-size 3 on an engine of TP 8 gives no whole attention TP; valid"),
        (["--sglang-dp-size", "1"], "gives attention TP 8, and 20 heads do not divide by it; valid with"),
        (["--sglang-ep-size", "3"], "--sglang-ep-size 3 does not divide the engine's tensor parallel size 8"),
        (["--sglang-pp-size", "16"], "--sglang-pp-size 16 does not divide --rollout-num-gpus-per-engine 8"),
        (["--sglang-ep-size", "eight"], "--sglang-ep-size must be a whole number of at least 1, not 'eight'"),
        (
            ["--sglang-ep-num-redundant-experts", "3"],
            "makes 67 experts of the model's 64, which --sglang-ep-size 8 does not divide; valid and nearest: "
            "0 (64 experts, 8 a GPU) or 8 (72 experts, 9 a GPU)",
        ),
        (["--sglang-tp-size", "4"], "--sglang-tp-size 4 contradicts --rollout-num-gpus-per-engine 8"),
        (["--sglang-host", "0.0.0.0"], "--sglang-host is not yours to set: the engines listen on 127.0.0.1 only"),
        (["--sglang-api-key", "hunter2"], "--sglang-api-key is not yours to set: a secret on a command line is none"),
        (["--sglang-model-path", "/x"], "the engines serve --hf-checkpoint"),
        (
            ["--recipe", "glm4.7-flash-8gpu-eagle", "--sglang-speculative-num-draft-tokens", "4"],
            "a chain has 3 tokens (steps + 1)",
        ),
        (
            ["--recipe", "glm4.7-flash-8gpu-eagle", "--sglang-moe-a2a-backend", "deepep"],
            "--sglang-moe-a2a-backend deepep and --sglang-speculative-algorithm EAGLE do not go together",
        ),
        (
            ["--recipe", "glm4.7-flash-8gpu-mtp", "--sglang-speculative-moe-a2a-backend", "deepep"],
            "--sglang-speculative-moe-a2a-backend deepep and --sglang-speculative-algorithm EAGLE do not go together",
        ),
        (
            ["--recipe", "glm4.7-flash-8gpu-mtp", "--sglang-max-running-requests", "136"],
            "are up to 17 on each of the engine's GPUs, and their CUDA graphs end at 16",
        ),
        (
            ["--recipe", "glm4.7-flash-8gpu-eagle", "--sglang-disable-cuda-graph"],
            "SGLang's engine ends with the first batch of which its GPUs have unequal parts",
        ),
        (["--sglang-enable-eplb"], "--sglang-enable-eplb moves experts, and without --sglang-moe-a2a-backend"),
        (
            [
                *("--rollout-num-gpus-per-engine", "1", "--sglang-dp-size", "1", "--sglang-ep-size", "1"),
                *("--sglang-enable-dp-attention", "false", "--sglang-enable-dp-lm-head", "false"),
            ],
            "give --sglang-moe-dense-tp-size false",
        ),
        (["--speculative-max-batch", "16"], "limits --sglang-speculative-algorithm EAGLE, which is not given"),
        (
            ["--recipe", "glm4.7-flash-8gpu-eagle", "--speculative-max-batch", "16"],
            "--speculative-max-batch and --sglang-enable-dp-attention do not go together",
        ),
        (
            ["--speculative-max-batch", "16", "--sglang-speculative-eagle-topk", "2"],
            "needs --sglang-speculative-eagle-topk 1",
        ),
        (
            ["--rollout-num-gpus-per-engine", "1", "--sglang-dp-size", "1", "--sglang-ep-size", "1"],
            "with --sglang-dp-size 1 divides nothing, and SGLang fails at its first batch; "
            "give --sglang-enable-dp-attention false",
        ),
        (
            ["--rollout-num-gpus-per-engine", "4", "--sglang-dp-size", "1", "--sglang-ep-size", "4"],
            "give --sglang-enable-dp-attention false, or --sglang-dp-size 2 or 4",
        ),
        (["--sglang-enable-dp-attention", "false"], "leave it out (--sglang-dp-size false), or, for copies of the"),
        (
            ["--sglang-enable-dp-attention", "false"],
            "--sglang-enable-dp-lm-head needs --sglang-enable-dp-attention; leave it out too (--sglang-enable-dp-lm-",
        ),
        (["--sglang-moe-dense-tp-size", "2"], "--sglang-moe-dense-tp-size 2 on an engine of TP 8; valid: 1 or 8"),
        (
            ["--sglang-speculative-algorithm", "EAGLE", "--sglang-speculative-eagle-topk", "1"],
            "--sglang-speculative-eagle-topk without --sglang-speculative-num-steps: SGLang chooses all three or none",
        ),
        (
            ["--recipe", "glm4.7-flash-8gpu-eagle", "--sglang-pp-size", "2", "--sglang-dp-size", "4"],
            "--sglang-speculative-algorithm EAGLE and --sglang-pp-size 2 do not go together in SGLang",
        ),
        (
            ["--sglang-speculative-algorithm", "NGRAM"],
            "--sglang-speculative-algorithm NGRAM and --sglang-enable-dp-attention do not go together in SGLang",
        ),
        (
            ["--sglang-speculative-use-rejection-sampling"],
            "--sglang-speculative-use-rejection-sampling needs --sglang-speculative-algorithm EAGLE",
        ),
        (
            [
                *("--recipe", "glm4.7-flash-8gpu-eagle", "--sglang-speculative-use-rejection-sampling"),
                *("--sglang-speculative-eagle-topk", "2", "--sglang-enable-deterministic-inference"),
            ],
            "--sglang-speculative-use-rejection-sampling needs --sglang-speculative-eagle-topk 1",
        ),
        (
            [
                *("--recipe", "glm4.7-flash-8gpu-eagle", "--sglang-speculative-use-rejection-sampling"),
                "--sglang-enable-deterministic-inference",
            ],
            "and --sglang-enable-deterministic-inference do not go together in SGLang",
        ),
        (["--device", "cuda", "--fp32", "--attention-backend", "auto"], "--fp32 with SGLang on GPUs: its kernels"),
        (
            ["--recipe", "glm4.7-flash-8gpu-eagle", "--device", "cpu", "--attention-backend", "auto"],
            "--sglang-speculative-algorithm EAGLE needs GPUs",
        ),
    ],
)
def test_engines_sglang_would_refuse(refusal: Refusal, flags: list[str], sentence: str) -> None:
    told = refusal(*flags)
    assert sentence in told
    assert "hunter2" not in told


def test_tp_size_may_be_said_if_it_is_right(resolve_8gpu: Try) -> None:
    assert resolve_8gpu("--sglang-tp-size", "8").config.sglang.args["tp_size"] == 8
    apart = ("--no-colocate", "--rollout-num-gpus", "8", "--sglang-tp", "4", "--sglang-pp-size", "2")
    apart += ("--no-use-rollout-routing-replay",)
    stages = resolve_8gpu(*apart, "--sglang-dp-size", "4", "--sglang-ep-size", "4")
    assert stages.config.sglang.args["pp_size"] == 2


@pytest.mark.parametrize("flags", [["--device", "auto", "--fp32", "--attention-backend", "auto"], ["--device", "cuda"]])
def test_what_depends_on_the_machine_is_refused_where_that_is_known(resolve_8gpu: Try, flags: list[str]) -> None:
    assert resolve_8gpu(*flags).config.cluster.device == flags[1]


def test_small_latent_attention_is_refused_on_gpus(write_checkpoint: WriteCheckpoint) -> None:
    checkpoint = write_checkpoint(kv_lora_rank=32, qk_rope_head_dim=16)
    sglang = ["--rollout-engine", "sglang", "--colocate", "--bf16"]
    argv = ["--recipe", "tiny", "--hf-checkpoint", str(checkpoint)]
    resolve([*argv, *sglang, "--device", "cpu"])
    resolve([*argv, "--device", "cuda"])
    with pytest.raises(
        UserError, match=r"kv_lora_rank 32 with qk_rope_head_dim 16 .* take 512 with 64 only; use a mod"
    ):
        resolve([*argv, *sglang, "--device", "cuda"])


def test_an_all_to_all_backend_spreads_the_experts_itself(resolve_8gpu: Try) -> None:
    notes = resolve_8gpu("--sglang-moe-a2a-backend", "deepep", "--sglang-ep-size", "1").notes
    assert not any("shards every expert" in note for note in notes)


def test_data_parallel_size_alone_is_another_thing(checkpoint: Path) -> None:
    argv = ["--recipe", "tiny", "--hf-checkpoint", str(checkpoint), "--rollout-engine", "sglang", "--colocate"]
    resolve(argv)
    with pytest.raises(UserError, match="--sglang-dp-size 2 needs --sglang-enable-dp-attention"):
        resolve([*argv, "--sglang-dp-size", "2"])
    with pytest.raises(
        UserError, match=r"8 does not divide the model's 20 attention heads; .*--sglang-dp-size 2, 4 or 8"
    ):
        resolve([*argv, "--actor-num-gpus-per-node", "8", "--rollout-num-gpus-per-engine", "8"])


def test_speculation_needs_an_mtp_layer(write_checkpoint: WriteCheckpoint) -> None:
    checkpoint = write_checkpoint(num_nextn_predict_layers=0)
    with pytest.raises(UserError, match=r"drafts with an MTP layer, and .* has none"):
        resolve(["--recipe", "glm4.7-flash-8gpu-eagle", "--hf-checkpoint", str(checkpoint)])


def test_the_embedded_engine_takes_no_sglang_arguments(resolve_tiny: Try) -> None:
    with pytest.raises(UserError) as error:
        resolve_tiny("--sglang-mem-fraction-static", "0.7", "--sglang-ep-size", "8")
    assert str(error.value).startswith("--sglang-mem-fraction-static, --sglang-ep-size: only SGLang servers take it")


def test_without_sglang_a_note_says_that_names_go_unchecked(resolve_8gpu: Try) -> None:
    assert "SGLang is not installed here, so names and values of --sglang-* are not checked" in resolve_8gpu().notes


def test_weights_cannot_go_in_every_way(refusal: Refusal) -> None:
    assert "with --colocate use tensor" in refusal("--update-weight-transfer", "distributed")


COMPARED = "--check-weight-update-equal"


@pytest.mark.parametrize(
    ("flags", "effect"),
    [
        (["--sglang-quantization", "fp8"], "--sglang-quantization fp8 rounds them; leave one of the two out"),
        (["--sglang-moe-runner-backend", "flashinfer_cutlass"], "has another order of the experts' rows"),
        (["--sglang-enable-eplb"], "--sglang-enable-eplb moves experts from GPU to GPU"),
        (["--sglang-dtype", "float16"], "--sglang-dtype float16 holds them in another type"),
        (
            ["--sglang-pp-size", "2", "--sglang-dp-size", "4", "--sglang-ep-size", "4"],
            "--sglang-pp-size 2 has SGLang tell those of the first stage only",
        ),
    ],
)
def test_tensors_that_sglang_makes_others_are_not_compared(refusal: Refusal, flags: list[str], effect: str) -> None:
    assert effect in refusal(COMPARED, *flags)


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.startswith("glm")])
def test_the_shipped_recipes_engines_are_compared(name: str, checkpoint: Path) -> None:
    assert resolve(["--recipe", name, "--hf-checkpoint", str(checkpoint), COMPARED])


def test_an_engines_layout_is_read_from_its_arguments(resolve_8gpu: Try) -> None:
    layout = EngineLayout.of(resolve_8gpu().config)
    assert (layout.tp, layout.attention_tp, layout.head_tp, layout.dense_tp) == (8, 1, 1, 1)
    assert (layout.shared_expert_tp, layout.expert_tp) == (8, 1)
    flags = ["--sglang-dp-size", "4", "--sglang-ep-size", "2", "--sglang-moe-dense-tp-size", "8"]
    other = EngineLayout.of(resolve_8gpu(*flags).config)
    assert (other.tp, other.attention_tp, other.head_tp, other.dense_tp, other.expert_tp) == (8, 2, 2, 8, 4)
    backend = EngineLayout.of(resolve_8gpu("--sglang-moe-a2a-backend", "deepep").config)
    assert (backend.shared_expert_tp, backend.expert_tp) == (1, 1)
