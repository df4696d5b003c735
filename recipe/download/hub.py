"""The hub's HTTP interface, and what its refusals mean for the user.

Files are streamed here, over huggingface_hub's sessions and with its credentials. Its own snapshot_download (1.33.0, by
HTTP, tried against a hub on the loopback interface) goes on inside a file only within one process: the next one fetches
the file from its first byte. It compares sizes alone: a shard of the right size and other bytes is kept, and the next
run asks for no file. A reset connection, or one answer 502 or 503 for a file, ends it; Ctrl-C does not while a server
stalls (100 s were waited for). Where the directory holds any file already, a refused token (401) counts as success. A
too small disk is a warning, then an OSError. hf_xet was not tried: by its source, a failed file is removed there
too, while plain HTTP with ranges serves every file of up to 50 GB.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus

import httpx
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_async_session, hf_raise_for_status

from recipe.download.hub_repos import RepoType, Source
from recipe.system.errors import UserError

_HUB_ERRORS = (httpx.HTTPError, httpx.InvalidURL, OfflineModeIsEnabled)
_PASSING_ERRORS = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
_PASSING_STATUSES = (408, 429, 500, 502, 503, 504)


class Interruption(Exception):
    """A request failed that may succeed a little later. The text says in a few words why."""


class RangeRefused(Interruption):
    """The server has nothing from the byte on that was asked for."""


@dataclass(frozen=True)
class HubFile:
    """A file as the hub's metadata describe it."""

    name: str
    bytes: int
    blob_id: str
    """The file's name in git: the SHA-1 of its content under git's header, or of its pointer if it is kept in LFS."""
    sha256: str | None
    """Known of files in LFS."""


@dataclass(frozen=True)
class Snapshot:
    """A repository at a commit."""

    commit: str
    files: tuple[HubFile, ...]


class Hub:
    """The hub at HF_ENDPOINT, with the token of HF_TOKEN or of the hub's token file."""

    def __init__(self) -> None:
        self.endpoint = constants.ENDPOINT

    @cached_property
    def _headers(self) -> dict[str, str]:
        return build_hf_headers() | {"Accept-Encoding": "identity"}

    def snapshot(self, source: Source, revision: str) -> Snapshot:
        """The repository at a branch, tag or commit. Raises UserError if the hub does not tell."""
        api = HfApi(endpoint=self.endpoint)
        ask = api.model_info if source.repo_type is RepoType.MODEL else api.dataset_info
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            info = ask(source.repo, revision=revision, files_metadata=True, timeout=timeout)
        except HFValidationError as error:
            raise UserError(f"{source.repo!r} is no repository's name: give ORGANISATION/NAME") from error
        except UnicodeEncodeError as error:
            raise UserError(f"{self._token_origin()} has letters that no token has: store it again") from error
        except _HUB_ERRORS as error:
            failure = self._failure(error, source, revision)
            if isinstance(failure, Interruption):
                failure = UserError(f"{failure}: check the network and HF_ENDPOINT, or try again later")
            raise failure from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.endpoint} does not answer as a hub does: check HF_ENDPOINT") from error
        files = tuple(
            HubFile(sibling.rfilename, sibling.size, sibling.blob_id, sibling.lfs.sha256 if sibling.lfs else None)
            for sibling in info.siblings or ()
            if sibling.size is not None and sibling.blob_id is not None
        )
        if info.sha is None or len(files) != len(info.siblings or ()):
            raise UserError(
                f"{self.endpoint} tells no commit, sizes or hashes of the {source}: use another HF_ENDPOINT"
            )
        return Snapshot(info.sha, files)

    def session(self) -> httpx.AsyncClient:
        """Connections to the hub, to be used as an asynchronous context manager."""
        return get_async_session()

    @asynccontextmanager
    async def open(
        self, session: httpx.AsyncClient, source: Source, commit: str, name: str, start: int
    ) -> AsyncIterator[httpx.Response]:
        """A file's content from byte `start` on (status 206), or from the beginning if the server knows no ranges
        (status 200). A redirection to another host does not take the token along.

        Raises Interruption, also while the content is read, or UserError if the request failed for good.
        """
        url = hf_hub_url(source.repo, name, repo_type=source.repo_type, revision=commit, endpoint=self.endpoint)
        headers = self._headers | ({"Range": f"bytes={start}-"} if start else {})
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            async with session.stream("GET", url, headers=headers, timeout=timeout) as response:
                hf_raise_for_status(response)
                yield response
        except _HUB_ERRORS as error:
            raise self._failure(error, source, commit, name) from error

    def _failure(
        self, error: Exception, source: Source, revision: str, name: str | None = None
    ) -> Interruption | UserError:
        """What a request about a repository, or about its file `name`, has failed of."""
        match error:
            case OfflineModeIsEnabled():
                return UserError(f"the {source} has to be fetched, but HF_HUB_OFFLINE is set: unset it")
            case HfHubHTTPError():
                response = error.response
                answer = f"{self.endpoint} answers {response.status_code} {response.reason_phrase}"
                if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    return RangeRefused(answer)
                if response.status_code in _PASSING_STATUSES:
                    return Interruption(answer)
                return UserError(
                    self._refusal(error, source, revision, name) or f"{answer} when asked for the {source}"
                )
        reason = f"the connection to {self._server(error)} failed ({str(error) or type(error).__name__})"
        if isinstance(error, _PASSING_ERRORS):
            return Interruption(reason)
        return UserError(f"{reason}: check the network and HF_ENDPOINT")

    def _refusal(self, error: HfHubHTTPError, source: Source, revision: str, name: str | None) -> str | None:
        """What to do about a status that says that something is missing or not allowed; None for others."""
        page = f"{self.endpoint}/{'datasets/' if source.repo_type is RepoType.DATASET else ''}{source.repo}"
        token = self._token_origin()
        match error, error.response.status_code:
            case GatedRepoError(), _ if token is None:
                return f"the {source} is gated: accept its terms on {page}, and set HF_TOKEN to that account's token"
            case GatedRepoError(), _:
                return f"the {source} is gated: accept its terms on {page} with the account of {token}"
            case RevisionNotFoundError(), _:
                return f"the {source} has no revision {revision} on {self.endpoint}"
            case RemoteEntryNotFoundError(), _:
                return f"the {source} has no file {name} at {revision} on {self.endpoint}"
            case _, HTTPStatus.UNAUTHORIZED if token is None:
                return (
                    f"{self.endpoint} does not show the {source} without a token (401): check the name, and if it is "
                    f"private or gated set HF_TOKEN to a token that can read {source.repo}"
                )
            case _, HTTPStatus.UNAUTHORIZED:
                return f"{self.endpoint} refuses {token} (401): set HF_TOKEN to one that can read {source.repo}"
            case _, HTTPStatus.FORBIDDEN:
                return (
                    f"{self.endpoint} forbids reading the {source} with {token or 'no token'} (403): set HF_TOKEN to "
                    f"one that can read {source.repo}, and accept the terms on {page} if there are any"
                )
            case _, HTTPStatus.NOT_FOUND:
                return f"there is no {source} on {self.endpoint} that you can read (404): check the name and HF_TOKEN"
        return None

    def _server(self, error: Exception) -> str:
        """Where the request went that failed; files may be redirected elsewhere."""
        host = error.request.url.host if isinstance(error, httpx.RequestError) else ""
        return self.endpoint if host in self.endpoint else f"{host}, to which {self.endpoint} redirects,"

    def _token_origin(self) -> str | None:
        """Where the token that is sent comes from, in words; None if none is sent."""
        if "authorization" not in self._headers:
            return None
        return "the token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token that was stored by `hf auth login`"
