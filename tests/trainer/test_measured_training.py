"""A training step under measurement, as `make tune MEASURE=1` has it: the real trainer, on two CPU processes."""

import psutil
import pytest
from trainer_support import random_checkpoint, tiny_config

from recipe.config import Architecture, Resolved
from recipe.plan.hardware import Machine
from recipe.plan.lengths import Lengths
from recipe.plan.time_plan import Work
from recipe.smoke import training


@pytest.mark.usefixtures("forked_together")
def test_a_slice_of_a_run_is_trained_and_timed() -> None:
    """Of one with a reference model, replayed routing, pipeline stages and the MTP layer, which the slice lacks."""
    checkpoint = random_checkpoint()
    config = tiny_config(
        checkpoint,
        cluster={"actor_num_gpus_per_node": 4},
        grpo={"use_kl_loss": True, "kl_loss_coef": 0.1, "use_routing_replay": True},
        perf={"expert_model_parallel_size": 4, "pipeline_model_parallel_size": 2},
    )
    resolved = Resolved(config, Architecture.from_checkpoint(checkpoint), {}, ())
    machine = Machine.described("H100", 2, "1TB", None, 2.5)
    found = training.measure_training(resolved, machine, Lengths.log_normal(8, 0.5, 16))
    assert [one.kind.work for one in found] == [Work.TRAIN, Work.OPTIMIZER]
    for one in found:
        assert one.seconds > 0
        assert 0 < one.planned_best <= one.planned_worst < one.seconds, "it is no H100"
    mine = psutil.Process()
    assert not [child for child in mine.children(recursive=True) if "train_slice" in " ".join(child.cmdline())]
