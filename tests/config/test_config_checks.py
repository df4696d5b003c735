from pathlib import Path

import pytest
from config_support import Refusal, Try, WriteCheckpoint

from recipe.config import resolve
from recipe.system.errors import UserError

TWO_STAGES = ("--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "4")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--n-samples-per-prompt", "1", "--global-batch-size", "32"], "--n-samples-per-prompt 1 leaves GRPO without"),
        (["--advantage-estimator", "rloo", "--no-grpo-std"], "rloo does not divide by a group's deviation"),
        (["--advantage-estimator", "cispo", "--eps-clip-c", "3"], "cispo has no surrogate that it could bound"),
        (["--use-tis", "--custom-tis-function-path", "a:b"], "takes the place of --use-tis: give one of the two"),
        (["--tis-level", "sequence"], "--tis-clip and --tis-clip-low have no effect without --use-tis"),
        (["--tis-clip", "5"], "--tis-clip and --tis-clip-low have no effect without --use-tis"),
        (["--opsm-delta", "0.1"], "--opsm-delta has no effect without --use-opsm"),
        (["--dr-grpo", "--loss-type", "sft"], "--dr-grpo: --loss-type sft has no engine's samples to weigh"),
        (
            ["--use-rollout-routing-replay", "--sglang-speculative-algorithm", "NGRAM"],
            "--use-rollout-routing-replay with --sglang-speculative-algorithm NGRAM",
        ),
        (
            ["--use-rollout-routing-replay", "--sglang-enable-hierarchical-cache"],
            "--use-rollout-routing-replay with --sglang-enable-hierarchical-cache",
        ),
        (
            ["--use-rollout-routing-replay", "--sglang-speculative-eagle-topk", "4"],
            "--use-rollout-routing-replay with --sglang-speculative-eagle-topk 4",
        ),
        (["--dr-grpo", "--calculate-per-token-loss"], "weigh tokens differently: give one of the two"),
        (["--dr-grpo", "--advantage-estimator", "rloo"], "--dr-grpo: --advantage-estimator rloo does not divide"),
        (
            ["--no-use-rollout-routing-replay", "--use-routing-replay"],
            "with one optimizer step a rollout there is none",
        ),
        (["--use-rollout-routing-replay", "--sglang-pp-size", "2"], "each stage keeps the experts of its own layers"),
        (["--use-routing-replay", "--loss-type", "sft"], "learns given responses, which nobody has routed"),
        (["--loss-type", "sft"], "--loss-type sft learns one response a prompt, but --n-samples-per-prompt is 8"),
        (["--global-batch-size", "100"], "--global-batch-size 100 does not divide the rollout's 256 samples"),
        (["--global-batch-size", "4"], "--global-batch-size 4 does not divide by the 8 data-parallel ranks"),
        (["--no-use-dynamic-batch-size", "--micro-batch-size", "3"], "--micro-batch-size 3 does not divide the 32"),
        (["--rollout-max-response-len", "202752"], "--rollout-max-response-len 202752 do not fit a context of 202752"),
        (["--rollout-max-context-len", "300000"], "--rollout-max-context-len 300000 is longer than the model's 202752"),
        (
            ["--rollout-max-context-len", "9000", "--rollout-max-prompt-len", "1000"],
            "--rollout-max-response-len 8192 and --rollout-max-prompt-len 1000 do not fit a context of 9000 tokens",
        ),
        (["--eval-max-response-len", "202752"], "leaves no room for a prompt in the model's 202752"),
        (["--over-sampling-batch-size", "31"], "--over-sampling-batch-size 31 is below --rollout-batch-size 32"),
        (["--mask-offpolicy-in-partial-rollout"], "--mask-offpolicy-in-partial-rollout needs --partial-rollout"),
        (["--max-staleness", "2"], "--max-staleness 2 has no effect without --async-rollout"),
        (["--async-order", "fixed"], "--async-order fixed has no effect without --async-rollout"),
        (
            ["--async-rollout", "--max-staleness", "0", "--async-order", "fixed"],
            "--async-order fixed has no effect with --max-staleness 0",
        ),
        (
            ["--async-rollout", "--max-staleness", "0", "--update-weight-in-flight", "keep"],
            "--update-weight-in-flight keep has no effect with --max-staleness 0",
        ),
        (["--update-weight-in-flight", "keep"], "--update-weight-in-flight keep has no effect without --async-rollout"),
        (["--max-staleness", "-1"], "--max-staleness -1 (flag)"),
        (["--async-rollout"], "--async-rollout with --colocate: engines on the trainer's GPUs cannot generate while"),
        (["--async-rollout", "--loss-type", "sft"], "--async-rollout: --loss-type sft learns given responses"),
        (["--async-rollout", "--partial-rollout"], "aborted samples would have tokens beyond --max-staleness; drop it"),
        (["--async-rollout", "--over-sampling-batch-size", "64"], "what is aborted would be made for nothing; drop it"),
        (
            ["--async-rollout", "--update-weight-in-flight", "keep"],
            "--update-weight-in-flight with --async-order fixed, which makes each rollout under the weights of one",
        ),
        (["--group-rm"], "--group-rm is about --custom-rm-path: give one, or drop it"),
        (
            ["--custom-generate-max-turns", "3"],
            "--custom-generate-max-turns has no effect without",
        ),
        (["--dynamic-sampling-filter-path", "nonzero_std"], "--dynamic-sampling-filter-path nonzero_std (flag)"),
        (["--rollout-health-check-interval", "0"], "--rollout-health-check-interval 0 (flag)"),
        (["--eps-clip-high", "0.1"], "--eps-clip-high 0.1 is below --eps-clip 0.2"),
        (["--tis-clip-low", "3"], "--tis-clip-low 3.0 is not below --tis-clip 2.0"),
        (["--no-use-kl-loss", "--kl-loss-coef", "0.1"], "--kl-loss-coef 0.1 has no effect without --use-kl-loss"),
        (["--kl-loss-coef", "0.1", "--kl-coef", "0.1"], "would count the KL twice"),
        (["--min-lr", "1"], "--min-lr 1.0 is above --lr 1e-06"),
        (["--lr-decay-style", "cosine", "--lr-warmup-iters", "3000"], "leaves nothing of the 3000 steps to decay in"),
        (["--no-optimizer-cpu-offload"], "--overlap-cpu-optimizer-d2h-h2d needs --optimizer-cpu-offload"),
        (["--eval-prompt-data", "a", "/a", "a", "/b"], "--eval-prompt-data names two files a"),
        (
            ["--eval-prompt-data", "a-b", "/a", "a.b", "/b", "--metrics-port", "9100"],
            "--metrics-port: Prometheus takes letters, digits and _ in a name",
        ),
        (
            ["--prompt-data", "/a-b.jsonl", "/a.b.jsonl", "--metrics-port", "9100"],
            "a name, and two prompt files would have one",
        ),
        (["--target-gain-after", "20"], "--target-gain-after has no effect without --target-gain"),
        (
            ["--target-gain", "0.1", "--eval-prompt-data", "a", "/a", "--skip-eval-before-train"],
            "drop --skip-eval-before-train",
        ),
        (["--enable-mtp-training"], "--enable-mtp-training needs --mtp-num-layers 1"),
        (["--mtp-num-layers", "2"], "where num_nextn_predict_layers is 1"),
        (["--attention-dropout", "0.1"], "--attention-dropout 0.1 must be 0: with dropout a policy's log-probs are"),
        (["--hidden-dropout", "0.1"], "--hidden-dropout 0.1 must be 0"),
        (["--no-accumulate-allreduce-grads-in-fp32"], "sums of bf16 gradients lose small samples"),
        (["--no-attention-softmax-in-fp32"], "log-probs must agree"),
        (["--device", "cpu"], "--attention-backend flash needs a GPU, but --device is cpu; use auto or unfused"),
    ],
)
def test_contradictions_are_refused(refusal: Refusal, flags: list[str], sentence: str) -> None:
    assert sentence in refusal(*flags)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--tensor-model-parallel-size", "3"], "TP 3 x PP 1 x CP 1 = 3 does not divide the 8 ranks"),
        (["--expert-model-parallel-size", "16"], "ETP 1 x EP 16 x PP 1 = 16 does not divide the 8 ranks"),
        (
            ["--actor-num-gpus-per-node", "6", "--expert-model-parallel-size", "6"],
            "6 does not divide the model's 64 exp",
        ),
        (
            ["--tensor-model-parallel-size", "8"],
            "--tensor-model-parallel-size 8 does not divide the model's 20 attention",
        ),
        (
            ["--tensor-model-parallel-size", "4"],
            "--tensor-model-parallel-size 4 with experts needs --sequence-parallel",
        ),
        (
            ["--moe-permute-fusion", "--moe-token-dispatcher-type", "allgather"],
            "--moe-permute-fusion needs --moe-token-dispatcher-type alltoall",
        ),
        (["--decoder-last-pipeline-num-layers", "23"], "need --pipeline-model-parallel-size above 1"),
        (TWO_STAGES, "--decoder-last-pipeline-num-layers 23 makes it 24+23"),
        ([*TWO_STAGES, "--decoder-last-pipeline-num-layers", "48"], "47 layers with 48 of them fixed do not split"),
        (
            [*TWO_STAGES, "--decoder-last-pipeline-num-layers", "23", "--decoder-first-pipeline-num-layers", "23"],
            "47 layers with 23 and 23 of them fixed do not split evenly over PP 2",
        ),
        (
            [*TWO_STAGES, "--decoder-last-pipeline-num-layers", "23", "--num-layers-per-virtual-pipeline-stage", "6"],
            "--num-layers-per-virtual-pipeline-stage needs stages of one length, and these have 23 and 24 layers",
        ),
        (["--num-layers-per-virtual-pipeline-stage", "6"], "needs --pipeline-model-parallel-size above 1"),
        (["--recompute-granularity", "selective"], "--recompute-method and --recompute-num-layers need"),
    ],
)
def test_layouts_are_refused(refusal: Refusal, flags: list[str], sentence: str) -> None:
    assert sentence in refusal(*flags)


