"""The processes of a conversion leave each other before Python ends."""

import pytest
import torch.distributed as dist

from recipe.conversion.processes import Processes
from recipe.system.errors import UserError


def test_nothing_of_the_meeting_is_left() -> None:
    """gloo's threads, left to the end of the interpreter, abort about one run in five."""
    with Processes.joined() as processes:
        assert processes.gather({"a": 1}) == {"a": 1}
    assert not dist.is_initialized()
    with pytest.raises(UserError, match="told"), Processes.joined():
        raise UserError("told")
    assert not dist.is_initialized()
