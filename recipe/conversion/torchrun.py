"""torchrun that leaves the last word to the processes: of one that fails, its own sentence is what is printed.

python -m recipe.conversion.torchrun --nproc-per-node N -m MODULE ...     on this machine; ends with the status of the
                                                                          first process that failed
"""

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> int:
    logging.disable(logging.ERROR)  # of this process, which only says what the others have said better
    try:
        run.main(["--standalone", *sys.argv[1:]])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