def test_a_byte_is_enough_for_the_experts_that_are_replayed(write_checkpoint: WriteCheckpoint) -> None:
    argv = ["--recipe", "glm4.7-flash-8gpu", "--use-rollout-routing-replay", "--hf-checkpoint"]
    with pytest.raises(UserError, match="takes up to 255 experts, and this model has 256"):
        resolve([*argv, str(write_checkpoint(n_routed_experts=256))])
    both = [*argv, str(write_checkpoint()), "--use-routing-replay", "--global-batch-size", "64"]
    assert any("takes the place of --use-routing-replay" in note for note in resolve(both).notes)
    assert not resolve(both).config.records_routing


def test_reinforce_plus_plus_needs_no_group(write_checkpoint: WriteCheckpoint) -> None:
    argv = ["--recipe", "glm4.7-flash-8gpu", "--hf-checkpoint", str(write_checkpoint())]
    argv += ["--advantage-estimator", "reinforce_plus_plus", "--n-samples-per-prompt", "1", "--global-batch-size", "32"]
    assert resolve(argv).config.samples_per_rollout == 32


@pytest.mark.parametrize(
    ("layers", "stages", "split"),
    [(47, 2, "24+23"), (47, 4, "12+12+12+11"), (47, 8, "6+6+6+6+6+6+6+5"), (5, 4, "1+1+1+2")],
)
def test_the_advised_split_is_accepted(write_checkpoint: WriteCheckpoint, layers: int, stages: int, split: str) -> None:
    checkpoint = write_checkpoint(num_hidden_layers=layers)
    argv = ["--recipe", "glm4.7-flash-8gpu", "--hf-checkpoint", str(checkpoint)]
    argv += ["--pipeline-model-parallel-size", str(stages), "--expert-model-parallel-size", "1"]
    with pytest.raises(UserError, match=split.replace("+", r"\+")):
        resolve(argv)

    resolve([*argv, "--decoder-last-pipeline-num-layers", split.split("+")[-1]])


