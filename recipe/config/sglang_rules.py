"""Rules of the engines: how many there are, and what SGLang's own arguments may say."""

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from recipe.config.architecture import Architecture
from recipe.config.engine_placement import nodes_per_engine
from recipe.config.error_text import listed
from recipe.config.flags import SGLANG_KEY, spell
from recipe.config.schema import Config
from recipe.system.errors import UserError

SGLANG_VENV_PYTHON = Path(__file__).parents[2] / ".venv-sglang" / "bin" / "python"
"""Where `make install-sglang` puts SGLang's CPU build."""

_OWNED = {
    "model_path": "the engines serve --hf-checkpoint",
    "model": "the engines serve --hf-checkpoint",
    "host": "the engines listen on 127.0.0.1 only",
    "port": "each engine is given a free port",
    "nnodes": "the engines are placed by Ray",
    "node_rank": "the engines are placed by Ray",
    "dist_init_addr": "the engines are placed by Ray",
    "base_gpu_id": "the engines are placed by Ray",
    "random_seed": "it follows from --seed",
    "weight_version": "the trainer numbers the weights",
    "config": "a file would escape the checks; write its keys into [sglang.args] of a recipe",
    "api_key": "a secret on a command line is none, and the engines listen on 127.0.0.1 only",
    "admin_api_key": "a secret on a command line is none, and the engines listen on 127.0.0.1 only",
    "ssl_keyfile_password": "a secret on a command line is none, and the engines listen on 127.0.0.1 only",
}
"""SGLang's arguments that are not the user's to set, and why."""

_RUNNERS = ("auto", "triton", "deep_gemm")
_COMPARABLE: dict[str, tuple[tuple[object, ...], str]] = {
    "pp_size": ((1,), "has SGLang tell those of the first stage only"),
    "quantization": ((), "rounds them"),
    "torchao_config": (("",), "rounds them"),
    "moe_runner_backend": (_RUNNERS, "has another order of the experts' rows"),
    "speculative_moe_runner_backend": (_RUNNERS, "has another order of the experts' rows"),
    "enable_eplb": ((False,), "moves experts from GPU to GPU"),
    "init_expert_location": (("trivial",), "puts experts elsewhere"),
    "attn_cp_size": ((1,), "divides them otherwise"),
    "moe_dp_size": ((1,), "divides them otherwise"),
    "dwdp_size": ((1,), "divides them otherwise"),
}
"""Arguments by which an engine's tensors become others than slices of those it is sent, their values by which they do
not, and how."""


