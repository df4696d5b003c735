import asyncio
import signal

import pytest

from recipe.download.interruptible import run_interruptible


class Handled(BaseException):
    pass


@pytest.fixture
def handler():
    def handle(number, frame):
        raise Handled(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handle) for number in numbers}
    yield handle
    for number, old in before.items():
        signal.signal(number, old)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_its_handler_when_everything_has_unwound(handler, caplog, number):
    events = []

    async def work():
        try:
            signal.raise_signal(number)
            events.append("the step goes on")
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            events.append("closed")

    async def works():
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(work())

    with pytest.raises(Handled):
        run_interruptible(works())
    assert events == ["the step goes on", "closed"]
    assert signal.getsignal(number) is handler
    assert caplog.text == ""


def test_without_a_signal_errors_come_through_and_handlers_come_back(handler):
    async def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run_interruptible(fail())
    assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is handler
