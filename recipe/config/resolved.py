"""From a command line to a checked configuration, and the table that shows it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recipe.config.advice import notes_of
from recipe.config.architecture import Architecture
from recipe.config.checks import problems_of
from recipe.config.error_text import refuse
from recipe.config.fields import Group, PromptData
from recipe.config.flags import SGLANG_KEY, parse_command_line
from recipe.config.loading import build_config, read_settings, trace_sources, without_flags
from recipe.config.schema import Config

_WIDEST_VALUE = 40


@dataclass(frozen=True)
class Resolved:
    """A valid configuration and what is known about it before anything starts.

    `sources` says for every dotted field where its value came from: "default", "recipe FILE" or "flag"; `notes` are
    sentences on what the configuration implies.
    """

    config: Config
    architecture: Architecture
    sources: Mapping[str, str]
    notes: tuple[str, ...]
    recipe: str | None = None
    """The recipe that flags change, as it was named."""
    instead_of: Mapping[str, object] = field(default_factory=dict)
    """What the recipe has, or the default is, by the key of each field that a flag set."""

    @property
    def max_context_len(self) -> int:
        """Longest prompt and response together, in tokens."""
        return self.config.rollout.rollout_max_context_len or self.architecture.max_position_embeddings

    @property
    def max_prompt_len(self) -> int:
        """Longest prompt in tokens: as given, or what the context leaves beside the longest response."""
        given = self.config.data.rollout_max_prompt_len
        return given or self.max_context_len - self.config.rollout.rollout_max_response_len

    @property
    def max_eval_prompt_len(self) -> int:
        """Longest evaluation prompt in tokens: what the context leaves beside the longest response."""
        evaluation, rollout = self.config.eval, self.config.rollout
        return self.max_context_len - (evaluation.eval_max_response_len or rollout.rollout_max_response_len)

    def describe(self) -> str:
        """The configuration as a table a group: field = value (source), then what follows from it."""
        config = self.config
        derived = {
            "world_size": config.world_size,
            "data_parallel_size": config.data_parallel_size,
            "num_engines": config.num_engines,
            "samples_per_rollout": config.samples_per_rollout,
            "global_batch_size": config.global_batch_size,
            "steps_per_rollout": config.steps_per_rollout,
            "needs_reference": config.needs_reference,
            "needs_old_log_probs": config.needs_old_log_probs,
            "max_prompt_len": self.max_prompt_len,
        }
        sections = [
            *(_table(f"[{name}]", self._rows(name, group)) for name, group in config),
            _table(f"architecture ({config.model.hf_checkpoint / 'config.json'})", self.architecture),
            _table("what follows", derived.items()),
            "\n".join(f"note: {note}" for note in self.notes),
        ]
        return "\n\n".join(section for section in sections if section)

    @property
    def sglang_left_out(self) -> tuple[str, ...]:
        """SGLang's arguments that are said to be false."""
        said = (key.removeprefix(f"{SGLANG_KEY}.") for key in self.sources if key.startswith(f"{SGLANG_KEY}."))
        return tuple(name for name in said if name not in self.config.sglang.args)

    def _rows(self, name: str, group: Group) -> Iterator[tuple[str, object, str]]:
        """A group's fields with their sources: SGLang's arguments one by one, no architecture flag nobody gave."""
        for of_group, value in group:
            key = f"{name}.{of_group}"
            if name == "model" and value is None:
                continue
            if key == SGLANG_KEY:
                arguments = value | dict.fromkeys(self.sglang_left_out, False)
                yield from ((f"args.{arg}", item, self.sources[f"{key}.{arg}"]) for arg, item in arguments.items())
            else:
                yield of_group, value, self.sources[key]


def _table(title: str, rows: Iterable[tuple[Any, ...]]) -> str:
    """Aligned lines `name = value  (source)` under a title."""
    lines = [(name, shown_value(value), *source) for name, value, *source in rows]
    width = max(len(line[0]) for line in lines)
    value_width = max(min(len(line[1]), _WIDEST_VALUE) for line in lines)
    return "\n".join([title, *(_line(width, value_width, *line) for line in lines)])


def _line(width: int, value_width: int, name: str, value: str, source: str | None = None) -> str:
    line = f"  {name:<{width}} = {value:<{value_width}}"
    return f"{line}  ({source})" if source else line.rstrip()


def shown_value(value: object) -> str:
    """A value of the configuration as tables have it."""
    match value:
        case None:
            return "-"
        case bool():
            return str(value).lower()
        case PromptData():
            return str(value)
        case tuple() | list():
            return " ".join(map(shown_value, value)) or "-"
    return str(value)


def resolve(argv: Sequence[str]) -> Resolved:
    """The checked configuration of a command line (without the program's name).

    Raises UserError for anything unknown, missing, out of bounds or contradictory: every problem of a stage at once.
    """
    command_line = parse_command_line(argv)
    settings = read_settings(command_line)
    config = build_config(settings)
    architecture = Architecture.from_checkpoint(config.model.hf_checkpoint)
    refuse(problems_of(config, architecture))
    return Resolved(
        config,
        architecture,
        trace_sources(settings),
        notes_of(config, architecture),
        command_line.recipe,
        without_flags(command_line),
    )
