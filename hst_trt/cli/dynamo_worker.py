"""``hst-trt dynamo-worker``: one worker of a fleet that NVIDIA Dynamo's frontend hands requests to."""

from __future__ import annotations

from typing import Any

import click

from ..errors import MissingError
from .options import find_bundle, service_options

__all__ = ["dynamo_worker"]


@click.command()
@click.argument("bundle", required=False)
@click.option("--model-name", help="What clients call the model; the bundle's name if left out.")
@service_options
def dynamo_worker(bundle: str | None, model_name: str | None, device: int, **settings: Any) -> None:
    """Draw what NVIDIA Dynamo's frontend hands out, until SIGTERM; then finish what was begun.

    BUNDLE is a name or a path; by default the newest that runs here. Run one worker for each GPU. Workers of one model name
    share its requests. Dynamo's own settings are its environment variables, such as DYN_DISCOVERY_BACKEND.
    """
    try:
        import dynamo.common.backend.worker  # noqa: F401 -- what is missing shows before the bundle is read

        from ..integrations.dynamo import run_worker
        from ..server.service import ImageService
    except ImportError as exc:
        raise MissingError(
            "the Dynamo worker needs packages that are not here",
            found=str(exc),
            fix='pip install "hst_trt[dynamo]" && pip install --no-deps ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1',
        ) from exc

    service = ImageService(find_bundle(bundle, device), device=device, **settings)
    run_worker(service, model_name or service.bundle.manifest.name)