def test_interleaved_stages_need_enough_microbatches(write_checkpoint: WriteCheckpoint) -> None:
    argv = ["--recipe", "glm4.7-flash-8gpu", "--hf-checkpoint", str(write_checkpoint(num_hidden_layers=8))]
    argv += ["--pipeline-model-parallel-size", "4", "--expert-model-parallel-size", "2"]
    argv += ["--num-layers-per-virtual-pipeline-stage", "1", "--rollout-batch-size", "3"]
    assert resolve([*argv, "--n-samples-per-prompt", "8", "--global-batch-size", "24"])
    with pytest.raises(UserError, match="divides by the 4 stages, and the 6 samples a data-parallel rank has"):
        resolve([*argv, "--n-samples-per-prompt", "4", "--global-batch-size", "12"])


def test_more_stages_than_layers(write_checkpoint: WriteCheckpoint) -> None:
    argv = ["--recipe", "glm4.7-flash-8gpu", "--hf-checkpoint", str(write_checkpoint(num_hidden_layers=3))]
    with pytest.raises(UserError, match="leaves stages without a layer: the model has 3"):
        resolve([*argv, "--pipeline-model-parallel-size", "4", "--expert-model-parallel-size", "2"])


class TestWithoutARecipe:
    """What recipes set is missing here."""

    @pytest.fixture
    def least(self, checkpoint: Path) -> list[str]:
        return [
            "--hf-checkpoint", str(checkpoint), "--prompt-data", "p.jsonl", "--num-rollout", "1", "--lr", "1e-6",
            "--rollout-batch-size", "8", "--n-samples-per-prompt", "2", "--rollout-max-response-len", "8",
            "--rm-type", "math", "--rollout-engine", "embedded",
        ]  # fmt: skip

    def test_is_enough(self, least: list[str]) -> None:
        assert resolve(least).config.steps_per_rollout == 1

    @pytest.mark.parametrize(
        ("flags", "sentence"),
        [
            (["--use-dynamic-batch-size"], "--use-dynamic-batch-size needs --max-tokens-per-gpu"),
            (["--recompute-granularity", "full"], "needs --recompute-method and --recompute-num-layers"),
            (["--optimizer-offload-fraction", "0.5"], "--optimizer-offload-fraction needs --optimizer-cpu-offload"),
            (["--rollout-engine", "sglang"], "SGLang needs GPUs: give --colocate"),
        ],
    )
    def test_refused(self, least: list[str], flags: list[str], sentence: str) -> None:
        with pytest.raises(UserError) as error:
            resolve([*least, *flags])
        assert sentence in str(error.value)

    def test_a_reward(self, least: list[str]) -> None:
        at = least.index("--rm-type")
        without = least[:at] + least[at + 2 :]
        with pytest.raises(UserError, match="no reward: give --rm-type"):
            resolve(without)
        supervised = [*without, "--loss-type", "sft", "--n-samples-per-prompt", "1"]
        resolve(supervised)
        with pytest.raises(UserError, match="evaluation needs a reward"):
            resolve([*supervised, "--eval-prompt-data", "heldout", "h.jsonl"])


