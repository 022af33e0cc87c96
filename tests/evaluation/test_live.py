"""The live page: what it reads of runs that go by, what it serves and to whom, and what a browser makes of it."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from distill.commands.watch import tunnel, write_until_over
from distill.evaluation.live import POINTS, Metrics, Watched, WatchedRun
from distill.evaluation.live_server import LiveServer, bound, write_live_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<img src=x onerror=document.title='run'>"


def write_rows(folder: Path, first: int, last: int, **more: float | str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.jsonl", "a") as file:
        for step in range(first, last + 1):
            file.write(json.dumps({"step": step, "loss": 1 / step, **more}) + "\n")


def begun(folder: Path, steps: int, **more: float | str) -> Path:
    """A run that has taken some of a hundred steps, with two pictures."""
    write_rows(folder, 1, steps, **more)
    (folder / "run_id").write_text("a\n")
    (folder / "config.yaml").write_text("max_train_steps: 100\nmethod: {_target_: distill.methods.lcm.LCM}\n")
    (folder / "samples" / "step-000010").mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (16, 16), (200, 40 * i, 90)).save(
            folder / "samples" / "step-000010" / f"validation-{i:02d}.png"
        )
    return folder


@contextmanager
def served(watched: Watched) -> Iterator[LiveServer]:
    with bound(watched, 0, 1.0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def answer(server: LiveServer, path: str, host: str | None = None, method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    found = connection.getresponse()
    body = found.read()
    connection.close()
    return found.status, body


class TestMetrics:
    def test_each_look_reads_what_is_new_and_a_torn_line_once_it_is_whole(self, tmp_path: Path) -> None:
        metrics, path = Metrics(tmp_path / "metrics.jsonl"), tmp_path / "metrics.jsonl"
        metrics.update()
        assert metrics.rows == 0
        path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
        metrics.update()
        assert (metrics.rows, metrics.last) == (1, {"loss": 0.5})
        with open(path, "a") as file:
            file.write('ss": 0.25}\nrubbish\n[1]\n{"step": null}\n')
        metrics.update()
        assert metrics.curve("loss") == [[1, 0.5, 0.5, 0.5], [2, 0.25, 0.25, 0.25]] and metrics.step == 2

    @pytest.mark.parametrize("how", ["replaced", "shortened", "gone"])
    def test_a_run_that_resumes_further_back_is_read_anew(self, how: str, tmp_path: Path) -> None:
        write_rows(tmp_path, 1, 9)
        metrics, path = Metrics(tmp_path / "metrics.jsonl"), tmp_path / "metrics.jsonl"
        metrics.update()
        kept = "".join(path.read_text().splitlines(keepends=True)[:4])
        if how == "replaced":  # and longer than before by the next look
            (tmp_path / "new").write_text(kept + "".join(f'{{"step": {s}, "loss": 7.0}}\n' for s in range(5, 30)))
            os.replace(tmp_path / "new", path)
        elif how == "shortened":
            path.write_text(kept)
        else:
            path.unlink()
        metrics.update()
        assert len(metrics.curve("loss")) == {"replaced": 29, "shortened": 4, "gone": 0}[how]
        assert metrics.last.get("loss") == {"replaced": 7.0, "shortened": 0.25}.get(how)

    def test_a_long_run_is_thinned_and_keeps_its_spikes(self, tmp_path: Path) -> None:
        rows = 100_000
        with open(tmp_path / "metrics.jsonl", "w") as file:
            for step in range(1, rows + 1):
                loss = 1e3 if step == 77_777 else 1.0
                file.write(f'{{"step": {step}, "loss": {loss}, "grad_norm": 0.5, "lr": 1e-4, "data_wait": 0.0}}\n')
        run = WatchedRun(tmp_path, "a")
        run.look()
        began = time.process_time()
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 100001, "loss": 1.0}\n')
        found = run.look()
        assert time.process_time() - began < 0.5  # a second look costs what is new, not what is there
        curve = found["curves"]["loss"]
        assert len(curve) == POINTS and max(point[3] for point in curve) == 1e3 and curve[-1][0] == 100_001
        assert sum(point[1] for point in curve) / POINTS == pytest.approx((rows + 1e3) / (rows + 1), rel=1e-3)
        assert len(json.dumps(found)) < 200_000

    def test_what_is_not_finite_is_in_no_curve_and_json_stays_json(self, tmp_path: Path) -> None:
        begun(tmp_path, 3, grad_norm="nan")
        write_rows(tmp_path, 4, 4, grad_norm=1.0, big="inf")
        found = WatchedRun(tmp_path, "a").look()
        assert found["curves"]["grad_norm"] == [[4, 1.0, 1.0, 1.0]] and found["last"]["big"] is None
        json.dumps(found, allow_nan=False)


class TestRuns:
    def test_what_a_run_is_at_is_said(self, tmp_path: Path) -> None:
        more = {"eta_seconds": 60.0, "alarm/winning": 1.0, "alarm/chance": 0.0, "best/step": 10.0}
        run = WatchedRun(begun(tmp_path / "a", 20, **more), "a")
        (tmp_path / "a" / "LOCK").write_text("{}")
        found = run.look()
        assert (found["state"], found["step"], found["planned"], found["method"]) == ("running", 20, 100, "LCM")
        assert (found["alarms"], found["eta"], found["best"]) == (["winning"], 60.0, 10.0)
        assert run.look(time.time() + 1200)["state"] == "running, silent for 20 minutes"
        (tmp_path / "a" / "LOCK").unlink()
        for name, text, state in (
            ("PREEMPTED", "20\n", "stopped, to be resumed"),
            ("DONE", "20 of 100\n", "ended early, at step 20 of 100"),
            ("DONE", "100\n", "finished"),
        ):
            (tmp_path / "a" / name).write_text(text)
            assert run.look()["state"] == state
        shutil.rmtree(tmp_path / "a")
        found = run.look()
        assert (found["state"], found["step"], found["pictures"]) == ("gone", 0, {})

    def test_a_sweep_is_its_runs_and_those_that_begin_later_come_to_them(self, tmp_path: Path) -> None:
        begun(tmp_path / "sweep" / "lr=1", 5)
        (tmp_path / "sweep" / "checkpoints" / "x").mkdir(parents=True)
        begun(tmp_path / "sweep" / "checkpoints" / "x", 5)
        watched = Watched([tmp_path / "sweep"])
        assert [run["name"] for run in watched.look()["runs"]] == ["lr=1"]
        begun(tmp_path / "sweep" / "links" / "lr=2", 7)
        assert [run["name"] for run in watched.look()["runs"]] == ["lr=1", "links/lr=2"]
        both = Watched([tmp_path / "sweep" / "lr=1", tmp_path / "sweep" / "links"]).look()["runs"]
        assert [run["name"] for run in both] == ["lr=1", "links/lr=2"]

    def test_scalars_of_single_ranks_are_a_table_and_no_curves(self, tmp_path: Path) -> None:
        more = {"step_seconds/rank0": 1.0, "step_seconds/rank1": 2.0, "rank_0/wait": 0.5, "frank1": 3.0}
        found = WatchedRun(begun(tmp_path, 2, **more), "a").look()
        assert found["ranks"] == {"step_seconds": {"0": 1.0, "1": 2.0}, "wait": {"0": 0.5}}
        assert set(found["curves"]) == {"loss", "frank1"}

    def test_a_damaged_config_leaves_the_rest(self, tmp_path: Path) -> None:
        begun(tmp_path, 3)
        for text in ("a: [", "- 1", "", "method: 3\nmax_train_steps: many"):
            (tmp_path / "config.yaml").write_text(text)
            found = WatchedRun(tmp_path, "a").look()
            assert (found["step"], found["planned"], found["method"]) == (3, None, "")


class TestServer:
    def test_it_serves_the_page_its_data_and_pictures(self, tmp_path: Path) -> None:
        with served(Watched([begun(tmp_path / "a", 5)])) as server:
            status, body = answer(server, "/")
            assert (
                status == 200 and b"distill watch" in body and b"http://" not in body.replace(b"http://www.w3.org", b"")
            )
            status, body = answer(server, "/data")
            found = json.loads(body)["runs"][0]
            assert status == 200 and found["pictures"] == {"step-000010": ["validation-00.png", "validation-01.png"]}
            status, body = answer(server, "/picture/0/step-000010/validation-01.png")
            own = tmp_path / "a" / "samples" / "step-000010" / "validation-01.png"
            assert status == 200 and body == own.read_bytes()
            assert answer(server, "/", method="HEAD") == (200, b"") and server.server_address[0] == "127.0.0.1"

    def test_nothing_else_is_served_whatever_it_is_called(self, tmp_path: Path) -> None:
        run, samples = begun(tmp_path / "a", 5), tmp_path / "a" / "samples"
        secret = tmp_path / "secret.png"
        shutil.copy(samples / "step-000010" / "validation-00.png", secret)
        (samples / "step-000010" / "link.png").symlink_to(secret)
        (samples / "step-000010" / "text.png").write_text("not a picture")
        (samples / "step-000020").symlink_to(tmp_path)
        with served(Watched([run])) as server:
            answer(server, "/data")
            for path in (
                "/config.yaml",
                "/picture/0/step-000010/link.png",
                "/picture/0/step-000010/text.png",
                "/picture/0/step-000020/secret.png",
                "/picture/0/step-000010/../../../secret.png",
                "/picture/0/step-000010/..%2f..%2f..%2fsecret.png",
                "/picture/0/step-000010/nothing.png",
                "/picture/1/step-000010/validation-00.png",
                "//etc/passwd",
                "/..",
            ):
                assert answer(server, path)[0] == 404, path
            assert answer(server, "/data", method="POST")[0] == 501

    def test_another_name_for_this_machine_is_refused(self, tmp_path: Path) -> None:
        with served(Watched([begun(tmp_path / "a", 5)])) as server:
            assert [answer(server, "/data", host)[0] for host in ("evil.example", "evil.example:80")] == [403, 403]
            assert [answer(server, "/data", host)[0] for host in ("localhost:9", "127.0.0.1")] == [200, 200]

    def test_a_port_that_is_taken_is_one_line(self, tmp_path: Path) -> None:
        with served(Watched([tmp_path])) as server, pytest.raises(ValueError, match="cannot be had .*choose another"):
            bound(Watched([tmp_path]), server.port, 1.0)
        assert tunnel(8765).startswith("ssh -N -L 8765:127.0.0.1:8765 ")


def test_a_written_page_holds_everything_and_nothing_in_it_ends_its_script(tmp_path: Path) -> None:
    run = begun(tmp_path / "a", 5, **{"</script><script>alert(1)</script>": 1.0})
    data = write_live_page(tmp_path / "out" / "page.html", Watched([run]), 2.0)
    text = (tmp_path / "out" / "page.html").read_text()
    assert text.count("<script") == 3 and "data:image/png;base64," in text and '{"seconds": 2.0}' in text
    assert [picture["name"] for picture in data["runs"][0]["pictures"]["step-000010"]] == [
        "validation-00.png",
        "validation-01.png",
    ]


def test_a_page_is_written_until_all_runs_are_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = begun(tmp_path / "a", 5)
    threading.Timer(0.4, lambda: (run / "DONE").write_text("100\n")).start()
    write_until_over(tmp_path / "page.html", Watched([run]), 0.1)
    assert capsys.readouterr().out.splitlines()[-1] == "all 1 runs are over"
    assert '"state": "finished"' in (tmp_path / "page.html").read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
class TestBrowser:
    def dom(self, address: str, tmp_path: Path) -> str:
        """What the page has become after some seconds of a browser's time."""
        assert CHROMIUM is not None
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += [f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=3000", "--dump-dom"]
        return subprocess.run([CHROMIUM, *flags, address], capture_output=True, text=True, timeout=120).stdout

    def test_a_browser_shows_runs_beside_each_other_and_what_they_are_called_as_text(self, tmp_path: Path) -> None:
        more: Mapping[str, float] = {"validation/heldout_loss": 0.5, "alarm/winning": 1.0, "rank0/wait": 0.1, EVIL: 2.0}
        first = begun(tmp_path / "runs" / EVIL.replace("/", ""), 20, **more)
        begun(tmp_path / "runs" / "b", 40)
        with served(Watched([tmp_path / "runs"])) as server:
            dom = self.dom(f"http://localhost:{server.port}/", tmp_path)
        assert dom.count('class="run"') == 2 and "20 of 100" in dom and "40 of 100" in dom
        assert "alarm: winning" in dom and "<th>rank 0</th>" in dom and dom.count("<polyline") >= 4
        assert "picture/0/step-000010/validation-00.png" in dom
        assert "&lt;img src=x onerror" in dom and '<img src="x"' not in dom and "<title>run" not in dom
        assert "⚠ 20 % · 40 % · distill watch</title>" in dom and first.is_dir()

    def test_a_browser_shows_a_written_page_from_disk(self, tmp_path: Path) -> None:
        write_live_page(tmp_path / "page.html", Watched([begun(tmp_path / "a", 30)]), 60.0)
        dom = self.dom((tmp_path / "page.html").as_uri(), tmp_path)
        assert "30 of 100" in dom and "<polyline" in dom and 'src="data:image/png;base64,' in dom
        assert "as of" in dom
