#!/usr/bin/env python3
"""The page of `make watch` on a long run: seconds of each answer and the server's memory, beside plain reads of the
same files in the same run; and seconds until a browser, where there is one, shows the curves.

    scripts/bench_watch.py [--steps 3000] [--samples 256] [--characters 500]
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
from browser import CHROMIUM, open_browser
from made_up_run import write_run

from recipe.system.errors import UserError, run_main

QUESTIONS = {
    "list of runs": "api/runs",
    "head": "api/run/long/head",
    "curves": "api/run/long/metrics",
    "head again": "api/run/long/head",
    "newest samples": "api/run/long/samples",
    "filter by reward and length": "api/run/long/samples?min_reward=1&min_length=4000&sort=length",
    "filter by words": "api/run/long/samples?finish=length&grade=truncated",
    "search a text that is everywhere": "api/run/long/samples?text=carry",
    "search a text that is nowhere": "api/run/long/samples?text=nowhere%20at%20all",
    "one sample": "api/run/long/sample?rollout=2&line=3",
    "course of a rollout": "api/run/long/timeline?rollout=2",
}


def serve(folder: Path) -> Iterator[tuple[psutil.Process, str]]:
    """The server's process and address; ended afterwards."""
    command = [sys.executable, "-m", "recipe.run.watch", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            first = process.stdout.readline()
            if " http" not in first:
                raise UserError("the page's server does not start")
            yield psutil.Process(process.pid), first.split()[-1]
        finally:
            process.terminate()


def plain_read(run: Path) -> float:
    """Seconds to read the files of numbers, and to parse them as JSON."""
    began = time.perf_counter()
    for name in ("metrics.jsonl", "samples.jsonl", "conditions.jsonl"):
        for line in (run / name).read_bytes().splitlines():
            json.loads(line)
    return time.perf_counter() - began


async def seconds_to_curves(address: str, profile: Path) -> float:
    """From the address to the last chart of the window."""
    async with open_browser(profile) as page:
        await page.resize(1280)
        await page.open("about:blank")
        began = time.perf_counter()
        await page.call("Page.navigate", url=address)
        await page.until("document.querySelectorAll('#curves .chart canvas').length >= 9")
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--samples", type=int, default=256, help="of a step")
    parser.add_argument("--characters", type=int, default=500, help="of a response, about")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "long"
        write_run(run, options.steps, options.samples, options.characters)
        size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
        print(f"{options.steps} steps of {options.samples} samples, {size / 1e9:.2f} GB")
        for process, address in serve(Path(folder)):
            for name, path in QUESTIONS.items():
                began = time.perf_counter()
                with urllib.request.urlopen(address + path) as answer:
                    found = answer.read()
                took = time.perf_counter() - began
                print(f"{name:<34}{took:7.3f} s {len(found) / 1e6:8.2f} MB {process.memory_info().rss / 1e6:6.0f} MB")
        if CHROMIUM is not None:
            for _, address in serve(Path(folder)):
                took = asyncio.run(seconds_to_curves(f"{address}#/run/long", Path(folder) / "profile"))
                print(f"{'a new server, in a browser':<34}{took:7.3f} s")
        print(f"{'the same numbers, read plainly':<34}{plain_read(run):7.3f} s")


if __name__ == "__main__":
    run_main(main)
