"""Servers on localhost that tests start: S3 (moto's), files with ranges, and a proxy in front that misbehaves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

FORBIDDEN = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
KEYS = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_DEFAULT_REGION": "us-east-1"}
BUSY = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Proxy:
    """Hands bytes on between its own port and another one of localhost.

    Attributes:
        latency: seconds by which each request is late.
        busy: so many of the next requests are answered by `answer`, which says 503.
        cuts: so many of the next answers end after `cut_after` bytes, and their connections with them.
        away: nobody is connected, and those that were are cut off.
        requests: how many have come.
    """

    def __init__(self, target: int) -> None:
        self.target, self.latency, self.busy, self.cuts, self.cut_after = target, 0.0, 0, 0, 1000
        self.requests, self._away, self.answer = 0, False, BUSY
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop, ready = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(10)

    @property
    def away(self) -> bool:
        return self._away

    @away.setter
    def away(self, value: bool) -> None:
        self._away = value
        if value:
            self._loop.call_soon_threadsafe(lambda: [writer.transport.abort() for writer in self._writers])

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._connected, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.01))

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._away:
            writer.transport.abort()
            return
        self._writers.add(writer)
        upstream: Any = None
        try:
            back, upstream = await asyncio.open_connection("127.0.0.1", self.target)
            answers = asyncio.create_task(self._answers(back, writer))
            await self._requests(reader, upstream, writer)
            answers.cancel()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            for one in (writer, upstream):
                with suppress(Exception):
                    one.close()

    async def _requests(self, reader: asyncio.StreamReader, upstream: Any, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            if data.split(b" ", 1)[0] in (b"GET", b"HEAD", b"PUT", b"POST", b"DELETE"):
                self.requests += 1
                await asyncio.sleep(self.latency)
                if self.busy > 0:
                    self.busy -= 1
                    writer.write(self.answer)
                    await writer.drain()
                    return
            upstream.write(data)
            await upstream.drain()

    async def _answers(self, back: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await back.read(1 << 16):
            if self.cuts > 0 and b"Content-Range" in data.partition(b"\r\n\r\n")[0].title().replace(b" ", b""):
                self.cuts -= 1
                writer.write(data[: self.cut_after])
                await writer.drain()
                break
            writer.write(data)
            await writer.drain()
        writer.close()


@contextmanager
def proxy(port: int) -> Iterator[Proxy]:
    one = Proxy(port)
    try:
        yield one
    finally:
        one.close()


@contextmanager
def s3(environment: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """An empty S3 server with the bucket `bucket` behind a proxy, which s3:// means as long as it is there."""
    server = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'distill[dev]'")
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'distill[remote]'")
    started = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    started.start()
    port = started.get_host_and_port()[1]
    with proxy(port) as between:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{between.port}"}.items():
            environment.setenv(name, value)
        import boto3

        boto3.client("s3").create_bucket(Bucket="bucket")
        try:
            yield between
        finally:
            started.stop()
