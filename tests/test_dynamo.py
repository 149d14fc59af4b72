"""The Dynamo worker: its engine around the real service, and fleets of real processes with Dynamo's own frontend."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hst_trt import HybridStitchPipeline
from hst_trt.errors import ResourceError
from hst_trt.integrations.dynamo import make_engine, request_fields
from hst_trt.server.answers import encode
from hst_trt.server.service import ImageService

HOW = "needs Dynamo: pip install 'hst_trt[dynamo]' && pip install --no-deps ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1"


# -- what arrives ----------------------------------------------------------------------------------------------------------
def test_fields_that_the_frontend_does_not_know_are_found_where_it_puts_them() -> None:
    """As frontend 1.6.1 passed them on."""
    arrived = {"prompt": "x", "model": "m", "nvext": {"seed": 3}, "extra_args": {"media_passthrough": {"schedule": "large"}}}
    assert request_fields(arrived) == {"prompt": "x", "nvext": {"seed": 3}, "schedule": "large"}


def test_a_client_cannot_smuggle_fields_in_as_the_frontends() -> None:
    """What a client calls extra_args arrives one level deeper, and stays a field that nobody knows."""
    sent = {"extra_args": {"media_passthrough": {"seed": 1}}, "_HEALTH_CHECK": True}
    fields = request_fields({"prompt": "x", "extra_args": {"media_passthrough": sent}})
    assert fields.keys() == {"prompt", "extra_args", "_HEALTH_CHECK"}


@pytest.mark.parametrize("missing", ["dynamo", "prometheus_client"])
def test_without_its_packages_the_command_says_how_to_install_them(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None\nfrom hst_trt.cli.main import main\nmain()"
    ended = subprocess.run([sys.executable, "-c", code, "dynamo-worker"], capture_output=True, text=True, check=False)
    assert ended.returncode == 4, ended.stderr
    assert "pip install --no-deps ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1" in ended.stderr


# -- the engine ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def dynamo() -> Any:
    """Dynamo's exceptions and its Context."""
    pytest.importorskip("dynamo.common.backend.engine", reason=HOW)
    from dynamo.llm import exceptions

    return exceptions


@pytest.fixture
def service(tiny_bundle: Path) -> Iterator[ImageService]:
    service = ImageService(tiny_bundle, threads=1)
    yield service
    service.close()


def picture(data: dict[str, Any]) -> bytes:
    return base64.b64decode(data["b64_json"])


def drawn_by_pipeline(bundle: Path, prompt: str, **arguments: Any) -> list[bytes]:
    """PNG files of the pipeline's own pictures."""
    output = HybridStitchPipeline.from_bundle(bundle, threads=1)(prompt, **arguments)
    return [encode(image, "png") for image in output.images]


async def ask(engine: Any, context: Any = None, **fields: Any) -> dict[str, Any]:
    """One request to an engine; the answer's only chunk."""
    from dynamo._core import Context

    chunks = [chunk async for chunk in engine.generate({"model": "m"} | fields, context or Context())]
    assert len(chunks) == 1
    return chunks[0]


