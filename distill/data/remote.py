"""Requests to an object store or a web server: several in flight, each with a time limit, and what their errors mean.

fsspec's file systems that are asynchronous (S3, HTTP, Google, Azure) are asked on fsspec's own event loop; others, such
as SFTP, one request after another, without a limit.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import fsspec
from fsspec.asyn import sync

from distill.data.errors import StoreError
from distill.data.retries import said_of, shown

TIMEOUT_SECONDS = 60.0
IN_FLIGHT = 64
"""Requests of a process that are under way at once."""
NEAR_BYTES = 1 << 16
"""Ranges of a file with no more bytes than that between them are requested at once: a request costs more."""
WEB = ("http", "https")
_MAY_PASS = (408, 425, 429)
"""Of HTTP's codes 400 to 499, those that may be another the next time."""
_NO_ENTRY = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "NoAuthTokenError")
_FOR_GOOD = ("InvalidURL", "NonHttpUrlClientError", "ClientConnectorCertificateError", "SSLCertVerificationError")

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
PACKAGES |= {
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "hf": "huggingface_hub",
    "sftp": "paramiko",
    "ssh": "paramiko",
}
Part = tuple[str, int | None, int | None]
"""Path within a file system, first byte and end; None: all of the file."""


def file_system(url: str, timeout_seconds: float = TIMEOUT_SECONDS) -> tuple[Any, str]:
    """fsspec's file system of a path or URL, and the path within it.

    Raises:
        ValueError: no such kind of URL, or its package is not installed; names the package.
    """
    protocol = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url, **_options(protocol, timeout_seconds))
    except ImportError as error:
        package = PACKAGES.get(protocol)
        remedy = f"pip install {package}" if package else " ".join(str(error).split())
        raise ValueError(f"{shown(url)}: a package that opens {protocol}:// is not installed: {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{shown(url)}: {shown(' '.join(str(error).split()))}") from None


def is_remote(url: str) -> bool:
    """Whether a path or URL is of another place than this machine's own file system."""
    return "://" in url and not url.startswith(("file://", "local://"))


def _options(protocol: str, seconds: float) -> dict[str, Any]:
    """What a file system is opened with, where fsspec's configuration says nothing else."""
    if protocol in ("s3", "s3a"):
        given = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
        ours = {"max_pool_connections": IN_FLIGHT, "connect_timeout": min(seconds, 10.0), "read_timeout": seconds}
        return {"config_kwargs": ours | given}
    if protocol in WEB:  # a range of what is compressed on its way is no range of the file
        return {"headers": {"Accept-Encoding": "identity"} | fsspec.config.conf.get(protocol, {}).get("headers", {})}
    return {}


def for_good(error: BaseException, what: str) -> StoreError | None:
    """What to raise, at once, for an error that no later try will mend; None for one that may pass by itself."""
    what, said, status = shown(what), said_of(error), _status(error)
    if isinstance(error, StoreError):
        return error
    if is_missing(error):
        return StoreError(f"{what} is not there ({status or 404})")
    names = {one.__name__ for one in type(error).__mro__}
    if isinstance(error, PermissionError) or status in (401, 403) or names & {*_NO_ENTRY}:
        why = f"{status}" if status else said
        return StoreError(f"{what} may not be read ({why}): check the credentials of this process and its bucket")
    if names & {*_FOR_GOOD} or (status is not None and 400 <= status < 500 and status not in _MAY_PASS):
        return StoreError(f"{what} cannot be read: {said}")
    return None


def is_missing(error: BaseException) -> bool:
    """Whether an error says that there is no such file."""
    return isinstance(error, FileNotFoundError) or _status(error) in (404, 410)


def _status(error: BaseException | None) -> int | None:
    """The code of HTTP that an error is of, as aiohttp and botocore have it."""
    while error is not None:
        if isinstance(status := getattr(error, "status", None), int):
            return status
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status if isinstance(status, int) else None
        error = error.__cause__
    return None


_slots: dict[int, asyncio.Semaphore] = {}  # by process: a fork has a loop of its own


async def _limited(work: Callable[[], Awaitable[Any]], seconds: float) -> Any:
    """What `work` gives, or the exception that it ended with: within the limit, once there is a slot for it."""
    slots = _slots.setdefault(os.getpid(), asyncio.Semaphore(IN_FLIGHT))
    async with slots:
        try:
            return await asyncio.wait_for(work(), seconds)
        except asyncio.TimeoutError:
            return TimeoutError(f"no answer within {seconds:g} s")
        except Exception as error:  # what a file system's own library raises is not known here
            return error


def _together(fs: Any, work: Sequence[Callable[[], Awaitable[Any]]], seconds: float) -> list[Any]:
    """The results of requests that are in flight at once, in order, with exceptions among them."""

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(_limited(one, seconds) for one in work))

    return sync(fs.loop, all_of_them)


def fetch(fs: Any, parts: Sequence[Part], seconds: float) -> list[bytes | Exception]:
    """The bytes of ranges and of whole files, in order; short where a file ends early, an exception where one fails.

    Ranges that lie near each other in a file are requested together.
    """
    several = getattr(fs, "async_impl", False)
    groups = _near_each_other(parts) if several else [[at] for at in range(len(parts))]
    wholes = [_whole_of([parts[at] for at in group]) for group in groups]
    if several:
        work = [_reading(fs, whole) for whole in wholes]
        found = _together(fs, work, seconds)
    else:
        found = [_one(fs, whole) for whole in wholes]
    out: list[bytes | Exception] = [b""] * len(parts)
    for group, whole, data in zip(groups, wholes, found, strict=True):
        _share_out(fs, parts, group, whole, data, out, seconds)
    return out


