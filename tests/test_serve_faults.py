"""The server when something goes wrong: signals, clients that leave, requests that spoil, pipelines that break, bad bundles.

Faults are provoked by words of prompts, which a pipeline of `tests/serving.py` obeys; everything around it is the real server.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

pytest.importorskip("fastapi", reason='needs the server: pip install "hst_trt[serve]"')
from serving import FAULTY, IMAGES, SECONDS, Server, ended, pixels_of, serving

from hst_trt import HybridStitchPipeline
from hst_trt.server.service import ImageService

STEPS = "hst_trt_step_seconds_count"
ACCEPTED = "hst_trt_requests_running", "hst_trt_requests_waiting", "hst_trt_requests_total"
LONG: dict[str, Any] = {"prompt": "a slow cat", "num_inference_steps": 100}  # five seconds and more
SHORTER = LONG | {"num_inference_steps": 20}


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Server]:
    with serving(tiny_bundle, "--queue", 40, program=FAULTY) as server:
        yield server


@contextlib.contextmanager
def asking(server: Server, *requests: dict[str, Any]) -> Iterator[list[Future[httpx.Response]]]:
    """Requests that are under way during the block, sent in this order."""
    with ThreadPoolExecutor(len(requests)) as pool:
        futures = []
        for request in requests:
            before = server.metric(*ACCEPTED)
            futures.append(pool.submit(server.ask, **request))
            until = time.monotonic() + SECONDS
            while server.metric(*ACCEPTED) <= before:
                assert time.monotonic() < until
                time.sleep(0.01)
        yield futures


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    return body["error"]


# -- clients that leave ----------------------------------------------------------------------------------------------------
def steps_after_leaving(server: Server, stream: bool) -> float:
    """How many steps were still begun after a client of a long request closed its connection."""
    body = json.dumps(LONG | {"stream": stream}).encode()
    head = f"POST {IMAGES} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    done, cancelled = server.metric(STEPS), server.metric("hst_trt_requests_total", outcome="cancelled")
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
        connection.sendall(head.encode() + body)
        server.wait_for_metric("hst_trt_requests_running", 1)
        time.sleep(0.3)
    server.wait_for_metric("hst_trt_requests_running", 0)
    left = time.monotonic()
    server.ask(prompt="a cat", num_inference_steps=1)
    assert time.monotonic() - left < 2.5, "the worker was still busy"
    assert server.metric("hst_trt_requests_total", outcome="cancelled") == cancelled + 1
    return server.metric(STEPS) - done


@pytest.mark.parametrize("stream", [False, True])
def test_work_stops_when_the_client_leaves(server: Server, stream: bool) -> None:
    assert (
        steps_after_leaving(server, stream) == 1
    )  # of the request that was drawn next: batches that end early are not counted


def test_who_gives_up_after_a_step_is_drawn_one_step_more(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    class Counted(HybridStitchPipeline):
        def __call__(self, *arguments: Any, on_step: Any = None, **settings: Any) -> Any:
            drawn.clear()  # of the warm-up
            return super().__call__(
                *arguments, on_step=lambda t, record: (drawn.append(t), on_step and on_step(t, record)), **settings
            )

    monkeypatch.setattr("hst_trt.server.service.HybridStitchPipeline", Counted)
    service = ImageService(tiny_bundle)
    service.start()
    try:
        _, drawing = service.check({"prompt": "a cat", "num_inference_steps": 20})
        service.wait_for("ready", "failed")
        leaves: list[Any] = []
        ticket = service.submit(drawing, lambda t, steps, record: t == 2 and leaves[0].future.cancel())
        leaves.append(ticket)
        until = time.monotonic() + SECONDS
        while not ticket.future.cancelled() or service.metrics.registry.get_sample_value("hst_trt_requests_running"):
            assert time.monotonic() < until
            time.sleep(0.01)
        assert drawn == [0, 1, 2, 3]
    finally:
        service.close()


def test_a_request_in_the_queue_is_dropped_when_its_client_leaves(server: Server) -> None:
    with asking(server, LONG | {"num_inference_steps": 40}):
        with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=server.url, timeout=0.3, trust_env=False) as client:
            client.post(IMAGES, json={"prompt": "a cat"})
        server.wait_for_metric("hst_trt_requests_waiting", 0)
        assert server.metric("hst_trt_requests_running") == 1


def test_who_reads_a_stream_slowly_keeps_nobody_waiting(server: Server) -> None:
    body = json.dumps({"prompt": "a cat", "n": 4, "stream": True, "size": "192x192"}).encode()
    head = f"POST {IMAGES} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    drawn = server.metric("hst_trt_batch_images_count")
    with contextlib.ExitStack() as open_connections:
        for _ in range(5):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.settimeout(SECONDS)
            open_connections.enter_context(connection)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(head.encode() + body)  # and never a recv
        server.wait_for_metric("hst_trt_batch_images_count", drawn + 5)
        assert server.ask(prompt="a cat", seed=1).status_code == 200


def test_idle_connections_keep_nobody_waiting(server: Server) -> None:
    with contextlib.ExitStack() as open_connections:
        for number in range(200):
            connection = open_connections.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS))
            connection.sendall(b"POST /v1/images/generations HTTP/1.1\r\nhost:" if number % 2 else b"")
        assert server.ask(prompt="a cat").status_code == 200


# -- requests that spoil -----------------------------------------------------------------------------------------------------
def test_a_request_that_is_not_finite_spoils_no_other_of_its_batch(server: Server) -> None:
    alone = server.ask(prompt="a cat", seed=3).json()
    with asking(
        server, LONG, {"prompt": "a cat", "seed": 3}, {"prompt": "an infinite cat"}, {"prompt": "a cat", "seed": 4}
    ) as asked:
        answers = [future.result(SECONDS) for future in asked]
    assert [answer.status_code for answer in answers] == [200, 200, 500, 200]
    assert np.array_equal(pixels_of(answers[1].json()["data"][0]), pixels_of(alone["data"][0]))
    assert "not finite" in error_of(answers[2])["message"]
    assert server.metric("hst_trt_non_finite_total") == 1


def test_a_batch_that_memory_cannot_hold_is_drawn_one_by_one(server: Server) -> None:
    with asking(server, SHORTER, *({"prompt": "a hungry cat", "seed": seed} for seed in range(4))) as asked:
        answers = [future.result(SECONDS) for future in asked]
    assert [answer.status_code for answer in answers] == [200] * 5
    assert [answer.json()["hst_trt"]["batch"] for answer in answers] == [1] * 5
    refused = server.ask(prompt="a hungry cat", n=2)
    assert refused.status_code == 500
    assert error_of(refused)["message"] == "there is no memory for so many"


def test_after_an_error_nobody_foresaw_the_pipeline_is_loaded_anew(server: Server) -> None:
    loaded, before = server.metric("hst_trt_engine_load_seconds_count"), server.ask(prompt="a cat", seed=3).json()
    with asking(server, SHORTER, {"prompt": "a broken cat"}) as asked:
        assert asked[0].result(SECONDS).status_code == 200
        broken = asked[1].result(SECONDS)
    assert broken.status_code == 500
    assert error_of(broken)["message"] == "the server failed to draw this; its log says why"
    assert "/a/secret/path is broken" in server.written()  # with its stack, for the operator
    after = server.ask(prompt="a cat", seed=3).json()
    assert np.array_equal(pixels_of(before["data"][0]), pixels_of(after["data"][0]))
    assert server.metric("hst_trt_engine_load_seconds_count") == loaded + 1


def test_a_request_that_breaks_the_pipeline_spoils_no_other_of_its_batch(server: Server) -> None:
    batch = [{"prompt": "a cat", "seed": 3}, {"prompt": "a broken cat"}, {"prompt": "a cat", "seed": 4, "stream": True}]
    with asking(server, SHORTER, *batch) as asked:
        answers = [future.result(SECONDS) for future in asked]
    assert [answer.status_code for answer in answers] == [200, 200, 500, 200]
    assert "image_generation.completed" in answers[3].text


def test_an_error_in_a_stream_is_its_last_event(server: Server) -> None:
    events = server.ask(prompt="an infinite cat", stream=True).text.strip().split("\n\n")
    assert events[-1].startswith("event: error\ndata: ")
    assert "not finite" in json.loads(events[-1].partition("data: ")[2])["error"]["message"]


# -- deadlines ---------------------------------------------------------------------------------------------------------------
def test_a_deadline_ends_requests_that_are_drawn_and_that_wait(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, "--deadline", 1.0, program=FAULTY) as server:
        start = time.monotonic()
        with asking(server, {"prompt": "a stuck cat"}, {"prompt": "a cat"}) as asked:
            answers = [future.result(SECONDS) for future in asked]
        assert time.monotonic() - start < 4
        assert [answer.status_code for answer in answers] == [504, 504]
        assert all(error_of(answer)["code"] == "deadline_exceeded" for answer in answers)
        assert server.ask(prompt="a cat").status_code == 200
        events = server.ask(**LONG, stream=True).text.strip().split("\n\n")
        assert json.loads(events[-1].partition("data: ")[2])["error"]["code"] == "deadline_exceeded"
        assert server.metric("hst_trt_requests_total", outcome="deadline") == 3


# -- ends --------------------------------------------------------------------------------------------------------------------
def test_sigterm_under_load_loses_no_request_and_takes_no_new_one(tiny_bundle: Path) -> None:
    waiting = [{"prompt": "a cat", "seed": seed, "stream": seed % 2 == 1} for seed in range(6)]
    with serving(tiny_bundle, program=FAULTY) as server:
        with asking(server, {"prompt": "a slow cat", "num_inference_steps": 30}, *waiting) as asked:
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            with pytest.raises(httpx.ConnectError):
                server.ask(prompt="a cat")
            answers = [future.result(SECONDS) for future in asked]
        assert [answer.status_code for answer in answers] == [200] * 7
        assert all("image_generation.completed" in answer.text for answer in answers[2::2])
        assert server.process.wait(SECONDS) == 0


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)])
def test_a_second_signal_ends_at_once(tiny_bundle: Path, first: int, second: int) -> None:
    with serving(tiny_bundle, program=FAULTY) as server, asking(server, LONG, LONG) as asked:
        server.process.send_signal(first)
        time.sleep(0.3)
        start = time.monotonic()
        assert server.stop(second) == 130
        assert time.monotonic() - start < 3
        for future in asked:
            assert isinstance(future.exception(SECONDS), httpx.TransportError) or future.result().status_code == 500


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once(tiny_bundle: Path, number: int) -> None:
    with serving(tiny_bundle) as server, socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS):
        time.sleep(0.5)  # until it is accepted
        start = time.monotonic()
        assert server.stop(number) == (0 if number == signal.SIGTERM else 130)
        assert time.monotonic() - start < 3


def test_who_reads_no_answer_does_not_keep_the_server_from_ending(tiny_bundle: Path) -> None:
    body = json.dumps({"prompt": "a cat", "n": 4, "size": "192x192", "stream": True}).encode()
    head = f"POST {IMAGES} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with serving(tiny_bundle, "--deadline", 1, program=FAULTY) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(head.encode() + body)
        server.wait_for_metric("hst_trt_batch_images_count", 1)
        start = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - start < 10


def test_a_pipeline_that_cannot_be_loaded_anew_ends_the_server(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNLOADABLE", str(tmp_path / "gone"))
    with serving(tiny_bundle, program=FAULTY) as server:
        (tmp_path / "gone").touch()
        with asking(server, SHORTER, {"prompt": "a broken cat"}, SHORTER | {"prompt": "a cat"}) as asked:
            answers = [future.result(SECONDS) for future in asked]
        assert [answer.status_code for answer in answers] == [200, 500, 500]
        assert all(error_of(answer)["type"] == "server_error" for answer in answers[1:])
        assert server.process.wait(SECONDS) == 5
        assert "the weights at /a/secret/path are gone" in server.written()


# -- bad starts --------------------------------------------------------------------------------------------------------------
def refuses(*arguments: object) -> tuple[int, str]:
    code, log = ended(*arguments, "--port", 0)
    assert "is ready on" not in log
    assert "Traceback" not in log
    return code, log


def test_a_bundle_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    code, log = refuses(tmp_path / "no.hstb")
    assert code == 4
    assert "no.hstb" in log


def test_a_bundle_with_one_wrong_bit_is_not_served(bundle_copy: Path) -> None:
    graph = max(bundle_copy.rglob("*.onnx"), key=lambda file: file.stat().st_size)
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.chmod(0o644)
    graph.write_bytes(content)
    code, log = refuses(bundle_copy)
    assert code == 6
    assert graph.name in log


def test_a_port_that_is_taken_is_said_so(tiny_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, log = ended(tiny_bundle, "--port", port)
    assert code == 2
    assert str(port) in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read"),
        (b"", "no key"),
        (b"\n \n", "no key"),
        (b"short\n", "too short"),
        (b"\xff\xfe" * 16, "not UTF-8"),
    ],
)
def test_a_key_file_that_protects_nothing_is_refused(tmp_path: Path, content: bytes | None, problem: str) -> None:
    keys = tmp_path / "keys.txt"
    if content is not None:
        keys.write_bytes(content)
    code, log = refuses(tmp_path / "no.hstb", "--api-key-file", keys)
    assert code == 2
    assert problem in log
