"""Answers against what ``/openapi.json`` says of them, for requests that schemathesis makes from it, good ones and bad ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason='needs the server: pip install "hst_trt[serve]"')
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from serving import IMAGES, SECONDS, Server, serving

load_all_checks()
CHECKED = CHECKS.get_by_names(
    ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
     "response_headers_conformance", "negative_data_rejection"]
)  # fmt: skip
OTHERS = ("/v1/images/files/{name}", "/v1/models", "/health/live", "/health/ready", "/metrics", "/version")


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Server]:
    with serving(tiny_bundle, "--max-steps", 6, "--queue", 256) as server:
        yield server


@pytest.fixture(scope="module")
def schema(server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json", timeout=SECONDS)


def check(operation: Any, server: Server, examples: int) -> dict[int, int]:
    """Sends requests to an operation, good and bad in turn, and checks each answer. How many had each status."""
    seen: dict[int, int] = {}
    cases = st.one_of(
        *(operation.as_strategy(generation_mode=mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE))
    )

    with requests.Session() as session:
        session.trust_env = False

        @settings(
            max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(cases)
        def ask(case: Any) -> None:
            answer = case.call_and_validate(session=session, checks=CHECKED, timeout=SECONDS)
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1

        ask()
    assert server.process.poll() is None
    return seen


def check_all(schema: Any, server: Server, images: int, others: int) -> None:
    seen = check(schema[IMAGES]["POST"], server, images)
    assert sum(seen.values()) >= images
    assert seen.get(200, 0) > 0
    assert seen.get(400, 0) > images // 10
    for path in OTHERS:
        operation = schema[path]["GET"]
        check(operation, server, others if "{" in path else 1)


def test_answers_are_what_the_schema_says(schema: Any, server: Server) -> None:
    check_all(schema, server, 80, 10)


@pytest.mark.slow
def test_two_thousand_answers_are_what_the_schema_says(schema: Any, server: Server) -> None:
    check_all(schema, server, 2000, 200)


def test_the_schema_has_every_path_with_its_answers(server: Server) -> None:
    with server.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {IMAGES, *OTHERS}
    assert "422" not in str(paths)
    assert set(paths[IMAGES]["post"]["responses"]) == {"200", "400", "401", "404", "413", "415", "500", "503", "504"}
