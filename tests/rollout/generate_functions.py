"""Functions for --custom-generate-function-path, good ones and others."""

import asyncio
import sys
from contextlib import suppress

from recipe.generation.turns import GenerateSettings, TurnEngine
from recipe.sampling.sample import Sample

TOOL = [30, 31, 32]
"""What the tool says."""


async def one_turn(sample: Sample, engine: TurnEngine, settings: GenerateSettings) -> Sample:
    await engine.generate()
    return sample


class Tool:
    """Three turns of up to 6 tokens with a tool between them, which may take its time."""

    def __init__(self) -> None:
        self.is_open, self.asked, self.ended = asyncio.Event(), asyncio.Event(), 0
        self.is_open.set()

    async def generate(self, sample: Sample, engine: TurnEngine, settings: GenerateSettings) -> None:
        while sample.turns < 3 or sample.turn_end is None:
            await engine.generate(max_new_tokens=6)
            if sample.turns < 3:
                self.asked.set()
                try:
                    await self.is_open.wait()
                finally:
                    self.ended += 1
                sample.append_environment(TOOL)


async def raises(sample: Sample, engine: TurnEngine, settings: GenerateSettings) -> None:
    await engine.generate()
    raise ZeroDivisionError("the tool\nbroke")


async def leaves(sample: Sample, engine: TurnEngine, settings: GenerateSettings) -> None:
    sys.exit(3)


async def hangs(sample: Sample, engine: TurnEngine, settings: GenerateSettings) -> None:
    await engine.generate()
    await asyncio.Event().wait()


async def hangs_on(sample: Sample, engine: TurnEngine, settings: GenerateSettings) -> None:
    """Though it is cancelled."""
    for _ in range(3):
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            continue


async def returns_text(sample: Sample, engine: TurnEngine, settings: GenerateSettings) -> object:
    await engine.generate()
    return sample.response


async def says_nothing(sample: Sample, engine: TurnEngine, settings: GenerateSettings) -> None:
    sample.append_environment(TOOL)


async def lacks_log_probs(sample: Sample, engine: TurnEngine, settings: GenerateSettings) -> None:
    await engine.generate()
    sample.response_ids += [5, 6]


async def trains_on_the_tool(sample: Sample, engine: TurnEngine, settings: GenerateSettings) -> None:
    await engine.generate()
    sample.append_environment(TOOL)
    sample.loss_mask[-1] = 1


async def tells_another_vocabulary(sample: Sample, engine: TurnEngine, settings: GenerateSettings) -> None:
    await engine.generate(max_new_tokens=2)
    sample.append_environment([100_000])
    await engine.generate()


async def never_ends(sample: Sample, engine: TurnEngine, settings: GenerateSettings) -> None:
    while True:
        await engine.generate(max_new_tokens=2)
        sample.append_environment(TOOL)


class Impatient:
    """Gives up a turn that is under way, and asks for another."""

    def __init__(self) -> None:
        self.is_asked = asyncio.Event()
        """The engine has the turn."""

    async def generate(self, sample: Sample, engine: TurnEngine, settings: GenerateSettings) -> None:
        turn = asyncio.create_task(engine.generate())
        await self.is_asked.wait()
        turn.cancel()
        with suppress(asyncio.CancelledError):
            await turn
        await engine.generate()


async def fails_at_the_second(sample: Sample, engine: TurnEngine, settings: GenerateSettings) -> None:
    if sample.index % 4 == 1:
        raise KeyError("no such room")
    await engine.generate()


async def takes_two(sample: Sample, engine: TurnEngine) -> None: ...


def is_not_async(sample: Sample, engine: TurnEngine, settings: GenerateSettings) -> None: ...