@dataclass(frozen=True)
class EngineLayout:
    """How one SGLang server is spread over its GPUs; by default it has one."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    redundant_experts: int = 0
    dp_attention: bool = False
    dp_lm_head: bool = False
    """Whether DP attention splits the output head as it does attention."""
    whole_dense_mlp: bool = False
    """Whether every GPU has the whole MLP of the dense layers."""
    whole_shared_experts: bool = False

    @classmethod
    def of(cls, config: Config) -> Self:
        """Reads the sizes from `--sglang-*`. Raises UserError where one is no whole number, or makes none."""
        pp, gpus = size_of(config, "pp_size", default=1), config.sglang.rollout_num_gpus_per_engine
        if gpus % pp:
            raise UserError(f"--sglang-pp-size {pp} does not divide --rollout-num-gpus-per-engine {gpus}")
        tp = gpus // pp
        args = config.sglang.args
        backend = args.get("moe_a2a_backend", "none")
        return cls(
            tp=tp,
            pp=pp,
            dp=size_of(config, "dp_size", default=1),
            ep=tp if backend != "none" else size_of(config, "ep_size", default=1),
            redundant_experts=size_of(config, "ep_num_redundant_experts", default=0, least=0),
            dp_attention=args.get("enable_dp_attention", False) is True,
            dp_lm_head=args.get("enable_dp_lm_head", False) is True,
            whole_dense_mlp=size_of(config, "moe_dense_tp_size", default=tp) == 1,
            whole_shared_experts=backend in ("deepep", "mooncake"),
        )

    @property
    def groups(self) -> int:
        """Groups of its GPUs that hold different sequences."""
        return self.dp if self.dp_attention else 1

    @property
    def attention_tp(self) -> int:
        """GPUs among which attention and the embedding are split."""
        return self.tp // self.dp if self.dp_attention else self.tp

    @property
    def head_tp(self) -> int:
        """GPUs among which the output head is split."""
        return self.attention_tp if self.dp_lm_head else self.tp

    @property
    def dense_tp(self) -> int:
        """GPUs among which the MLP of the dense layers is split."""
        return 1 if self.whole_dense_mlp else self.tp

    @property
    def shared_expert_tp(self) -> int:
        """GPUs among which the shared experts are split."""
        return 1 if self.whole_shared_experts else self.tp

    @property
    def expert_tp(self) -> int:
        """GPUs among which each routed expert is split."""
        return self.tp // self.ep


ONE_GPU = EngineLayout()


def size_of(config: Config, name: str, default: int, least: int = 1) -> int:
    """The whole number of `--sglang-NAME`, or the default. Raises UserError if it is none, or below `least`."""
    value = config.sglang.args.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{spell(f'{SGLANG_KEY}.{name}')} must be a whole number of at least {least}, not {value!r}")
    return value


def engines_have_gpus(config: Config, _: Architecture) -> Iterator[str]:
    """SGLang's GPUs are the trainer's (--colocate) or their own (--rollout-num-gpus), in whole engines."""
    cluster, each = config.cluster, config.sglang.rollout_num_gpus_per_engine
    if not config.needs_engine:
        return
    if config.rollout.engine == "sglang":
        if cluster.rollout_num_gpus is None and not cluster.colocate:
            yield "SGLang needs GPUs: give --colocate to share the trainer's, or --rollout-num-gpus N for its own"
        if cluster.colocate and config.rollout_gpus != config.world_size:
            yield (
                f"--colocate shares the trainer's {config.world_size} GPUs, but --rollout-num-gpus says "
                f"{cluster.rollout_num_gpus}; leave one of the two out"
            )
    if config.rollout_gpus % each:
        yield f"--rollout-num-gpus-per-engine {each} does not divide the {config.rollout_gpus} GPUs of the engines"


def engines_lie_on_whole_machines(config: Config, _: Architecture) -> Iterator[str]:
    """SGLang has as many GPUs of an engine on each of its machines, and here that is all that the trainer has there."""
    nodes, on_each = config.cluster.actor_num_nodes, config.cluster.actor_num_gpus_per_node
    gpus, each = config.rollout_gpus, config.sglang.rollout_num_gpus_per_engine
    if nodes == 1 or not config.needs_engine or gpus % each:
        return
    within = [size for size in range(1, on_each + 1) if on_each % size == 0 and gpus % size == 0]
    whole = [on_each * count for count in range(2, nodes + 1) if gpus % (on_each * count) == 0]
    if config.rollout.engine == "embedded" and each > on_each:
        yield (
            f"--rollout-num-gpus-per-engine {each} spreads an engine over machines of {on_each}, and the embedded one "
            f"is one process: use --rollout-engine sglang, or {listed(within)}"
        )
    elif each not in (*within, *whole):
        yield (
            f"--rollout-num-gpus-per-engine {each}: an engine lies within one of the {nodes} machines, of which the "
            f"trainer takes {on_each} GPUs each, or on whole ones; valid: {listed([*within, *whole])}"
        )


def stages_open_one_memory(config: Config, _: Architecture) -> Iterator[str]:
    """SGLang hands weights to a tensor-parallel rank by its number, which all pipeline stages have."""
    pp, nodes = size_of(config, "pp_size", default=1), nodes_per_engine(config)
    if config.rollout.engine != "sglang" or pp == 1:
        return
    if config.cluster.colocate:
        where, shared = "on the trainer's GPUs (--colocate)", "GPU"
    else:
        where, shared = f"over {nodes} machines", "machine"
    if config.cluster.colocate or nodes > 1:
        yield (
            f"--sglang-pp-size {pp} on an engine {where}: SGLang would give each stage the weights of the first one's "
            f"{shared}; leave it out"
        )


def embedded_takes_no_sglang_arguments(config: Config, _: Architecture) -> Iterator[str]:
    """The embedded engine is no SGLang server."""
    if config.rollout.engine == "embedded" and config.sglang.args:
        given = ", ".join(spell(f"{SGLANG_KEY}.{name}") for name in config.sglang.args)
        yield f"{given}: only SGLang servers take it, and --rollout-engine embedded starts none; use sglang, or drop it"


def arguments_are_the_users(config: Config, _: Architecture) -> Iterator[str]:
    """Arguments the recipe sets itself are refused with the reason; tp_size may be said, if it is right."""
    for name, value in config.sglang.args.items():
        if name in _OWNED:
            yield f"{spell(f'{SGLANG_KEY}.{name}')} is not yours to set: {_OWNED[name]}"
        if name == "tp_size" and value != EngineLayout.of(config).tp:
            yield (
                f"{spell(f'{SGLANG_KEY}.{name}', value)} contradicts --rollout-num-gpus-per-engine "
                f"{config.sglang.rollout_num_gpus_per_engine}, which is the engine's tensor parallel size (times PP)"
            )


def attention_heads_divide(config: Config, architecture: Architecture) -> Iterator[str]:
    """SGLang: heads % (tp / dp) == 0, with attention data-parallel over dp groups of the engine's GPUs."""
    if config.rollout.engine == "embedded":
        return
    layout, heads = EngineLayout.of(config), architecture.num_attention_heads
    valid = [dp for dp in range(1, layout.tp + 1) if layout.tp % dp == 0 and heads % (layout.tp // dp) == 0]
    if layout.dp_attention:
        if layout.dp not in valid:
            parts = f"attention TP {layout.tp // layout.dp}, and {heads} heads do not divide by it"
            if layout.tp % layout.dp:
                parts = "no whole attention TP"
            yield (
                f"--sglang-dp-size {layout.dp} on an engine of TP {layout.tp} gives {parts}; "
                f"valid with --sglang-enable-dp-attention: {listed(valid)}"
            )
        elif layout.dp == 1:
            several = f", or --sglang-dp-size {listed(valid[1:])}" if valid[1:] else ""
            yield (
                "--sglang-enable-dp-attention with --sglang-dp-size 1 divides nothing, and SGLang fails at its first "
                f"batch; give --sglang-enable-dp-attention false{several}"
            )
    elif layout.dp > 1:
        yield (
            f"--sglang-dp-size {layout.dp} needs --sglang-enable-dp-attention; leave it out (--sglang-dp-size false), "
            "or, for copies of the whole model, lower --rollout-num-gpus-per-engine instead"
        )
    elif 1 not in valid:
        yield (
            f"--rollout-num-gpus-per-engine {layout.tp} does not divide the model's {heads} attention heads; "
            f"give --sglang-enable-dp-attention and --sglang-dp-size {listed(valid)}"
        )


def experts_divide(config: Config, architecture: Architecture) -> Iterator[str]:
    """SGLang: (experts + redundant experts) % ep_size == 0, and ep_size divides tp_size."""
    if config.rollout.engine == "embedded":
        return
    layout, experts = EngineLayout.of(config), architecture.n_routed_experts
    if layout.tp % layout.ep:
        yield f"--sglang-ep-size {layout.ep} does not divide the engine's tensor parallel size {layout.tp}"
        return
    total = experts + layout.redundant_experts
    if total % layout.ep == 0:
        return
    below = total // layout.ep * layout.ep
    nearest = [size for size in (below, below + layout.ep) if size >= experts]
    choices = listed(f"{size - experts} ({size} experts, {size // layout.ep} a GPU)" for size in nearest)
    yield (
        f"--sglang-ep-num-redundant-experts {layout.redundant_experts} makes {total} experts of the model's {experts}, "
        f"which --sglang-ep-size {layout.ep} does not divide; valid and nearest: {choices}"
    )


def head_and_dense_layers_are_laid_out(config: Config, _: Architecture) -> Iterator[str]:
    """SGLang: the output head follows DP attention only where there is some; dense MLPs are whole or over all GPUs."""
    if config.rollout.engine == "embedded":
        return
    layout, args = EngineLayout.of(config), config.sglang.args
    if args.get("enable_dp_lm_head") is True and not layout.dp_attention:
        yield (
            "--sglang-enable-dp-lm-head needs --sglang-enable-dp-attention; leave it out too "
            "(--sglang-enable-dp-lm-head false)"
        )
    dense_tp = size_of(config, "moe_dense_tp_size", default=layout.tp)
    if dense_tp not in (1, layout.tp):
        valid = listed(sorted({1, layout.tp}))
        yield f"--sglang-moe-dense-tp-size {dense_tp} on an engine of TP {layout.tp}; valid: {valid}"
    elif "moe_dense_tp_size" in args and layout.tp == 1:
        yield (
            "--sglang-moe-dense-tp-size on an engine of one GPU divides nothing, and SGLang fails at its first batch; "
            "give --sglang-moe-dense-tp-size false"
        )


def experts_stay_where_they_are(config: Config, _: Architecture) -> Iterator[str]:
    """Only SGLang's all-to-all backends ask where an expert is: without one, moved experts are still looked for where
    they were."""
    args = config.sglang.args
    if config.rollout.engine == "embedded" or args.get("moe_a2a_backend", "none") != "none":
        return
    moved = {"enable_eplb": args.get("enable_eplb", False) is True}
    moved["init_expert_location"] = args.get("init_expert_location", "trivial") != "trivial"
    for name in (name for name, is_given in moved.items() if is_given):
        yield (
            f"{spell(f'{SGLANG_KEY}.{name}')} moves experts, and without --sglang-moe-a2a-backend SGLang sends tokens "
            "to where they were; leave it out"
        )


def find_sglang_python(named: Path | None) -> Path | None:
    """The interpreter that SGLang is installed in: as `named`, this one, or that of .venv-sglang; None if there is
    none. Not resolved: an environment's interpreter is a link."""
    if named is not None:
        return named.absolute()
    if importlib.util.find_spec("sglang") is not None:
        return Path(sys.executable)
    return SGLANG_VENV_PYTHON if SGLANG_VENV_PYTHON.exists() else None


def checksums_are_comparable(config: Config, _: Architecture) -> Iterator[str]:
    """Each of SGLang's tensors is compared as a slice of the trainer's, or two of them one after the other."""
    if not config.rollout.check_weight_update_equal or config.rollout.engine == "embedded":
        return
    dtype = (("bfloat16" if config.model.bf16 else "float32",), "holds them in another type")
    for name, (allowed, effect) in {**_COMPARABLE, "dtype": dtype}.items():
        value = config.sglang.args.get(name)
        if value is not None and value not in allowed:
            yield (
                f"--check-weight-update-equal compares an engine's tensors with slices of the trainer's, and "
                f"{spell(f'{SGLANG_KEY}.{name}', value)} {effect}; leave one of the two out"
            )


def transfer_fits_the_engines(config: Config, _: Architecture) -> Iterator[str]:
    """Every member of a broadcast needs a device of its own."""
    if config.rollout.update_weight_transfer == "distributed" and config.cluster.colocate:
        yield "--update-weight-transfer distributed needs engines with GPUs of their own; with --colocate use tensor"


def weights_arrive_in_flight(config: Config, _: Architecture) -> Iterator[str]:
    """Engines stand still and go on: SGLang's pipeline stages do not look whether they are to, and engines that share
    the trainer's GPUs have nothing under way when weights come."""
    if (cache := config.rollout.update_weight_in_flight) is None:
        return
    flag = f"--update-weight-in-flight {cache}"
    if config.cluster.colocate:
        yield (
            f"{flag} and --colocate do not go together: engines give their memory to the trainer, so nothing is under "
            "way when weights come; give the engines GPUs of their own (--rollout-num-gpus), or leave it out"
        )
    if config.rollout.engine == "sglang" and (pp := size_of(config, "pp_size", default=1)) > 1:
        yield (
            f"{flag} and --sglang-pp-size {pp} do not go together: SGLang's pipeline stages do not stand still between "
            "two tokens; leave one of the two out"
        )


RULES = (
    engines_have_gpus,
    engines_lie_on_whole_machines,
    stages_open_one_memory,
    embedded_takes_no_sglang_arguments,
    arguments_are_the_users,
    attention_heads_divide,
    experts_divide,
    head_and_dense_layers_are_laid_out,
    experts_stay_where_they_are,
    checksums_are_comparable,
    transfer_fits_the_engines,
    weights_arrive_in_flight,
)