def test_a_recipe_that_replays_routing_learns_given_responses_too(resolve_8gpu: Try) -> None:
    assert resolve_8gpu().config.grpo.replays_rollouts
    supervised = ("--loss-type", "sft", "--n-samples-per-prompt", "1", "--global-batch-size", "32")
    assert not resolve_8gpu(*supervised).config.grpo.replays_routing


class TestNotes:
    @pytest.mark.parametrize(
        ("flags", "note"),
        [
            ([], "the reference model is not run"),
            ([], "no old-log-prob pass"),
            ([], "the checkpoint's MTP layer is not loaded into the trainer; --mtp-num-layers 1 loads it"),
            ([], "a sample may be longer than --max-tokens-per-gpu 8192"),
            (["--sequence-parallel"], "--sequence-parallel has no effect"),
            (
                ["--over-sampling-batch-size", "64"],
                "the first groups to finish are kept, so two runs of one seed",
            ),
            (["--partial-rollout"], "--partial-rollout has no effect: nothing is aborted"),
            (
                ["--partial-rollout", "--dynamic-sampling-filter-path", "check_reward_nonzero_std"],
                "tokens that older weights made are learned from as if",
            ),
            (["--no-use-dynamic-batch-size"], "--max-tokens-per-gpu has no effect without"),
            (["--lr-decay-iters", "10"], "--lr-decay-iters has no effect with --lr-decay-style constant"),
            (["--sglang-ep-size", "1"], "SGLang shards every expert over the engine's 8 GPUs"),
            (["--device", "cpu", "--attention-backend", "auto"], "bf16 on a CPU"),
        ],
    )
    def test_said(self, resolve_8gpu: Try, flags: list[str], note: str) -> None:
        assert any(note in said for said in resolve_8gpu(*flags).notes)

    def test_not_said_where_it_is_not_so(self, resolve_8gpu: Try) -> None:
        said = " ".join(
            resolve_8gpu("--kl-loss-coef", "0.1", "--global-batch-size", "128", "--mtp-num-layers", "1").notes
        )
        assert "reference" not in said
        assert "old-log-prob" not in said
        assert "MTP" not in said
        assert "first groups to finish" not in said

    def test_older_tokens_that_are_weighed_or_left_out_need_no_note(self, resolve_8gpu: Try) -> None:
        for remedy in ("--use-tis", "--mask-offpolicy-in-partial-rollout"):
            notes = resolve_8gpu("--partial-rollout", "--over-sampling-batch-size", "64", remedy).notes
            assert not any("older weights" in note for note in notes)


@pytest.mark.parametrize(
    ("flags", "weighs"),
    [
        ([], False),
        (["--async-rollout"], True),
        (["--async-rollout", "--max-staleness", "0"], False),
        (["--async-rollout", "--no-use-tis"], False),
        (["--async-rollout", "--custom-tis-function-path", "a:b"], False),
        (["--async-rollout", "--tis-clip", "3"], True),
    ],
)
def test_samples_that_may_be_stale_are_weighed_unless_somebody_says_otherwise(
    checkpoint: Path, flags: list[str], weighs: bool
) -> None:
    resolved = resolve(["--recipe", "tiny", "--hf-checkpoint", str(checkpoint), *flags])
    assert resolved.config.grpo.use_tis is weighs
    unweighed = any("--use-tis weighs them" in note for note in resolved.notes)
    assert unweighed == ("--no-use-tis" in flags)
