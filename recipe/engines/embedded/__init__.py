"""A small engine for machines without a GPU: the model in plain torch behind SGLang's HTTP API.

Its results do not depend on what else is being generated: the same request gives the same bits.
"""

import os

# Read by the OpenMP runtime when torch is imported. Its threads then sleep, not spin, while they wait for one another:
# on cores that are shared with a trainer or a client this is several times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
