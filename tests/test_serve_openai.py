"""OpenAI's own client against the server: what it reads, and which of its exceptions it raises."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason='needs the server: pip install "hst_trt[serve]"')
pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")
import httpx
import openai
from PIL import Image
from serving import FAULTY, SECONDS, Server, serving

KEY = "a-key-of-this-test-0123456789"
LONG = {"prompt": "a slow cat", "extra_body": {"num_inference_steps": 40}}  # two seconds and more


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text(KEY, encoding="utf-8")
    file.chmod(0o400)
    with serving(tiny_bundle, "--api-key-file", file, "--queue", 1, "--max-batch", 4, program=FAULTY) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, timeout=SECONDS, max_retries=0) as client:
        yield client


def picture(content: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(content)))


def test_pictures_come_as_base64(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a cat", model="tiny-cpu", n=2, size="128x64", extra_body={"seed": 7})
    assert len(answer.data) == 2
    assert [picture(image.b64_json).size for image in answer.data] == [(128, 64)] * 2
    assert answer.data[0].b64_json != answer.data[1].b64_json
    assert (answer.size, answer.output_format) == ("128x64", "png")
    assert abs(answer.created - time.time()) < SECONDS
    again = client.images.generate(prompt="a cat", n=2, size="128x64", extra_body={"nvext": {"seed": 7}})
    assert [image.b64_json for image in again.data] == [image.b64_json for image in answer.data]


def test_pictures_come_by_url(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a cat", response_format="url", output_format="webp")
    (image,) = answer.data
    assert image.b64_json is None
    fetched = httpx.get(image.url, timeout=SECONDS)  # without a key: who knows the name may see it
    assert fetched.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(fetched.content)).format == "WEBP"


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_pictures_have_the_format_that_was_asked_for(client: openai.OpenAI, output_format: str) -> None:
    answer = client.images.generate(prompt="a cat", output_format=output_format)
    assert picture(answer.data[0].b64_json).format == output_format.upper()


def test_a_stream_tells_each_step_and_ends_with_the_picture(client: openai.OpenAI) -> None:
    whole = client.images.generate(prompt="a cat", extra_body={"seed": 7})
    events = list(client.images.generate(prompt="a cat", stream=True, extra_body={"seed": 7}))
    assert [event.type for event in events if event.type != "image_generation.queued"] == [
        *["image_generation.progress"] * 4,
        "image_generation.completed",
    ]
    assert events[-1].b64_json == whole.data[0].b64_json
    assert events[-1].size == "64x64"


def test_a_stream_that_fails_raises(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.images.generate(prompt="an infinite cat", stream=True))


def test_leaving_a_stream_gives_up_the_work(server: Server, client: openai.OpenAI) -> None:
    stream = client.images.generate(**LONG, stream=True)
    next(iter(stream))
    stream.close()
    start = time.monotonic()
    server.wait_for_metric("hst_trt_requests_running", 0)
    assert time.monotonic() - start < 1.5


def test_models_are_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.object, model.owned_by) == ("tiny-cpu", "model", "hst_trt")


def test_errors_are_the_clients_own(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a cat", size="513x77")
    assert (refused.value.param, refused.value.type) == ("size", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="quality is not a field"):
        client.images.generate(prompt="a cat", quality="hd")
    with pytest.raises(openai.NotFoundError) as refused:
        client.images.generate(prompt="a cat", model="gpt-image-1")
    assert refused.value.param == "model"
    with pytest.raises(openai.AuthenticationError) as refused:
        client.with_options(api_key="another-key-0123456789").images.generate(prompt="a cat")
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.APIStatusError, match="larger than") as refused:
        client.images.generate(prompt="x" * 100_000)
    assert refused.value.status_code == 413
    with pytest.raises(openai.InternalServerError, match="its log says why"):
        client.images.generate(prompt="a broken cat")


def test_a_full_queue_is_an_error_that_the_client_tries_again_by_itself(server: Server, client: openai.OpenAI) -> None:
    with ThreadPoolExecutor(2) as pool:
        drawn = pool.submit(client.images.generate, **LONG)
        server.wait_for_metric("hst_trt_requests_running", 1)
        waits = pool.submit(client.images.generate, prompt="a cat")
        server.wait_for_metric("hst_trt_requests_waiting", 1)
        with pytest.raises(openai.InternalServerError) as refused:
            client.images.generate(prompt="a cat")
        assert refused.value.status_code == 503
        assert refused.value.code == "overloaded"
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert client.with_options(max_retries=5).images.generate(prompt="a cat").data
        assert drawn.result(SECONDS).data
        assert waits.result(SECONDS).data


def test_the_asynchronous_client_draws_many_at_once(server: Server) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, timeout=SECONDS, max_retries=8) as client:
            answers = await asyncio.gather(
                *(client.images.generate(prompt="a cat", extra_body={"seed": k % 2}) for k in range(4))
            )
            stream = await client.images.generate(prompt="a cat", stream=True, extra_body={"seed": 0})
            completed = [event.b64_json async for event in stream if event.type == "image_generation.completed"]
        return [answer.data[0].b64_json for answer in answers] + completed

    contents = asyncio.run(ask())
    assert contents[0] == contents[2] == contents[4]
    assert contents[1] == contents[3] != contents[0]
