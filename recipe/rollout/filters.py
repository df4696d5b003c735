"""Dynamic sampling: which graded groups are worth learning from (DAPO: Yu et al., arXiv:2503.14476, section 3.2)."""

from collections.abc import Callable, Mapping

import numpy as np

from recipe.sampling.sample import SampleGroup
from recipe.system.errors import UserError
from recipe.system.imports import load_function

FLAG = "--dynamic-sampling-filter-path"

GroupFilter = Callable[[SampleGroup], bool]
"""Whether a graded group is kept."""


def check_reward_nonzero_std(group: SampleGroup) -> bool:
    """Keeps a group whose rewards differ: where all are equal every advantage is 0."""
    return len({sample.reward for sample in group.samples if not sample.is_left_out}) > 1


BUILT_IN: Mapping[str, GroupFilter] = {"check_reward_nonzero_std": check_reward_nonzero_std}


def load_filter(path: str) -> GroupFilter:
    """A built-in filter by its name, or the user's "module:function", which takes a SampleGroup and returns a bool.
    Raises UserError if there is none; calls raise UserError for what goes wrong in the user's function."""
    if path in BUILT_IN:
        return BUILT_IN[path]
    function = load_function(FLAG, path)

    def keep(group: SampleGroup) -> bool:
        try:
            verdict = function(group)
        except (Exception, SystemExit) as error:
            raise UserError(f"{FLAG} {path} failed: {type(error).__name__}: {error}") from error
        if isinstance(verdict, np.generic):
            verdict = verdict.item()
        if not isinstance(verdict, bool):
            raise UserError(f"{FLAG} {path} returned {verdict!r}; it must return True to keep a group, or False")
        return verdict

    return keep
