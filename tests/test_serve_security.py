"""The server under attack: keys, hosts, sizes, malformed and smuggled requests, and what its answers and its log give away."""

from __future__ import annotations

import hmac
import json
import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("fastapi", reason='needs the server: pip install "hst_trt[serve]"')
from serving import FAULTY, IMAGES, Server, ended, serving

from hst_trt import HybridStitchPipeline
from hst_trt.server.drawing import Drawer, draw
from hst_trt.server.guard import Guard
from hst_trt.server.pictures import PictureStore
from hst_trt.server.request import Limits, read_request

JSON = {"content-type": "application/json"}
KEYS = ("first-key-of-the-file-0123456789", "second-key-of-the-file-012345678")


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Server]:
    with serving(tiny_bundle, program=FAULTY) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text("\n".join(KEYS), encoding="utf-8")
    file.chmod(stat.S_IRUSR)
    with serving(tiny_bundle, "--host", "0.0.0.0", "--api-key-file", file) as server:
        yield Server(server.process, server.url.replace("0.0.0.0", "127.0.0.1"), server.log)


def post(server: Server, content: bytes, **headers: str) -> httpx.Response:
    with server.client() as client:
        return client.post(IMAGES, content=content, headers=JSON | headers)


def refused(response: httpx.Response, status: int, most: int = 700) -> str:
    """The message of a refusal, which has OpenAI's form, is short and gives nothing away."""
    assert response.status_code == status, response.text[:300]
    assert len(response.content) < most
    assert not re.search(r"Traceback|\.py\b|/tmp/|site-packages", response.text)
    message = response.json()["error"]["message"]
    assert isinstance(message, str)
    assert message
    return message


# -- who may ask -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", "127.0.0.1.example.com"])
def test_other_machines_are_served_with_keys_only(tiny_bundle: Path, host: str) -> None:
    code, log = ended(tiny_bundle, "--host", host, "--port", 0)
    assert code == 2
    assert "can be reached from other machines" in log


def test_a_key_is_needed_for_everything_that_draws(guarded: Server) -> None:
    with guarded.client() as client:
        for headers in (
            {},
            {"authorization": ""},
            {"authorization": "Bearer"},
            {"authorization": f"Basic {KEYS[0]}"},
            {"authorization": f"Bearer {KEYS[0][:-1]}"},
            {"authorization": f"Bearer {KEYS[0]}x"},
            {"authorization": f"Bearer {KEYS[0]} {KEYS[1]}"},
            {"authorization": f"Bearer {KEYS[0].upper()}"},
            {"x-api-key": KEYS[0]},
        ):
            answer = client.post(IMAGES, json={"prompt": "a cat"}, headers=headers)
            assert "key" in refused(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"
            refused(client.get("/v1/models", headers=headers), 401)
            refused(client.get("/v1/anything", headers=headers), 401)
        for key in KEYS:
            assert client.get("/v1/models", headers={"authorization": f"bearer {key}"}).status_code == 200
            drawn = client.post(IMAGES, json={"prompt": "a cat"}, headers={"authorization": f"Bearer {key}"})
            assert drawn.status_code == 200
        for path in ("/", "/health/live", "/health/ready", "/version", "/metrics"):
            assert client.get(path).status_code == 200
    assert not any(key in guarded.written() for key in KEYS)


@pytest.mark.parametrize(
    "path",
    [
        "//v1/images/generations", "/v1/images/files/../generations", "/v1/images/files/%2e%2e/generations",
        "/v1/images/files/..%2fgenerations", "/v1//images/generations", "/V1/images/generations",
        "/page/../v1/images/generations", "/%76%31/images/generations", "/v1/images/generations/",
        "/v1/images/files/../../v1/images/generations", "/./v1/images/generations",
        "http://localhost/v1/images/generations",
    ],
)  # fmt: skip
def test_no_spelling_of_a_path_gets_around_the_keys(guarded: Server, path: str) -> None:
    body = b'{"prompt":"a cat"}'
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    answer = guarded.raw(f"{head}connection: close\r\n\r\n".encode() + body)
    assert re.match(rb"HTTP/1.1 (401|404|405|307) ", answer), answer[:200]
    assert b"b64_json" not in answer


def test_a_key_is_compared_with_every_known_one_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    guard = Guard(None, keys=[*KEYS, "a-third-key-0123456789"], body_bytes=1, local=False)  # type: ignore[arg-type]
    for key, known in (
        (KEYS[0], True),
        (KEYS[1], True),
        ("wrong", False),
        ("", False),
        ("é\udcff", False),
        ("x" * 10**6, False),
    ):
        compared.clear()
        assert guard._knows(key) is known
        assert len(compared) == 3  # however early the right one comes
        assert len({len(value) for pair in compared for value in pair}) == 1


def test_a_page_whose_name_was_made_to_mean_this_machine_cannot_ask(server: Server) -> None:
    good = ("localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:8000", "127.0.0.2", "[::1]", "[::1]:8000")
    bad = (
        "example.com", "localhost.example.com", "127.0.0.1.example.com", "example.com:127.0.0.1", "localhost@example.com",
        "192.0.2.1", "0.0.0.0", "[::]", "[::1", "::1:80:x", "", "localhost:80:80", "localhost/", "127.1",
    )  # fmt: skip
    for host in good + bad:
        answer = server.raw(f"GET /v1/models HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
        status = 200 if host in good else 421
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), (host, answer[:80])


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/jsonx"]
)
def test_what_browsers_send_without_asking_is_refused(server: Server, kind: str) -> None:
    with server.client() as client:
        answer = client.post(IMAGES, content=b'{"prompt":"a cat"}', headers={"content-type": kind} if kind else {})
    assert "JSON" in refused(answer, 415)
    assert "access-control-allow-origin" not in answer.headers


