"""A run whose engines fail while they are sent weights: python -m struck_update [the flags of recipe.train].

As the weights of version 2 are sent, one engine is killed and the other one is stopped.
"""

from collections.abc import Mapping

import psutil
import run_support

from recipe.cluster import trainer_group as trainer
from recipe.system.errors import run_main
from recipe.train import main
from recipe.weight_sync.result import UpdateResult

update_weights = trainer.TrainerGroup.update_weights
struck: list[str] = []


def struck_update(self: trainer.TrainerGroup, engines: Mapping[int, str], version: str) -> UpdateResult:
    """`TrainerGroup.update_weights`, with the failures at its first call for version 2."""
    if version == "2" and not struck:
        struck.append(version)
        run_support.strike(*run_support.engines(psutil.Process()))
    return update_weights(self, engines, version)


if __name__ == "__main__":
    trainer.TrainerGroup.update_weights = struck_update  # type: ignore[method-assign]
    run_main(main)