def test_a_picture_of_the_engine_is_the_pipelines_own_to_the_byte(
    dynamo: Any, service: ImageService, tiny_bundle: Path
) -> None:
    async def use() -> dict[str, Any]:
        engine = make_engine(service, "tiny")
        config = await engine.start(1)
        assert (config.model, config.served_model_name) == ("tiny", "tiny")
        passed_on = {"media_passthrough": {"schedule": "t-stitch", "num_inference_steps": 5}}
        return await ask(engine, prompt="a boat", n=2, size="80x64", nvext={"seed": 9}, extra_args=passed_on)

    answer = asyncio.run(use())
    expected = drawn_by_pipeline(
        tiny_bundle, "a boat", num_images_per_prompt=2, width=80, height=64, seed=9, schedule="t-stitch", num_inference_steps=5
    )
    assert [picture(data) for data in answer["data"]] == expected
    assert answer["size"] == "80x64"
    assert answer["output_format"] == "png"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"n": 0}, "n is not usable"),
        ({"size": "513x77"}, "height 77"),
        ({"extra_args": {"media_passthrough": {"colour": "blue"}}}, "colour"),
        ({"quality": "hd"}, "quality"),
        ({"nvext": {"seed": -1}}, "seed"),
        ({"stream": True}, "stream cannot be had here"),
        ({"response_format": "url"}, "response_format cannot be had here"),
        ({"extra_args": {"media_passthrough": {"details": True}}}, "details cannot be had here"),
    ],
    ids=str,
)
def test_the_engine_refuses_what_the_frontend_lets_through(
    dynamo: Any, service: ImageService, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(dynamo.InvalidArgument, match=named):
        asyncio.run(ask(make_engine(service, "tiny"), prompt="x", **fields))


def test_a_client_that_leaves_ends_the_work_at_the_next_step(dynamo: Any, service: ImageService) -> None:
    from dynamo._core import Context

    steps: list[int] = []
    given_up = threading.Event()

    async def use() -> None:
        engine = make_engine(service, "tiny")
        await engine.start(1)
        context, loop = Context(), asyncio.get_running_loop()
        submit = service.submit

        def watched(drawing: Any) -> Any:
            def on_step(step: int, of: int, record: Any) -> None:
                steps.append(step)
                if step == 2:
                    loop.call_soon_threadsafe(context.stop_generating)
                    assert given_up.wait(10)

            ticket = submit(drawing, on_step)
            ticket.future.add_done_callback(lambda future: given_up.set())
            return ticket

        service.submit = watched  # type: ignore[method-assign]
        with pytest.raises(dynamo.Cancelled):
            await ask(engine, context, prompt="x", extra_args={"media_passthrough": {"num_inference_steps": 50}})
        service.submit = submit  # type: ignore[method-assign]
        await ask(engine, prompt="the next one is drawn")

    asyncio.run(use())
    assert steps == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "error", "status"),
    [({"queue": 0}, "HttpError", 503), ({"deadline": 1e-6}, "ConnectionTimeout", None)],
    ids=["full", "late"],
)
def test_a_full_queue_and_a_late_request_are_errors_of_their_own(
    dynamo: Any, tiny_bundle: Path, settings: dict[str, Any], error: str, status: int | None
) -> None:
    service = ImageService(tiny_bundle, threads=1, **settings)

    async def use() -> None:
        engine = make_engine(service, "tiny")
        await engine.start(1)
        try:
            await ask(engine, prompt="x")
        finally:
            await engine.cleanup()

    with pytest.raises(getattr(dynamo, error)) as caught:
        asyncio.run(use())
    assert getattr(caught.value, "code", None) == status


def test_cleanup_waits_until_what_was_taken_is_answered_and_then_nothing_more_is_taken(
    dynamo: Any, service: ImageService
) -> None:
    async def use() -> None:
        engine = make_engine(service, "tiny")
        await engine.start(1)
        asked = [asyncio.create_task(ask(engine, prompt=f"picture {i}")) for i in range(3)]
        figure = service.metrics.registry.get_sample_value
        while (figure("hst_trt_requests_waiting") or 0) + (figure("hst_trt_requests_running") or 0) < 3:
            await asyncio.sleep(0.001)
        await engine.cleanup()
        assert [len(task.result()["data"]) for task in asked] == [1, 1, 1]  # `result` refuses to wait
        with pytest.raises(dynamo.HttpError) as caught:
            await ask(engine, prompt="too late")
        assert caught.value.code == 503
        await engine.cleanup()  # twice does no harm

    asyncio.run(use())