# -- sizes -------------------------------------------------------------------------------------------------------------------
LARGE = b'{"prompt":"' + b"x" * (64 * 1024) + b'"}'


def test_a_body_is_limited_whatever_its_header_says(server: Server) -> None:
    head = f"POST {IMAGES} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n".encode()
    assert "65536 bytes" in refused(post(server, LARGE), 413)
    with server.client() as client:
        chunked = client.post(IMAGES, content=iter([LARGE[:40_000], LARGE[40_000:]]), headers=JSON)
    refused(chunked, 413)
    announced = server.raw(head + b"content-length: 99999999999999999999\r\n\r\n")
    assert announced.startswith(b"HTTP/1.1 413 ")
    endless = server.raw(head + b"content-length: 10\r\n\r\n" + LARGE)  # the rest is no request
    assert endless.startswith(b"HTTP/1.1 400 ")
    assert b"b64_json" not in endless
    for length in ("-1", "1e3", "0x10", "１", "10, 11"):
        answer = server.raw(head + f"content-length: {length}\r\n\r\n{{}}".encode())
        assert re.match(rb"HTTP/1.1 4(00|13) ", answer), answer[:80]
    assert server.raw(head + b"content-length: 100\r\n\r\n{}", end=True) == b""  # nobody is there to answer
    assert server.ask(prompt="a cat").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b'"prompt"', b"{", b'{"prompt":}', b'{"prompt":"a"}{}', b'{"prompt":"a",}', b"\xff\xfe",
        b'{"prompt":"\xff"}',
        b"[" * 60_000, b'{"a":' * 10_000, b'{"prompt":"a","nvext":' * 900 + b"1" + b"}" * 900,
        b'{"prompt":"a","nvext":{"nvext":{"seed":1}}}',
        b'{"prompt":"a","seed":' + b"9" * 60_000 + b"}", b'{"prompt":"a","n":' + b"9" * 4000 + b"}",
        b'{"prompt":"a","num_inference_steps":' + b"9" * 4000 + b"}", b'{"prompt":"a","stages":[' + b"9" * 4000 + b",0,0]}",
        b'{"prompt":"a","guidance_scale":NaN}', b'{"prompt":"a","guidance_scale":-Infinity}',
        b'{"prompt":"a","mask_ratio":1e999}',
        b'{"prompt":"a","prompt":"b"}', b'{"prompt":"a","nvext":{"seed":1,"seed":2}}',
        b'{"prompt":"a \\ud800 cat"}', b'{"prompt":"a","\\ud800":1}', b'{"prompt":"a","nvext":{"\\ud800":1}}',
        b'{"prompt":"a","' + b"f" * 60_000 + b'":1}', b'{"prompt":"a","size":"' + b"9" * 10_000 + b'x64"}',
        b'{"prompt":"a","x\\r\\nINFO: a line of its own\\u001b[2J":1}', b'{"prompt":"a","__proto__":{}}',
        b"{" + b",".join(b'"f%d":1' % k for k in range(5000)) + b"}",
    ],
    ids=lambda body: ascii(body[:30]),
)  # fmt: skip
def test_a_body_that_is_no_request_is_refused_in_short(server: Server, body: bytes) -> None:
    written = server.written()
    refused(post(server, body), 400)
    assert server.written() == written


