"""Python for the model, for problems of mathematics: what stands between `<tool_call>` and `</tool_call>` is run, and
answered by what it prints, in `<tool_response>`.

--custom-generate-function-path recipe.generation.examples.python_tool:generate
--custom-generate-function-path recipe.generation.examples.python_tool:generate_with_limits_only

The code runs in a process of its own (`sandbox.py`); docs/custom-generation.md says what that does not protect from.
The first function fails where a process cannot be confined; the second one confines nothing.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO

from recipe.generation.examples.sandbox import READY
from recipe.generation.turns import GenerateSettings, TurnEngine
from recipe.sampling.sample import Sample

START, END = "<tool_call>", "</tool_call>"
TIMEOUT_S = 30.0
LONGEST_OUTPUT = 2000
"""Characters of what the code prints that the model reads."""
SANDBOX = str(Path(__file__).with_name("sandbox.py"))


async def generate(sample: Sample, engine: TurnEngine, settings: GenerateSettings) -> None:
    """Turns of the model until one ends without a call; the code is confined."""
    await _generate(sample, engine, settings, confined=True)


async def generate_with_limits_only(sample: Sample, engine: TurnEngine, settings: GenerateSettings) -> None:
    """As `generate`, with limits of memory, time, files and processes alone."""
    await _generate(sample, engine, settings, confined=False)


async def _generate(sample: Sample, engine: TurnEngine, settings: GenerateSettings, *, confined: bool) -> None:
    while (turn := await engine.generate(stop=(END,))).matched == END:
        said = await run_python(turn.text.rpartition(START)[2], confined=confined)
        sample.append_environment(settings.encode(f"<tool_response>{said}</tool_response>"))


async def run_python(code: str, *, confined: bool, timeout_s: float = TIMEOUT_S) -> str:
    """What the code prints, errors too. Raises RuntimeError if it cannot be confined."""
    words = [] if confined else ["--limits-only"]
    async with _pipe() as (printed, theirs):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", SANDBOX, *words),
            stdin=asyncio.subprocess.PIPE,
            stdout=theirs,
            stderr=asyncio.subprocess.STDOUT,
            cwd="/",
            env={},
            start_new_session=True,
        )
        theirs.close()
        try:
            async with asyncio.timeout(timeout_s):
                output = await _conversation(process, code, printed)
        except TimeoutError:
            return f"no result within {timeout_s:g} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if not output.startswith(READY):
        raise RuntimeError(f"Python cannot be confined here: {output}")
    return output.removeprefix(READY).strip()


@asynccontextmanager
async def _pipe() -> AsyncIterator[tuple[asyncio.StreamReader, IO[bytes]]]:
    """Both ends. Of a pipe that asyncio makes for a process it reads only what somebody takes, and until the pipe ends
    the process has not ended for it."""
    reading, writing = os.pipe()
    reader = asyncio.StreamReader()
    with os.fdopen(writing, "wb") as theirs:
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb")
        )
        try:
            yield reader, theirs
        finally:
            transport.close()


async def _conversation(process: asyncio.subprocess.Process, code: str, printed: asyncio.StreamReader) -> str:
    """What it prints, up to the longest that is read."""
    assert process.stdin is not None
    with suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(code.encode(errors="replace"))
        await process.stdin.drain()
        process.stdin.close()
    output = b""
    while len(output) <= LONGEST_OUTPUT and (more := await printed.read(LONGEST_OUTPUT)):
        output += more
    if len(output) <= LONGEST_OUTPUT:
        await process.wait()
    return output.decode(errors="replace")[:LONGEST_OUTPUT]
