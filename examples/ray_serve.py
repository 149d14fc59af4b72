"""Pictures from many replicas of one bundle, by Ray Serve, over the HTTP interface of `hst-trt serve`.

    pip install "hst_trt[serve]" "ray[serve]"
    python examples/ray_serve.py engines/demo-cpu.hstb --replicas 2 4

Each replica is a process with a service of its own: a queue, and a thread with a pipeline. Ray prefers the replica with fewer
requests, adds and removes replicas by how many requests each has, and starts a new one for one that died. On a cluster, which
RAY_ADDRESS names, the bundle lies at the same path on every machine, and all of them are of one GPU type.

A picture asked for by URL is kept by the replica that drew it, so ask for b64_json. /metrics and /health are those of any one
replica.

Ray is for networks of its own: of what it opens here, one port of each replica listens to other machines, and takes what it is
sent without a key. RAY_USE_TLS with certificates closes that.
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports its use to its maker, unless it is told not to
os.environ.setdefault("RAY_AUTH_MODE", "token")
if "RAY_ADDRESS" not in os.environ:
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # on any system: no cluster, so loopback is enough

import ray
from fastapi import FastAPI
from ray import serve

from hst_trt.server.app import make_app
from hst_trt.server.service import ImageService


@serve.deployment
@serve.ingress()
class Pictures:
    """One replica. Ray runs this where it has a place for it, and shows it only the GPUs that it was given."""

    def __init__(self, bundle: str, queue: int, deadline: float, threads: int, keys: list[str]) -> None:
        self._service = ImageService(bundle, queue=queue, deadline=deadline, threads=threads)
        self._keys = keys

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray once. The application starts the service, and closes it when the replica has drained."""
        return make_app(self._service, keys=self._keys)

    def check_health(self) -> None:
        """Called by Ray now and then; a replica that raises is replaced."""
        if self._service.failure is not None:
            raise self._service.failure


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a bundle with many replicas, by Ray Serve.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--replicas", type=int, nargs=2, default=(1, 4), metavar=("LEAST", "MOST"))
    parser.add_argument("--requests", type=float, default=2, help="requests in a replica, on average, above which Ray adds one")
    parser.add_argument("--gpus", type=float, default=0, help="of a replica: 1 for a bundle of engines, 0 for one for the CPU")
    parser.add_argument("--cpus", type=float, default=1, help="of a replica")
    parser.add_argument("--threads", type=int, default=1, help="of a call on the CPU")
    parser.add_argument("--queue", type=int, default=16, help="requests that wait in a replica; more are refused with 503")
    parser.add_argument("--deadline", type=float, default=120, help="seconds of a request")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--key-file", type=Path, help="keys that clients must send, one a line; needed for another --host")
    arguments = parser.parse_args()
    if arguments.host != "127.0.0.1" and arguments.key_file is None:
        parser.error(f"{arguments.host} can be reached from other machines: give --key-file")
    keys = [] if arguments.key_file is None else arguments.key_file.read_text().split()

    ray.init(**({} if "RAY_ADDRESS" in os.environ else {"include_dashboard": False}))
    serve.start(http_options={"host": arguments.host, "port": arguments.port})
    least, most = arguments.replicas
    pictures = Pictures.options(
        autoscaling_config={"min_replicas": least, "max_replicas": most, "target_ongoing_requests": arguments.requests},
        ray_actor_options={"num_gpus": arguments.gpus, "num_cpus": arguments.cpus},
        max_ongoing_requests=2 * arguments.queue,  # so that a full queue is the service's to refuse, in OpenAI's form
        graceful_shutdown_timeout_s=arguments.deadline + 30,  # a replica that is taken away ends what it has
        health_check_period_s=2,
    )
    serve.run(
        pictures.bind(str(arguments.bundle.resolve()), arguments.queue, arguments.deadline, arguments.threads, keys),
        name="hst_trt",
    )
    print(f"{least} to {most} replicas behind http://{arguments.host}:{arguments.port}", flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