def test_odd_prompts_are_drawn(server: Server) -> None:
    for prompt in ("\0", "\u202e\u200b", "\x1b[2J", "🐈" * 1000, "a\r\nb"):
        assert server.ask(prompt=prompt, num_inference_steps=1).status_code == 200


# -- what answers and the log give away ----------------------------------------------------------------------------------------
def test_prompts_are_in_no_log_and_in_no_answer_to_others(server: Server) -> None:
    words = ("zanzibarquux", "verboseflimflam")
    long = "a cat " * 200 + words[0]  # its end is cut off
    assert server.ask(prompt=long, negative_prompt=words[1]).status_code == 200
    assert server.ask(prompt=f"broken {words[0]}", negative_prompt=words[1]).status_code == 500
    assert server.ask(prompt=f"infinite {words[0]}").status_code == 500
    assert server.ask(prompt=words[0], size="1x1").status_code == 400
    server.ask(prompt=words[0], stream=True)
    with server.client() as client:
        seen = server.written() + "".join(client.get(path).text for path in ("/metrics", "/v1/models", "/openapi.json"))
    assert not any(word in seen for word in words)


def test_an_error_of_the_server_shows_no_path_and_no_stack(server: Server) -> None:
    assert "secret" not in refused(server.ask(prompt="broken"), 500)
    stream = server.ask(prompt="broken", stream=True).text
    assert "event: error" in stream
    assert "secret" not in stream
    assert "a/secret/path" in server.written()


def test_every_answer_has_the_headers_that_browsers_obey(server: Server) -> None:
    with server.client() as client:
        answers = [
            client.get(path) for path in ("/", "/page/index.html", "/v1/models", "/nothing", "/metrics", "/openapi.json")
        ]
    for answer in [*answers, server.ask(prompt=""), post(server, LARGE), server.ask(prompt="broken")]:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers


def test_metrics_do_not_grow_with_what_clients_write(server: Server) -> None:
    def names() -> set[str]:
        with server.client() as client:
            return {line.rpartition(" ")[0] for line in client.get("/metrics").text.splitlines()}

    server.ask(prompt="a cat")
    before = names()
    with server.client() as client:
        for k in range(200):
            client.post(
                f"/v1/images/generations?x={k}", json={"prompt": "a cat", "model": f"m{k}", f"f{k}": k, "schedule": f"s{k}"}
            )
            client.request(f"M{k}", f"/path-{k}", headers={"user-agent": f"agent-{k}"})
    assert names() == before


# -- paths and methods --------------------------------------------------------------------------------------------------------
PATHS = (
    "/page/../app.py", "/page/../../pipeline.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page/%2e%2e%2fapp.py",
    "/page/%252e%252e/app.py", "/page/....//app.py", "/page//etc/passwd", "/page/%2fetc%2fpasswd", "/page/..\\app.py",
    "/page/%00",
    "/page/index.html%00.png", "/page/" + "a" * 5000, "/v1/images/files/..", "/v1/images/files/../../models",
    "/v1/images/files/%2e%2e%2f%2e%2e%2fmodels", "/v1/images/files/.png", "/v1/images/files/", "/v1/images/files/x.html",
    "/%ff%fe",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path[:40])
