"""The server under load: nothing lost, nothing wrong, whichever worker and batch drew it, and refusals when it is full."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

pytest.importorskip("fastapi", reason='needs the server: pip install "hst_trt[serve]"')
from serving import FAULTY, IMAGES, SECONDS, Server, pixels_of, serving

from hst_trt.pipeline import HybridStitchPipeline

log = logging.getLogger(__name__)

PROMPTS = ("a red apple on a blue background", "a cat", "two dogs beside a green tree", "a house")
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"schedule": "large", "num_inference_steps": 3},
    {"schedule": "small", "num_inference_steps": 4, "guidance_scale": 1},
    {"schedule": "ras", "num_inference_steps": 5},
    {"num_inference_steps": 6, "mask_ratio": 0.3, "guidance_scale": 2.5},
    {"n": 2, "num_inference_steps": 4},
)


def load(server: Server, requests: list[dict[str, Any]], concurrency: int) -> tuple[list[httpx.Response], list[float]]:
    """The answers in the order of the requests, and the seconds each took."""
    with server.client(limits=httpx.Limits(max_connections=concurrency)) as client, ThreadPoolExecutor(concurrency) as pool:

        def ask(fields: dict[str, Any]) -> tuple[httpx.Response, float]:
            start = time.perf_counter()
            answer = client.post(IMAGES, json=fields, timeout=4 * SECONDS)
            return answer, time.perf_counter() - start

        answers, seconds = zip(*pool.map(ask, requests), strict=True)
    return list(answers), list(seconds)


def own(pipeline: HybridStitchPipeline, prompt: str, seed: int, n: int = 1, **settings: Any) -> np.ndarray:
    """The pictures that the pipeline draws by itself, [n, H, W, 3]."""
    output = pipeline(prompt, seed=seed, num_images_per_prompt=n, **settings)
    return np.stack([np.asarray(image, np.int16) for image in output.images])


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> HybridStitchPipeline:
    return HybridStitchPipeline.from_bundle(tiny_bundle, threads=1)


@pytest.fixture(scope="module")
def two_workers(tiny_bundle: Path) -> Iterator[Server]:
    with serving(tiny_bundle, "--workers", 2) as server:
        yield server


def test_under_load_no_request_is_lost_and_none_gets_a_wrong_picture(demo_bundle: Path) -> None:
    settings = {"num_inference_steps": 4}
    requests = [{"prompt": PROMPTS[k % 4], "seed": k // 2 % 8, **settings} for k in range(64)]
    with serving(demo_bundle, "--workers", 2) as server:
        answers, seconds = load(server, requests, concurrency=8)
        assert server.metric("hst_trt_requests_total", outcome="ok") == 64
        batches = {answer.json()["hst_trt"]["batch"] for answer in answers}
    assert [answer.status_code for answer in answers] == [200] * 64
    pipeline, drawn = HybridStitchPipeline.from_bundle(demo_bundle, threads=1), {}
    for request, answer in zip(requests, answers, strict=True):
        case = request["prompt"], request["seed"]
        if case not in drawn:
            drawn[case] = own(pipeline, *case, **settings)[0]
        (entry,) = answer.json()["data"]
        assert entry["seed"] == request["seed"]
        assert np.array_equal(pixels_of(entry), drawn[case]), f"{case} in a batch of {answer.json()['hst_trt']['batch']}"
    median, late = np.percentile(seconds, [50, 95])
    log.info("64 requests, 8 at a time: half within %.2f s, 95 %% within %.2f s; batches of %s", median, late, sorted(batches))
    assert max(batches) > 1


def test_a_picture_is_the_pipelines_own_whichever_worker_and_batch_drew_it(
    two_workers: Server, pipeline: HybridStitchPipeline
) -> None:
    requests = [{"prompt": PROMPTS[k % 4], "seed": k, **KINDS[k // 8]} for k in range(8 * len(KINDS))]
    answers, _ = load(two_workers, requests, concurrency=24)
    assert [answer.status_code for answer in answers] == [200] * len(requests)
    furthest, batched = 0, 0
    for request, answer in zip(requests, answers, strict=True):
        content = answer.json()
        pictures = np.stack([pixels_of(entry) for entry in content["data"]])
        furthest = max(furthest, int(np.abs(pictures - own(pipeline, **request)).max()))
        batched += content["hst_trt"]["batch"] > request.get("n", 1)
    log.info("%d of %d were drawn with others; pixels differ by at most %d of 255", batched, len(requests), furthest)
    assert batched > len(requests) // 4
    assert furthest <= 1


def test_equal_requests_get_equal_bytes(two_workers: Server) -> None:
    answers, _ = load(two_workers, [{"prompt": "a cat", "seed": 2**64 - 1}] * 24, concurrency=12)
    contents = [answer.json() for answer in answers]
    assert len({content["data"][0]["b64_json"] for content in contents}) == 1
    assert len({content["hst_trt"]["batch"] for content in contents}) > 1


def test_a_full_queue_is_said_so_and_when_to_come_back(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, "--queue", 2, "--max-batch", 1, program=FAULTY) as server:
        requests = [{"prompt": "a slow cat", "num_inference_steps": 20} for _ in range(12)]
        answers, _ = load(server, requests, concurrency=12)
        drawn = [answer for answer in answers if answer.status_code == 200]
        refused = [answer for answer in answers if answer.status_code == 503]
        assert len(drawn) + len(refused) == 12
        assert 2 <= len(drawn) <= 4  # one is drawn, two wait
        for answer in refused:
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            error = answer.json()["error"]
            assert "queue is full" in error["message"]
            assert (error["type"], error["code"]) == ("server_error", "overloaded")
        assert server.metric("hst_trt_requests_total", outcome="busy") == len(refused)
        assert server.ask(prompt="a cat").status_code == 200


def test_an_answer_does_not_wait_for_an_acknowledgement(two_workers: Server) -> None:
    """Which would take 40 ms for each on a connection that is kept."""
    with two_workers.client() as client:
        seconds = []
        for _ in range(40):
            start = time.perf_counter()
            client.get("/health/live")
            seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 0.03


def test_streams_under_load_are_whole_and_in_order(two_workers: Server) -> None:
    requests = [{"prompt": "a cat", "seed": k, "n": 1 + k % 2, "stream": True} for k in range(24)]
    answers, _ = load(two_workers, requests, concurrency=12)
    for request, answer in zip(requests, answers, strict=True):
        events = [json.loads(event.partition("data: ")[2]) for event in answer.text.strip().split("\n\n")]
        kinds = [event["type"].rpartition(".")[2] for event in events]
        assert kinds == sorted(kinds, key=["queued", "progress", "completed"].index)
        assert [event["step"] for event in events if "step" in event] == [1, 2, 3, 4]
        assert [event["index"] for event in events if "index" in event] == list(range(request["n"]))
        places = [event["position"] for event in events if "position" in event]
        assert places == sorted(places, reverse=True)
