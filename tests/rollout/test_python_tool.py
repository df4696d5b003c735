"""The Python tool: what code may do, and what it may not."""

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from fake_engines import FakeEngine, group_of, serving

from recipe.config import RolloutConfig
from recipe.data.tiny_tokenizer import build_tiny_tokenizer
from recipe.generation.custom_generate import Generation
from recipe.generation.examples import python_tool, sandbox
from recipe.generation.examples.python_tool import LONGEST_OUTPUT, run_python
from recipe.rollout.client import ClientOptions, RolloutClient
from recipe.sampling.sampling_params import SamplingParams


def can_be_confined() -> bool:
    try:
        return asyncio.run(run_python("print(7)", confined=True)) == "7"
    except RuntimeError:
        return False


CONFINED = can_be_confined()


@pytest.mark.parametrize("confined", [False, pytest.param(True, marks=pytest.mark.skipif(not CONFINED, reason="no"))])
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print(sum(range(101)))", "5050"),
        ("import math\nprint(math.comb(10, 3))", "120"),
        ("1/0", "ZeroDivisionError: division by zero"),
        ("print(", "SyntaxError: '(' was never closed"),
        ("x = bytearray(1 << 32)", "MemoryError"),
        pytest.param(
            "import os\nos.fork()", "BlockingIOError", marks=pytest.mark.skipif(os.geteuid() == 0, reason="not of root")
        ),
        ("with open('FOLDER/made', 'w') as file: file.write('x')", "OSError"),
        ("import os\nprint(*os.environ)", "LC_CTYPE"),
        ("import sys\nsys.exit(97)", ""),
    ],
)
async def test_what_code_prints_is_told(code: str, said: str, confined: bool, tmp_path: Path) -> None:
    told = (await run_python(code.replace("FOLDER", str(tmp_path)), confined=confined)).splitlines() or [""]
    assert told[-1].startswith(said)


async def test_code_that_takes_long_or_prints_much_is_ended() -> None:
    assert await run_python("while True: pass", confined=False, timeout_s=0.5) == "no result within 0.5 s"
    printed = await run_python("while True: print('x' * 1000)", confined=False, timeout_s=600.0)
    assert set(printed) == {"x", "\n"}
    assert len(printed) <= LONGEST_OUTPUT


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's code can start processes here")
async def test_who_keeps_its_output_open_holds_nobody_up(tmp_path: Path) -> None:
    (there := tmp_path / "there").touch()
    code = f"import os, time\nif not os.fork():\n os.setsid()\nwhile os.path.exists('{there}'): time.sleep(0.1)"
    try:
        async with asyncio.timeout(240):
            assert await run_python(code, confined=False, timeout_s=1.0) == "no result within 1 s"
    finally:
        there.unlink()


@pytest.mark.skipif(not CONFINED, reason="no user namespaces here")
async def test_confined_code_has_no_network_no_disk_and_sees_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = f"import socket\nprint(socket.create_connection(('127.0.0.1', {port}), 2))"
        assert "Error" in (await run_python(connect, confined=True)).splitlines()[-1]
        assert "<socket" in await run_python(connect, confined=False)
    assert "Read-only file system" in await run_python(
        "import os\nos.mkdir('/tmp/made-by-confined-code')", confined=True
    )
    assert await run_python("import os\nprint(os.listdir('/proc'))", confined=True) == "[]"


def program_without_namespaces(folder: Path) -> Path:
    program = folder / "sandbox.py"
    text = Path(sandbox.__file__).read_text()
    program.write_text(text.replace("NEW_NAMESPACES = ", "NEW_NAMESPACES = 1 | "))  # no flag of unshare's
    return program


async def test_where_it_cannot_be_confined_it_is_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(python_tool, "SANDBOX", str(program_without_namespaces(tmp_path)))
    with pytest.raises(RuntimeError, match=r"cannot be confined here: .*no namespaces"):
        await run_python("print(7)", confined=True)
    assert await run_python("print(7)", confined=False) == "7"


async def test_the_model_reads_what_its_code_prints() -> None:
    tokenizer, turns = build_tiny_tokenizer(), ["so <tool_call>print(2**20)", "\\boxed{1048576}"]

    async def say(body: dict[str, Any]) -> web.Response:
        turn = turns[len(engine.bodies) - 1]
        ids = tokenizer.encode(turn, add_special_tokens=False)
        ended = {"type": "stop", **({"matched": python_tool.END} if len(engine.bodies) == 1 else {})}
        meta = {"finish_reason": ended, "weight_version": "1", "output_token_logprobs": [[-0.5, i, None] for i in ids]}
        return web.json_response([{"text": turn, "output_ids": ids, "meta_info": meta}])

    engine, group = FakeEngine(say), group_of(n_samples=1)
    path = "recipe.generation.examples.python_tool:generate_with_limits_only"
    rollout = RolloutConfig(
        num_rollout=1, rollout_batch_size=1, rollout_max_response_len=99, custom_generate_function_path=path
    )
    options = ClientOptions(generation=Generation.of(rollout, tokenizer, 128))
    async with serving(engine) as urls, RolloutClient(urls, options) as client:
        await client.generate(group, SamplingParams(max_new_tokens=99), [1])
    assert group.samples[0].response == turns[0] + "<tool_response>1048576</tool_response>" + turns[1]