def test_no_path_leads_out_of_the_page_or_to_somebodys_picture(server: Server, path: str) -> None:
    answer = server.raw(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
    assert re.match(rb"HTTP/1.1 (404|400) ", answer), answer[:200]
    assert b"import" not in answer
    assert b"root:" not in answer


def test_a_picture_by_url_has_a_name_that_cannot_be_guessed(server: Server) -> None:
    answers = [
        server.ask(prompt="a cat", seed=1, response_format="url", output_format=form).json() for form in ("png", "webp", "jpeg")
    ]
    urls = [answer["data"][0]["url"] for answer in answers]
    names = [url.rpartition("/")[2] for url in urls]
    assert len({name.partition(".")[0] for name in names}) == 3
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{32}\.(png|webp|jpeg)", name) for name in names)  # 192 bits
    with server.client() as client:
        assert [client.get(url).headers["content-type"] for url in urls] == ["image/png", "image/webp", "image/jpeg"]
        assert client.get(urls[0][:-5] + "A.png").status_code == 404


def test_pictures_are_kept_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    store = PictureStore(most_bytes=1000, seconds=60)
    names = [store.add(bytes(300), "png") for _ in range(10)]
    assert [store.get(name) is not None for name in names] == [False] * 7 + [True] * 3
    assert store.get(store.add(bytes(2000), "png")) is None  # larger than the whole store
    kept = store.add(bytes(10), "png")
    assert store.get(kept) is not None
    monkeypatch.setattr("time.monotonic", lambda: 10.0**9)
    assert store.get(kept) is None
    assert (store._bytes, len(store._files)) == (0, 0)


@pytest.mark.parametrize("method", ["TRACE", "OPTIONS", "PUT", "DELETE", "PATCH", "CONNECT", "BREW", "get"])
def test_other_methods_are_refused(server: Server, method: str) -> None:
    for path in ("/", IMAGES, "/v1/models", "/metrics", "/page/index.html"):
        secret = "x-secret: do-not-echo"
        answer = server.raw(f"{method} {path} HTTP/1.1\r\nhost: localhost\r\n{secret}\r\nconnection: close\r\n\r\n".encode())
        assert re.match(rb"HTTP/1.1 (405|400) ", answer), answer[:100]
        assert b"do-not-echo" not in answer


def test_a_head_request_gets_no_body(server: Server) -> None:
    for path in ("/", "/v1/models", "/nothing", "/page/index.html"):
        answer = server.raw(f"HEAD {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
        assert answer.endswith(b"\r\n\r\n")
        assert answer.count(b"\r\n\r\n") == 1


# -- requests that two servers would read differently --------------------------------------------------------------------------
HEAD = f"POST {IMAGES} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n".encode()
HIDDEN = b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "content",
    [
        HEAD + b"content-length: 4\r\ncontent-length: 50\r\n\r\nnull" + HIDDEN,
        HEAD + b"content-length: 4, 50\r\n\r\nnull" + HIDDEN,
        HEAD + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"content-length: +4\r\n\r\nnull" + HIDDEN,
        HEAD + b"content-length : 4\r\n\r\nnull" + HIDDEN,
        HEAD + b"transfer-encoding: identity, chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"transfer-encoding: \x0bchunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"transfer-encoding\x00: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"transfer-encoding: chunked\r\n\r\n-1\r\nx\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"transfer-encoding: chunked\r\n\r\n0x4\r\nnull\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\nnull\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"transfer-encoding: chunked\r\n\r\n4\r\nnullX\r\n0\r\n\r\n" + HIDDEN,
        b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\nhost: example.com\r\ncontent-length: 0\r\n\r\n",
        b"GET /version HTTP/1.1\r\n\r\n",
        b"GET /version HTTP/1.1\nhost: localhost\n x: folded\n\n",
        b"GET /version HTTP/1.1\r\nhost: localhost\r\n bad: folded\r\n\r\n",
        b"GET  /version  HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET /version HTTP/1.1\r\nhost: localhost\r\nx: a\rb\r\n\r\n",
        b"GET /version HTTP/1.1\r\nhost: localhost\r\nx y: a\r\n\r\n",
        b"GET /version HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 1_000_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=lambda content: ascii(content.partition(b"application/json\r\n")[2][:48] or content[:48]),
)  # fmt: skip
def test_a_request_that_could_hide_another_answers_no_second_one(server: Server, content: bytes) -> None:
    answer = server.raw(content, end=True)
    assert re.match(rb"HTTP/1.1 (4\d\d|501) ", answer) or answer == b"", answer[:200]
    assert b"fingerprint" not in answer  # of what was hidden


def test_an_upgrade_is_not_taken(server: Server) -> None:
    head = (
        "GET /version HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    )
    answer = server.raw(f"{head}sec-websocket-key: {'A' * 22}==\r\n\r\n".encode(), end=True)
    assert not answer.startswith(b"HTTP/1.1 101")


def test_a_server_that_was_attacked_still_draws(server: Server) -> None:
    assert server.process.poll() is None
    assert server.ask(prompt="a cat").status_code == 200
    assert "Exception in ASGI application" not in server.written()
    with socket.create_connection(("127.0.0.1", server.port), timeout=5):
        assert json.loads(httpx.get(f"{server.url}/health/ready", timeout=5).text) == {"status": "ready"}


def test_only_drawings_for_others_keep_prompts_out_of_logs(tiny_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline, prompt = HybridStitchPipeline.from_bundle(tiny_bundle), "a secret " * 100
    drawing = Drawer(pipeline.bundle, None, Limits())(read_request({"prompt": prompt, "num_inference_steps": 1}))
    draw(pipeline, [drawing])
    assert "secret" not in caplog.text
    pipeline(prompt, num_inference_steps=1)
    assert "secret" in caplog.text
    caplog.clear()
    with caplog.at_level("DEBUG", "hst_trt.tokenizer"):
        draw(pipeline, [drawing])
    assert "secret" in caplog.text
