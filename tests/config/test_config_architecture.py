from pathlib import Path
from typing import Any

import pytest
from config_support import Refusal, Try, WriteCheckpoint

from recipe.config import Architecture, ModelConfig
from recipe.config.architecture import _FIXED, _STATED
from recipe.system.errors import UserError


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        Architecture.from_checkpoint(folder)
    return str(error.value)


def test_reads_what_the_checkpoint_states(checkpoint: Path) -> None:
    architecture = Architecture.from_checkpoint(checkpoint)

    assert (architecture.num_hidden_layers, architecture.num_nextn_predict_layers) == (47, 1)
    assert architecture.rope_theta == 1_000_000, "from rope_parameters, not transformers' default"
    assert architecture.rope_interleave
    assert architecture.eos_token_ids == (154820, 154827, 154829)
    assert architecture.pad_token_id == 154820
    assert architecture.moe_layer_freq == (0,) + (1,) * 46
    assert architecture.shared_expert_intermediate_size == 1536


def test_both_spellings_of_transformers(write_checkpoint: WriteCheckpoint, checkpoint: Path) -> None:
    new = Architecture.from_checkpoint(checkpoint)
    types = ["dense"] + ["sparse"] * 46
    old = {"rope_parameters": None, "rope_theta": 1e6, "dtype": None, "torch_dtype": "bfloat16"}

    assert Architecture.from_checkpoint(write_checkpoint(**old)) == new
    assert Architecture.from_checkpoint(write_checkpoint(first_k_dense_replace=None, mlp_layer_types=types)) == new
    assert Architecture.from_checkpoint(write_checkpoint(eos_token_id=5)).eos_token_ids == (5,)


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "num_nextn_predict_layers", "rope_parameters", "q_lora_rank", "routed_scaling_factor",
     "first_k_dense_replace", "eos_token_id", "dtype"],
)  # fmt: skip
def test_a_missing_field_is_an_error_and_not_a_default(write_checkpoint: WriteCheckpoint, key: str) -> None:
    told = refused(write_checkpoint(**{key: None}))

    assert told.endswith(f"config.json has no {'rope_theta' if key == 'rope_parameters' else key}")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe', but this recipe trains glm4_moe_lite only"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and only 'silu' is implemented"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, and only False is implemented"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling is"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters.rope_type is 'yarn'"),
        ({"num_key_value_heads": 4}, "num_key_value_heads differs"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: it should be greater than 0"),
        ({"dtype": "float16"}, "dtype: it should be 'bfloat16' or 'float32'"),
        ({"mlp_layer_types": ["sparse", "dense"]}, "only leading ones are implemented"),
    ],
)
def test_what_is_not_implemented_is_refused(
    write_checkpoint: WriteCheckpoint, change: dict[str, Any], sentence: str
) -> None:
    assert sentence in refused(write_checkpoint(**change))


def test_no_config_json(tmp_path: Path) -> None:
    assert refused(tmp_path / "nowhere").startswith(
        f"{tmp_path / 'nowhere'} holds no config.json: --hf-checkpoint must"
    )


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_broken_config_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "config.json" in refused(tmp_path)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--num-layers", "48"], "--num-layers 48 contradicts {}, where num_hidden_layers is 47"),
        (["--q-lora-rank", "1536"], "--q-lora-rank 1536 contradicts {}, where q_lora_rank is 768"),
        (["--vocab-size", "151552"], "--vocab-size 151552 contradicts {}, where vocab_size is 154880"),
        (["--rotary-base", "10000"], "--rotary-base 10000.0 contradicts {}, where rope_theta is 1000000.0"),
        (["--add-qkv-bias"], "--add-qkv-bias contradicts {}, where attention_bias is false"),
        (["--no-untie-embeddings-and-output-weights"], "where not tie_word_embeddings is true"),
        (["--moe-layer-freq", "[0]*3+[1]*44"], "3 dense and 44 expert layers contradicts {}, which says [0]*1+[1]*46"),
        (["--moe-layer-freq", "1"], "0 dense and 47 expert layers contradicts"),
        (["--normalization", "LayerNorm"], "contradicts the glm4_moe_lite trained here: normalization is RMSNorm"),
        (["--rope-fusion"], "contradicts the glm4_moe_lite trained here: apply_rope_fusion is false"),
        (["--moe-aux-loss-coeff", "0.01"], "moe_aux_loss_coeff is 0.0"),
        (["--make-vocab-size-divisible-by", "128"], None),
        (["--make-vocab-size-divisible-by", "1000"], "would pad the vocabulary of 154880"),
    ],
)
def test_flags_are_compared_with_the_checkpoint(
    resolve_8gpu: Try, refusal: Refusal, checkpoint: Path, flags: list[str], sentence: str | None
) -> None:
    if sentence is None:
        resolve_8gpu(*flags)
    else:
        assert sentence.format(checkpoint / "config.json") in refusal(*flags)


def test_no_architecture_flag_goes_uncompared() -> None:
    own = {"hf_checkpoint", "bf16"}
    own_rule = {"moe_layer_freq", "make_vocab_size_divisible_by"}
    without_effect = {"moe_router_load_balancing_type"}

    assert set(ModelConfig.model_fields) == {*_STATED, *_FIXED} | own | own_rule | without_effect
