"""What a run reads before anything is started: prompts, and what grades the responses to them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from recipe.config import Config, Resolved
from recipe.data.mixture import PromptFile, open_draws
from recipe.data.prompts import PromptFormat, read_prompts
from recipe.data.source import Draws
from recipe.data.tokenizer import load_tokenizer
from recipe.generation.custom_generate import Generation
from recipe.generation.turns import Codec
from recipe.messages import Evaluated
from recipe.rewards.functions import REWARD_RULES, CustomReward, Reward, RewardRule, RewardType
from recipe.rewards.grader import check_custom_reward
from recipe.rollout.client import RolloutClient
from recipe.rollout.filters import GroupFilter, load_filter
from recipe.rollout.generate import OnGroup
from recipe.system.imports import load_function

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Evaluation(AbstractContextManager[object], Protocol):
    """What `--eval-function-path` makes of a resolved configuration: held-out sets, read and checked, and whatever
    scores the answers to them, which lives as long as the context."""

    async def evaluate(self, client: RolloutClient, grade: OnGroup, *, expected_version: str) -> dict[str, Evaluated]:
        """The score of the engines' weights, which must have this version, on each set, by its name. `grade` leaves the
        training reward's grades in a group's samples."""


@dataclass(frozen=True)
class Data:
    """The prompts of a run, and what grades the responses to them."""

    source: Draws
    evaluation: Evaluation | None
    """None where there is no evaluation set."""
    reward: Reward | None
    keep: GroupFilter | None
    """The dynamic sampling filter."""
    generation: Generation
    """How samples are generated."""
    tokenizer: "PreTrainedTokenizerFast"
    texts: dict[int, str] = field(default_factory=dict)
    """Of tokens that were shown."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        return Codec(self.tokenizer).decode(ids)

    def decode_pieces(self, ids: Sequence[int]) -> str:
        """As `decode`; that of a single token is found once."""
        if len(ids) > 1:
            return self.decode(ids)
        if (text := self.texts.get(ids[0])) is None:
            text = self.texts[ids[0]] = self.decode(ids)
        return text

    @classmethod
    def read(cls, resolved: Resolved) -> "Data":
        """Reads and checks every file, and the user's functions, before anything is started. Raises UserError for what
        is wrong in them."""
        config = resolved.config
        reward = _reward(config)
        if (custom := config.grpo.custom_tis_function_path) is not None:
            load_function("--custom-tis-function-path", custom)
        tokenizer = load_tokenizer(config.model.hf_checkpoint)
        source = _draws(resolved, tokenizer, reward)
        keep = config.rollout.dynamic_sampling_filter_path
        generation = Generation.of(config.rollout, tokenizer, resolved.architecture.vocab_size)
        chooses = load_filter(keep) if keep is not None else None
        return cls(source, _evaluation(resolved), reward, chooses, generation, tokenizer)


def _draws(resolved: Resolved, tokenizer: "PreTrainedTokenizerFast", reward: Reward | None) -> Draws:
    """The prompt files, read. With a reward function of the user's nothing is asked of labels and metadata."""
    data, rule = resolved.config.data, reward if isinstance(reward, RewardRule) else None
    form = PromptFormat(
        input_key=data.input_key,
        label_key=data.label_key,
        response_key=data.response_key if resolved.config.is_sft else None,
        apply_chat_template=data.apply_chat_template,
        template_kwargs=data.apply_chat_template_kwargs,
        tool_key=data.tool_key,
        label_problem=None if rule is None else rule.label_problem,
        metadata_key=None if rule is None else data.metadata_key,
        label_problems={name: one.label_problem for name, one in REWARD_RULES.items()},
    )
    longest = resolved.max_prompt_len
    files = [
        PromptFile(
            file.name, read_prompts(file.path, tokenizer, form, max_tokens=longest, drop_longer=True), file.weight
        )
        for file in data.prompt_data
    ]
    return open_draws(files, shuffle=data.rollout_shuffle, seed=resolved.config.misc.seed)


def _evaluation(resolved: Resolved) -> Evaluation | None:
    config = resolved.config.eval
    if not config.eval_prompt_data:
        return None
    evaluation: Evaluation = load_function("--eval-function-path", config.eval_function_path)(resolved)
    return evaluation


def _reward(config: Config) -> Reward | None:
    if config.rollout.custom_rm_path is not None:
        check_custom_reward(config.rollout.custom_rm_path)
        return CustomReward(config.rollout.custom_rm_path, config.rollout.group_rm)
    return None if config.rollout.rm_type is None else REWARD_RULES[RewardType(config.rollout.rm_type)]