def _reading(fs: Any, part: Part) -> Callable[[], Awaitable[bytes]]:
    path, begin, end = part
    return lambda: fs._cat_file(path, start=begin, end=end)


def _one(fs: Any, part: Part) -> bytes | Exception:
    path, begin, end = part
    try:
        return fs.cat_file(path, start=begin, end=end)
    except Exception as error:
        return error


def _near_each_other(parts: Sequence[Part]) -> list[list[int]]:
    """The numbers of the parts that are requested together."""
    groups: list[list[int]] = []
    last, reach = "", 0
    for at in sorted(range(len(parts)), key=lambda at: (parts[at][0], parts[at][1] or 0)):
        path, begin, end = parts[at]
        if begin is None or end is None:
            groups.append([at])
            last = ""
        elif path == last and begin - reach <= NEAR_BYTES:
            groups[-1].append(at)
            reach = max(reach, end)
        else:
            groups.append([at])
            last, reach = path, end
    return groups


def _whole_of(parts: Sequence[Part]) -> Part:
    path, begin, _ = parts[0]
    ends = [end for _, _, end in parts if end is not None]
    return path, begin, max(ends) if ends else None


def _share_out(
    fs: Any,
    parts: Sequence[Part],
    group: Sequence[int],
    whole: Part,
    data: bytes | Exception,
    out: list[bytes | Exception],
    seconds: float,
) -> None:
    """Puts what one request has given where it belongs."""
    path, first, end = whole
    if isinstance(data, Exception) and first is not None:
        data = _beyond_the_end(fs, path, first, data, seconds)
    if not isinstance(data, Exception) and first is not None and end is not None and len(data) > end - first:
        data = StoreError(f"{shown(path)}: its server sends whole files where a range is wanted (HTTP's Range)")
    for at in group:
        begin, stop = parts[at][1], parts[at][2]
        if isinstance(data, Exception) or begin is None or stop is None or first is None:
            out[at] = data
        elif len(group) == 1:
            out[at] = data
        else:
            out[at] = data[begin - first : stop - first]


def _beyond_the_end(fs: Any, path: str, first: int, error: Exception, seconds: float) -> bytes | Exception:
    """Some file systems fail where a range begins after the end of the file: then there are no bytes."""
    if isinstance(error, (FileNotFoundError, PermissionError, TimeoutError)) or _status(error) not in (None, 416):
        return error
    if _status(error) is None and not isinstance(error, (ValueError, OSError)):
        return error
    with suppress(Exception):
        (facts,) = details(fs, [path], seconds)
        if isinstance(facts, dict) and facts["size"] <= first:
            return b""
    return error


def details(fs: Any, paths: Sequence[str], seconds: float) -> list[dict[str, Any] | Exception]:
    """Of each file its `size`, and its `version`: a text that is another one if the file was replaced."""
    if not getattr(fs, "async_impl", False):
        return [_facts_of(_info(fs, path)) for path in paths]
    work = [_asking(fs, path) for path in paths]
    return [_facts_of(found) for found in _together(fs, work, seconds)]


def is_web(fs: Any) -> bool:
    """Whether it is a plain web server, which lists no files."""
    return "http" in fs.protocol


def _asking(fs: Any, path: str) -> Callable[[], Awaitable[dict[str, Any]]]:
    if is_web(fs):
        return lambda: _head(fs, path)
    fresh = {"refresh": True} if "s3" in fs.protocol else {}  # what s3fs has listed it keeps
    return lambda: fs._info(path, **fresh)


async def _head(fs: Any, url: str) -> dict[str, Any]:
    """fsspec's own takes every failure for a file that is not there."""
    session = await fs.set_session()
    async with session.head(fs.encode_url(url), allow_redirects=True, **fs.kwargs) as answer:
        answer.raise_for_status()
        size = answer.headers.get("Content-Length")
        return {"size": None if size is None else int(size), **answer.headers}


def _info(fs: Any, path: str) -> dict[str, Any] | Exception:
    try:
        return fs.info(path)
    except Exception as error:
        return error


def _facts_of(found: Any) -> dict[str, Any] | Exception:
    if isinstance(found, Exception):
        return found
    return {"size": found.get("size"), "version": version_of(found)}


def version_of(entry: dict[str, Any]) -> str:
    """What a listing says of a file that changes if it is replaced, "" where it says nothing of the kind."""
    named = {name.lower(): value for name, value in entry.items()}
    said = (named.get(name) for name in ("etag", "md5hash", "generation", "last-modified", "lastmodified"))
    return str(next((one for one in said if one is not None), ""))


def listing(fs: Any, path: str, seconds: float) -> dict[str, dict[str, Any]]:
    """The files of a folder by name, with `size` and `version`; none if there is no folder. Raises what fsspec does."""
    fs.invalidate_cache(path)
    try:
        entries = sync(fs.loop, fs._ls, path, detail=True, timeout=seconds) if fs.async_impl else fs.ls(path)
    except FileNotFoundError:
        return {}
    return {
        entry["name"].rsplit("/", 1)[-1]: {"size": entry["size"], "version": version_of(entry)}
        for entry in entries
        if entry.get("type") != "directory"
    }
