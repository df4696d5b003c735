#!/usr/bin/env python3
"""What an image of `invoke image` holds: its size, and what training and rollout import, imported in it.

    scripts/check_image.py [--image TAG] [--gpus]

Without --gpus nothing is imported that loads the driver. Exits with 1 if anything cannot be imported.
"""

import argparse
import json

from docker.types import DeviceRequest

from recipe.container.build import IMAGE
from recipe.container.engine import connect
from recipe.system.errors import run_main

PACKAGES = (
    "torch",
    "triton",
    "megatron.core",
    "ray",
    "transformers",
    "sympy",
    "sglang",
    "sglang.srt.server_args",
)
WITH_DRIVER = ("sgl_kernel", "flashinfer")
PROGRAM = """
import importlib, json, sys, time
for name in sys.argv[1:]:
    started = time.monotonic()
    try:
        module = importlib.import_module(name)
        said = str(getattr(module, "__version__", "imported"))
    except Exception as error:
        said = f"FAILED: {type(error).__name__}: {error}"
    print(json.dumps({"name": name, "said": said, "seconds": time.monotonic() - started}), flush=True)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", default=IMAGE)
    parser.add_argument("--gpus", action="store_true", help="import the kernels too")
    options = parser.parse_args()
    packages = PACKAGES + WITH_DRIVER * options.gpus
    with connect() as client:
        image = client.images.get(options.image)
        output = client.containers.run(
            image,
            ["python", "-c", PROGRAM, *packages],
            device_requests=[DeviceRequest(count=-1, capabilities=[["gpu"]])] if options.gpus else [],
            shm_size="1g",
            remove=True,
        )
    print(f"{options.image}: {image.attrs['Size'] / 1e9:.1f} GB")
    found = [json.loads(line) for line in output.decode().splitlines() if line.startswith("{")]
    for one in found:
        print(f"{one['name']:24} {one['said']} ({one['seconds']:.1f} s)")
    return int(len(found) < len(packages) or any(one["said"].startswith("FAILED") for one in found))


if __name__ == "__main__":
    run_main(main)
