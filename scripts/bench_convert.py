#!/usr/bin/env python3
"""Conversion and export beside `cp -r` + fsync of the same bytes on the same disk, with peak memory.

Writes a synthetic bf16 checkpoint with the expert shapes of GLM-4.7-Flash but fewer layers, then, in turns: copies it,
converts it to torch_dist, exports that again. Figures as a table and, with --output, as JSON.

    scripts/bench_convert.py [--directory DIR] [--moe-layers 5] [--processes N] [--rounds 3] [--output FILE]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from glm_flash import TINY, write_synthetic

SAMPLE_S = 0.05
COPY = "cp -r + fsync"


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds, and the peak of the anonymous memory (what is not page cache) of its processes together in GB."""
    began, peak = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(SAMPLE_S)
    assert process.stderr is not None
    if process.returncode:
        sys.exit(process.stderr.read())
    return time.monotonic() - began, peak / 1e9


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process and its descendants."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            status = Path(f"/proc/{process.pid}/status").read_text()
            total += next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon"))
    except (psutil.NoSuchProcess, OSError, StopIteration):
        return 0
    return total


def copy_with_fsync(source: Path, target: Path) -> None:
    """`cp -r`, then fsync of every file."""
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for file in target.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def launcher(processes: int) -> list[str]:
    """What starts a module in so many processes."""
    if processes == 1:
        return [sys.executable, "-m"]
    return [sys.executable, "-m", "recipe.conversion.torchrun", f"--nproc-per-node={processes}", "-m"]


def settle(source: Path) -> None:
    """The same state before every measurement: its source just read, and as much memory just freed as it will fill. (On
    a virtual machine memory that the host must find first costs more than the copy.)"""
    scratch = source.with_name("scratch")
    copy_with_fsync(source, scratch)
    shutil.rmtree(scratch)
    os.sync()


def run_round(folder: Path, processes: int) -> dict[str, tuple[float, float]]:
    """One measurement of each: seconds and GB."""
    hf, copied, converted, exported = (folder / name for name in ("hf", "copy", "torch_dist", "exported"))
    settle(hf)
    began = time.monotonic()
    copy_with_fsync(hf, copied)
    found = {COPY: (time.monotonic() - began, 0.0)}
    shutil.rmtree(copied)
    layout = ["--expert-model-parallel-size", str(processes)]
    convert = [
        "recipe.conversion.convert",
        "--hf-checkpoint",
        str(hf),
        "--save",
        str(converted),
        "--mtp-num-layers",
        "1",
    ]
    settle(hf)
    found["convert"] = measure([*launcher(processes), *convert, *layout])
    export = ["recipe.conversion.export", "--load", str(converted), "--hf-checkpoint", str(hf), "--save", str(exported)]
    settle(converted)
    found["export"] = measure([*launcher(processes), *export])
    for directory in (converted, exported):
        shutil.rmtree(directory)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--directory", type=Path, help="where to work, about 4 times the checkpoint's size; default: /tmp"
    )
    parser.add_argument("--moe-layers", type=int, default=5)
    parser.add_argument("--processes", type=int, default=min(8, len(os.sched_getaffinity(0))))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a model that only shows that it works")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        folder = Path(name)
        size = write_synthetic(folder / "hf", arguments.moe_layers, **(TINY if arguments.tiny else {}))
        print(f"{size / 1e9:.3g} GB, {arguments.processes} processes, {arguments.rounds} rounds", flush=True)
        rounds = [run_round(folder, arguments.processes) for _ in range(arguments.rounds)]
    ratios = {}
    for what in rounds[0]:
        seconds = [found[what][0] for found in rounds]
        ratios[what] = statistics.median(found[what][0] / found[COPY][0] for found in rounds)
        peak = max(found[what][1] for found in rounds)
        times = " ".join(f"{second:.1f}" for second in seconds)
        print(f"{what:14} {times} s, median of the ratios to cp {ratios[what]:.2f}, peak {peak:.2f} GB", flush=True)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({"bytes": size, "rounds": rounds, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
