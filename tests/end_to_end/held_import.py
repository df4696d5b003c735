"""`slow_reward`, in a module that is imported when the file MAY_IMPORT is there: until then a run is starting."""

import os
import time
from pathlib import Path

from run_support import slow_reward

__all__ = ["slow_reward"]

while not Path(os.environ["MAY_IMPORT"]).exists():
    time.sleep(0.05)
