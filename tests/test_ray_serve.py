"""examples/ray_serve.py with two replicas on this machine: OpenAI's own client, equal bytes, and a replica that is killed.

Ray lives in an environment of its own, which `make ray` makes; the example runs there, the tests here.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / "build" / "out" / "ray" / "bin" / "python"
EXAMPLE = ROOT / "examples" / "ray_serve.py"
KEY = "a-key-of-this-test-only"

openai = pytest.importorskip("openai", reason="pip install openai")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="there is no environment with Ray: make ray"),
]


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster of this test. All its processes have a variable that no others have."""

    mark: str
    port: int
    log: Path

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=120)

    def processes(self) -> dict[int, str]:
        """Command lines by process id."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if (
                    self.mark.encode() in (folder / "environ").read_bytes()
                    and "Z" not in (folder / "stat").read_text().split()[2]
                ):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # ended meanwhile
        return found

    def replicas(self) -> set[int]:
        return {
            process for process, command in self.processes().items() if command.startswith("ray::ServeReplica:hst_trt:Pictures")
        }

    def draw(self, seed: int) -> str:
        """The picture of a seed, as it came."""
        answer = self.client().images.generate(prompt="a red apple", extra_body={"seed": seed, "num_inference_steps": 6})
        assert answer.data is not None
        assert answer.data[0].b64_json
        return answer.data[0].b64_json

    def wait_for(self, what: str, seconds: float, holds: object) -> None:
        end = time.monotonic() + seconds
        while not holds():  # type: ignore[operator]
            assert time.monotonic() < end, f"{what} did not come\n{self.log.read_text()[-4000:]}"
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            return bool(self.client().models.list().data)
        except openai.OpenAIError:
            return False


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def cluster(demo_bundle: Path) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="hst_ray_"))  # short: Ray puts sockets there, whose paths have a limit
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "keys").write_text(KEY)
    mark = f"HST_TRT_TEST={uuid.uuid4().hex}"
    name, value = mark.split("=")
    command = [str(PYTHON), str(EXAMPLE), str(demo_bundle), "--replicas", "2", "2", "--port", str(port), "--cpus", "0.5"]
    log = folder / "log"
    with log.open("w") as out:
        started = subprocess.Popen(
            [*command, "--key-file", str(folder / "keys")],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, name: value, "RAY_TMPDIR": str(folder), "RAY_AUTH_TOKEN": value},
        )
    here = Cluster(mark, port, log)
    try:
        here.wait_for("an answer", 120, here.answers)
        here.wait_for("the second replica", 60, lambda: len(here.replicas()) == 2)
        yield here
    finally:
        started.send_signal(signal.SIGINT)
        try:
            started.wait(60)
        except subprocess.TimeoutExpired:
            started.kill()
        left: dict[int, str] = here.processes()
        for process in left:
            os.kill(process, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def test_two_replicas_share_the_requests_and_equal_seeds_give_equal_bytes(cluster: Cluster) -> None:
    before = {process: cpu_seconds(process) for process in cluster.replicas()}
    seeds = [k % 4 for k in range(24)]
    with ThreadPoolExecutor(4) as pool:
        pictures = list(pool.map(cluster.draw, seeds))
    assert len({*zip(seeds, pictures, strict=True)}) == len({*pictures}) == 4
    spent = {process: cpu_seconds(process) - since for process, since in before.items()}
    assert min(spent.values()) > 0.2 * sum(spent.values()), spent


def test_bad_requests_get_the_errors_of_openai(cluster: Cluster) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        cluster.client().images.generate(prompt="a red apple", extra_body={"sede": 7})
    assert refused.value.param == "sede"
    with pytest.raises(openai.BadRequestError) as refused:
        cluster.client().images.generate(prompt="a red apple", size="513x77")  # type: ignore[call-overload]
    assert refused.value.param == "size"
    with pytest.raises(openai.NotFoundError):
        cluster.client().images.generate(prompt="a red apple", model="another")
    with pytest.raises(openai.AuthenticationError):
        cluster.client("not the key").images.generate(prompt="a red apple")


def test_a_request_can_be_followed_step_by_step(cluster: Cluster) -> None:
    events = cluster.client().images.generate(
        prompt="a red apple", stream=True, extra_body={"seed": 1, "num_inference_steps": 6}
    )
    kinds = [event.type for event in events]
    assert kinds.count("image_generation.progress") == 6
    assert kinds[-1] == "image_generation.completed"


def test_after_a_replica_was_killed_under_load_requests_succeed_and_draw_the_same(cluster: Cluster) -> None:
    expected = cluster.draw(5)
    victim = min(cluster.replicas())
    failures: list[Exception] = []

    def attempt(number: int) -> None:
        if number == 6:
            os.kill(victim, signal.SIGKILL)
        try:
            assert cluster.draw(5) == expected
        except openai.OpenAIError as exc:
            failures.append(exc)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(attempt, range(24)))
    assert len(failures) <= 4, "no more than were under way"
    for failure in failures:
        assert isinstance(failure, openai.InternalServerError | openai.APIConnectionError), failure

    cluster.wait_for("a replica in its place", 60, lambda: len(cluster.replicas() - {victim}) == 2)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(cluster.draw, [5] * 16)) == {expected}


def test_only_rays_own_port_of_a_replica_listens_to_other_machines_and_nothing_reports_to_rays_maker(cluster: Cluster) -> None:
    open_to_all = {inode for inode, loopback in listening() if not loopback}
    replicas = cluster.replicas()
    found = [process for process in cluster.processes() for inode in sockets_of(process) if inode in open_to_all]
    assert set(found) <= replicas, "the example says what is open"
    assert len(found) <= len(replicas), "one port each"
    for process in replicas:
        assert b"RAY_USAGE_STATS_ENABLED=0\0" in Path(f"/proc/{process}/environ").read_bytes()
    assert all(
        "--disable-frontend" in command for command in cluster.processes().values() if "dashboard/dashboard.py" in command
    )


def sockets_of(process: int) -> Iterator[str]:
    for link in Path(f"/proc/{process}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            yield str(link.readlink()).removeprefix("socket:[").removesuffix("]")


def listening() -> Iterator[tuple[str, bool]]:
    """Inodes of listening TCP sockets, and whether only this machine reaches them."""
    for table, loopback in (
        ("tcp", ("0100007F",)),
        ("tcp6", ("00000000000000000000000001000000", "0000000000000000FFFF00000100007F")),
    ):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":  # TCP_LISTEN
                yield fields[9], fields[1].partition(":")[0] in loopback