def test_a_worker_that_can_draw_no_more_leaves(dynamo: Any, service: ImageService, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody expected has the pipeline loaded anew; here that fails too."""
    signals: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: signals.append(number) if pid == os.getpid() else None)

    def fail(*arguments: Any, **settings: Any) -> Any:
        raise ResourceError("the GPU has gone")

    async def use() -> None:
        engine = make_engine(service, "tiny")
        await engine.start(1)
        monkeypatch.setattr("hst_trt.server.service.draw", lambda *arguments: 1 / 0)
        monkeypatch.setattr(service, "_open", fail)
        with pytest.raises(dynamo.Unknown):
            await ask(engine, prompt="x")
        while not signals:
            await asyncio.sleep(0.001)
        with pytest.raises(dynamo.EngineShutdown):
            await ask(engine, prompt="x")

    asyncio.run(use())
    assert signals == [signal.SIGTERM]


def test_dynamos_own_probe_is_drawn(dynamo: Any, service: ImageService) -> None:
    async def use() -> dict[str, Any]:
        engine = make_engine(service, "tiny")
        await engine.start(1)
        return await ask(engine, **await engine.health_check_payload())

    assert len(asyncio.run(use())["data"]) == 1


# -- frontend and workers ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Answer:
    status: int
    body: dict[str, Any]
    seconds: float


def free_port() -> int:
    """Below 32768: Dynamo takes no others for its metrics."""
    while True:
        port = random.randrange(16384, 32768)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class Fleet:
    """A frontend and workers on loopback that find each other by files. Each process leads a group of its own."""

    def __init__(self, folder: Path, bundle: Path, workers: int, *options: str) -> None:
        self.folder, self.model = folder, bundle.stem
        self.discovery = folder / "discovery"
        self.discovery.mkdir()
        self.port, self.system_port = free_port(), free_port()
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("DYN_")} | {
            "DYN_DISCOVERY_BACKEND": "file",
            "DYN_FILE_KV": str(self.discovery),
            "DYN_TCP_RPC_HOST": "127.0.0.1",
            "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
            "DYN_RUNTIME_INHIBITED_DURATION_SECS": "60",
            "DYN_SYSTEM_HOST": "127.0.0.1",
            "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "1",
            "DYN_LOG": "warn",
        }
        here = ["--http-host", "127.0.0.1", "--http-port", str(self.port), "--router-mode", "least-loaded"]
        self.processes: list[subprocess.Popen[bytes]] = []
        self._start("frontend", ["-m", "dynamo.frontend", *here])
        command = ["-c", "from hst_trt.cli.main import main; main()", "dynamo-worker", str(bundle), "--threads", "1", *options]
        self.workers = [
            self._start(f"worker-{i}", command, {} if i else {"DYN_SYSTEM_PORT": str(self.system_port)}) for i in range(workers)
        ]

    def _start(
        self, name: str, arguments: list[str], more: Mapping[str, str] = MappingProxyType({})
    ) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments], stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder,
                env=self._environment | more, start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def wait_until_ready(self) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            assert all(process.poll() is None for process in self.processes), "a process ended"
            with suppress(OSError):
                if len(self._get("health").get("instances", [])) == len(self.workers) and self._get("v1/models")["data"]:
                    return
            time.sleep(0.1)
        raise AssertionError("no workers within a minute")

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=10) as reply:
            return json.load(reply)

    def metrics(self) -> str:
        """Of the first worker."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.system_port}/metrics", timeout=10) as reply:
            return str(reply.read().decode())

    def ask(self, timeout: float = 120, /, **fields: Any) -> Answer:
        start = time.monotonic()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/images/generations",
            json.dumps({"model": self.model} | fields).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                status, body = reply.status, json.load(reply)
        except urllib.error.HTTPError as exc:
            status, body = exc.code, json.load(exc)
        return Answer(status, body, time.monotonic() - start)

    def close(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def logs(self) -> str:
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')[-4000:]}" for file in self.folder.glob("*.log"))


@pytest.fixture
def fleet_of(dynamo: Any, tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    fleets: list[Fleet] = []

    def start(bundle: Path, workers: int, *options: str) -> Fleet:
        fleets.append(Fleet(tmp_path, bundle, workers, *options))
        fleets[-1].wait_until_ready()
        return fleets[-1]

    try:
        yield start
    finally:
        for fleet in fleets:
            fleet.close()
            sys.stdout.write(fleet.logs())  # pytest shows it if the test failed


def test_dynamos_frontend_answers_with_the_pipelines_picture_and_with_our_errors(
    fleet_of: Callable[..., Fleet], tiny_bundle: Path
) -> None:
    fleet = fleet_of(tiny_bundle, 1)
    asked = {"prompt": "a boat", "size": "64x80", "nvext": {"seed": 9}, "schedule": "t-stitch", "num_inference_steps": 5}
    expected = drawn_by_pipeline(tiny_bundle, "a boat", width=64, height=80, seed=9, schedule="t-stitch", num_inference_steps=5)
    for _ in range(2):
        answer = fleet.ask(**asked)
        assert answer.status == 200
        assert [picture(data) for data in answer.body["data"]] == expected
    for fields, named in (({"n": 0}, "n is not usable"), ({"size": "513x77"}, "height 77"), ({"colour": "blue"}, "colour")):
        refused = fleet.ask(prompt="x", **fields)
        assert refused.status == 400
        assert named in refused.body["message"]
    assert "hst_trt_requests_total" in fleet.metrics()
    fleet.workers[0].terminate()
    assert fleet.workers[0].wait(timeout=30) == 0


@pytest.mark.slow
def test_late_requests_are_504_and_do_not_count_against_their_worker(fleet_of: Callable[..., Fleet], tiny_bundle: Path) -> None:
    fleet = fleet_of(tiny_bundle, 1, "--deadline", "0.001")
    assert [fleet.ask(prompt="x").status for _ in range(4)] == [504] * 4


@pytest.mark.slow
def test_requests_beyond_the_queue_are_503_and_do_not_count_against_their_worker(
    fleet_of: Callable[..., Fleet], demo_bundle: Path
) -> None:
    fleet = fleet_of(demo_bundle, 1, "--queue", "1", "--max-batch", "1")
    statuses = [answer.status for answer in many(fleet, 12, 6)]
    assert set(statuses) == {200, 503}
    assert fleet.ask(prompt="x", num_inference_steps=2).status == 200


@pytest.mark.slow
def test_a_client_that_hangs_up_stops_the_work(fleet_of: Callable[..., Fleet], demo_bundle: Path) -> None:
    fleet = fleet_of(demo_bundle, 1)
    with pytest.raises(TimeoutError):
        fleet.ask(1.0, prompt="x", n=4, num_inference_steps=100, schedule="large")
    assert fleet.ask(prompt="x", num_inference_steps=2).status == 200
    counted = dict(re.findall(r'hst_trt_requests_total{[^}]*outcome="(\w+)"[^}]*} (\d+)', fleet.metrics()))
    assert (counted["cancelled"], counted["ok"]) == ("1", "1")


def many(
    fleet: Fleet, count: int, concurrency: int, meanwhile: Callable[[], None] = lambda: None, steps: int = 8, n: int = 1
) -> list[Answer]:
    """Asks for seeds 0, 1, 2, 0, 1, 2 ...; `meanwhile` runs once a quarter of the answers have come."""
    quarter = threading.Semaphore(0)

    def one(i: int) -> Answer:
        answer = fleet.ask(prompt="a red apple", seed=i % 3, num_inference_steps=steps, n=n)
        quarter.release()
        return answer

    with ThreadPoolExecutor(concurrency) as pool:
        answers = [pool.submit(one, i) for i in range(count)]
        for _ in range(count // 4):
            quarter.acquire()
        meanwhile()
        return [answer.result() for answer in answers]


def pictures(answers: list[Answer]) -> list[tuple[int, bytes]]:
    """Seed and picture of the answers that have one."""
    return [(i % 3, picture(answer.body["data"][0])) for i, answer in enumerate(answers) if answer.status == 200]


@pytest.mark.slow
def test_under_load_no_request_is_lost_and_equal_seeds_give_equal_bytes_whichever_worker_drew_them(
    fleet_of: Callable[..., Fleet], demo_bundle: Path
) -> None:
    fleet = fleet_of(demo_bundle, 2, "--max-batch", "1")
    answers = many(fleet, 24, 6)
    assert [answer.status for answer in answers] == [200] * 24
    alone = [drawn_by_pipeline(demo_bundle, "a red apple", seed=seed, num_inference_steps=8)[0] for seed in range(3)]
    assert all(drawn == alone[seed] for seed, drawn in pictures(answers))
    seconds = sorted(answer.seconds for answer in answers)
    sys.stdout.write(f"24 requests, 6 at a time: median {seconds[12]:.2f} s, longest {seconds[-1]:.2f} s\n")


def assert_pictures_are_the_pipelines(answers: list[Answer], bundle: Path) -> None:
    """To 1/255: the size of a batch changes how sums are rounded."""
    pipeline = HybridStitchPipeline.from_bundle(bundle, threads=1)
    alone = [np.asarray(pipeline("a red apple", seed=seed, num_inference_steps=8).images[0], int) for seed in range(3)]
    for seed, drawn in pictures(answers):
        assert np.abs(np.asarray(Image.open(io.BytesIO(drawn)), int) - alone[seed]).max() <= 1


@pytest.mark.slow
def test_a_killed_worker_costs_clean_errors_for_what_it_had_and_nothing_later(
    fleet_of: Callable[..., Fleet], demo_bundle: Path
) -> None:
    fleet = fleet_of(demo_bundle, 2)
    answers = many(fleet, 24, 6, fleet.workers[0].kill)
    assert {answer.status for answer in answers} <= {200, 503}
    failed = [answer for answer in answers if answer.status == 503]
    assert 1 <= len(failed) <= 6  # what was in flight
    assert all(answer.body["code"] == 503 and answer.body["message"] for answer in failed)
    assert max(answer.seconds for answer in answers) < 60
    assert_pictures_are_the_pipelines(answers, demo_bundle)
    assert [answer.status for answer in many(fleet, 12, 3)] == [200] * 12


@pytest.mark.slow
def test_a_terminated_worker_answers_all_that_it_has(fleet_of: Callable[..., Fleet], demo_bundle: Path) -> None:
    """What waits at it takes longer than Dynamo's grace period, which is a second here."""
    fleet = fleet_of(demo_bundle, 2)
    terminated = 0.0

    def terminate() -> None:
        nonlocal terminated
        terminated = time.monotonic()
        fleet.workers[0].terminate()

    answers = many(fleet, 8, 8, terminate, steps=16, n=4)
    assert [answer.status for answer in answers] == [200] * 8
    assert {len(answer.body["data"]) for answer in answers} == {4}
    assert fleet.workers[0].wait(timeout=60) == 0
    assert time.monotonic() - terminated > 2
    assert [answer.status for answer in many(fleet, 4, 2)] == [200] * 4


@pytest.mark.slow
def test_openais_client_under_load_does_not_notice_that_a_worker_is_terminated(
    fleet_of: Callable[..., Fleet], demo_bundle: Path
) -> None:
    """It asks again after a 503, which the frontend answers to what it hands out while the worker is leaving."""
    openai = pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")
    fleet = fleet_of(demo_bundle, 2)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{fleet.port}/v1", api_key="none", max_retries=2)

    def one(i: int) -> str:
        if i == 8:
            fleet.workers[0].terminate()
        fields = {"seed": i % 3, "num_inference_steps": 8}
        return str(client.images.generate(model=fleet.model, prompt="a red apple", extra_body=fields).data[0].b64_json)

    with ThreadPoolExecutor(6) as pool:
        drawn = list(pool.map(one, range(24)))
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in drawn)
    assert fleet.workers[0].wait(timeout=60) == 0
