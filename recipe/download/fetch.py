"""Fetching what is missing, and recording what is there."""

import asyncio
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import BufferedWriter
from pathlib import Path

import httpx
from rich.console import Console

from recipe.download.display import TransferDisplay
from recipe.download.hub import Hub, HubFile, Interruption, RangeRefused
from recipe.download.hub_repos import RepoType
from recipe.download.integrity import count_rows, difference
from recipe.download.interruptible import run_interruptible
from recipe.download.plan import WORK_NAME, Plan
from recipe.download.record import FileRecord, Record
from recipe.system.errors import DISK_IS_FULL, UserError
from recipe.system.files import FileLock, sha256_file, sync

CONNECTIONS = 8
RETRY_WAITS_S = (1.0, 2.0, 4.0, 8.0, 8.0)
"""Before each retry of a file; they begin anew when one has brought the file further."""


def fetch(plan: Plan, hub: Hub, console: Console) -> Record:
    """Carries out a plan and returns the directory's record, which is then complete.

    Raises UserError if the hub does not send a file or sends a wrong one, if a data set's file is not as it has to be,
    if the disk is full, or if another download is at work in the directory. What has arrived until then is kept, but
    for wrong files, and serves the next attempt.
    """
    work = plan.directory / WORK_NAME
    with _writing(plan):
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(work / "lock", f"another download is at work in {plan.directory}: wait until it has ended"):
            plan.record.write(plan.directory)
            with TransferDisplay(plan.missing, plan.bytes_to_fetch, console) as display:
                run_interruptible(_Transfer(plan, hub, display).run())
            now = datetime.now(UTC).isoformat(timespec="seconds")
            record = plan.record.model_copy(update={"files": _describe(plan), "downloaded_at": now})
            record.write(plan.directory)
            shutil.rmtree(work, ignore_errors=True)
    return record


class _Transfer:
    """Fetches the missing files of a plan side by side."""

    def __init__(self, plan: Plan, hub: Hub, display: TransferDisplay) -> None:
        self._plan = plan
        self._hub = hub
        self._display = display
        self._connections = asyncio.Semaphore(CONNECTIONS)

    async def run(self) -> None:
        """Returns when every file is verified and in its place. The first failure ends it and is raised."""
        try:
            async with self._hub.session() as session, asyncio.TaskGroup() as tasks:
                for file in self._plan.missing:
                    tasks.create_task(self._fetch(session, file))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _fetch(self, session: httpx.AsyncClient, file: HubFile) -> None:
        partial = self._plan.partial(file)
        async with self._connections:
            with partial.open("ab") as output:
                await self._receive(session, file, output)
        await asyncio.to_thread(self._put_in_place, partial, file)
        self._display.finish(file)

    async def _receive(self, session: httpx.AsyncClient, file: HubFile, output: BufferedWriter) -> None:
        """Appends to `output` until it is as long as the file, or longer: then it is a wrong one."""
        furthest, failures = output.tell(), 0
        while output.tell() < file.bytes:
            problem = await self._attempt(session, file, output)
            if output.tell() > furthest:
                furthest, failures = output.tell(), 0
            elif failures == len(RETRY_WAITS_S):
                raise UserError(
                    f"{file.name} of the {self._plan.source} did not arrive after {failures} retries ({problem}): "
                    f"what has arrived is kept, run the same command to go on"
                )
            if output.tell() < file.bytes:
                await asyncio.sleep(RETRY_WAITS_S[failures])
                failures += 1

    async def _attempt(self, session: httpx.AsyncClient, file: HubFile, output: BufferedWriter) -> str:
        """Goes on from where `output` ends. Returns what to say if the file is still too short: it is worth another
        attempt then. Raises UserError if it is not."""
        start = output.tell()
        try:
            async with self._hub.open(
                session, self._plan.source, self._plan.record.commit, file.name, start
            ) as response:
                if start and response.status_code != httpx.codes.PARTIAL_CONTENT:
                    self._restart(output)
                async for chunk in response.aiter_bytes():
                    output.write(chunk)
                    self._display.advance(len(chunk))
                    if output.tell() > file.bytes:
                        break
        except RangeRefused as refusal:
            self._restart(output)
            return str(refusal)
        except Interruption as interruption:
            return str(interruption)
        return f"{self._hub.endpoint} sent too little"

    def _restart(self, output: BufferedWriter) -> None:
        self._display.repeat(output.tell())
        output.seek(0)
        output.truncate()

    def _put_in_place(self, partial: Path, file: HubFile) -> None:
        problem = difference(partial, file)
        if problem is not None:
            partial.unlink()
            raise UserError(
                f"{file.name} of the {self._plan.source} arrived damaged ({problem}) and was removed: run the same "
                "command to fetch it again"
            )
        sync(partial)
        partial.replace(self._plan.directory / file.name)


def _describe(plan: Plan) -> dict[str, FileRecord]:
    records = {}
    for file in plan.files:
        path = plan.directory / file.name
        rows = count_rows(path) if plan.source.repo_type is RepoType.DATASET else None
        records[file.name] = FileRecord(bytes=file.bytes, sha256=file.sha256 or sha256_file(path), rows=rows)
    return records


@contextmanager
def _writing(plan: Plan) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise UserError(f"{plan.directory} cannot be written: {error}") from error
        raise UserError(
            f"the disk of {plan.directory} is full, and {plan.bytes_to_fetch:,} bytes are still to be fetched: what "
            "has arrived is kept, make room and run the same command to go on"
        ) from error
