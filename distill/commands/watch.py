"""Shows runs as they go by, in a browser: progress, curves, pictures, alarms and ranks, beside each other.

distill watch RUN [RUN ...]               # or a sweep's, or a chain's folder: all runs in it
distill watch runs port=8765              # on a cluster: the line with ssh that it prints leads there from your machine
distill watch runs page=watch.html        # a file in the place of a server, written again every few seconds

It listens on 127.0.0.1 alone, needs no account and loads nothing from the network. It reads what runs write anyway, and
runs notice nothing of it. Ctrl-C ends it.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is heavy is imported
    from distill.commands import run

    run("watch")

import getpass
import logging
import socket
import time
from pathlib import Path

from distill.config.loading import checking
from distill.config.settings import WatchSettings
from distill.evaluation.live import Watched
from distill.evaluation.live_server import HOST, bound, write_live_page

log = logging.getLogger("distill")
OVER = ("finished", "ended early", "gone")


def main(cfg: WatchSettings) -> None:
    for folder in cfg.runs:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"runs: {folder} is no folder; give a run's, a sweep's, or one with runs in it")
    watched = Watched(cfg.runs)
    if cfg.page is not None:
        return write_until_over(Path(cfg.page), watched, cfg.seconds)
    with checking():
        server = bound(watched, cfg.port, cfg.seconds)
    with server:
        print(f"http://localhost:{server.port}/", flush=True)
        print(f"from another machine first: {tunnel(server.port)}", flush=True)
        server.serve_forever()


def tunnel(port: int) -> str:
    """What is typed on another machine, so that the page is there too."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may have no name for its user
        user = "USER"
    return f"ssh -N -L {port}:{HOST}:{port} {user}@{socket.getfqdn()}"


def write_until_over(page: Path, watched: Watched, seconds: float) -> None:
    """Writes the page every so many seconds, until all runs are over."""
    print(f"{page.resolve().as_uri()}", flush=True)
    while True:
        runs = write_live_page(page, watched, seconds)["runs"]
        if runs and all(run["state"].startswith(OVER) for run in runs):
            return print(f"all {len(runs)} runs are over", flush=True)
        time.sleep(seconds)
