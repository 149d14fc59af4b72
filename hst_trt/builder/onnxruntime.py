"""Finishing a bundle for ONNX Runtime: its graphs run as they are, so only the version that will run them is recorded.

Graphs optimised ahead of time were tried and are not shipped: ONNX Runtime folds the float16 weights to float32 and writes
them out, which doubles the bundle and ties it to one instruction set, to save a few tenths of a second of loading.
"""

from __future__ import annotations

import importlib.metadata

from ..bundle import Bundle, Staging, fingerprint, link_or_copy
from ..disk import translated_disk_errors
from ..recipe import Target

__all__ = ["finish"]


def finish(bundle: Bundle, target: Target) -> Bundle:
    """Marks a bundle of graphs as complete for the CPU."""
    manifest = bundle.manifest
    entry = manifest.target.model_copy(
        update={
            "name": target.name,
            "backend": "onnxruntime",
            "backend_version": importlib.metadata.version("onnxruntime"),
        }
    )
    with translated_disk_errors(bundle.path), Staging.open(bundle.path) as staging:
        for name in manifest.files:
            link_or_copy(bundle.path / name, staging.path / name)
        update = {"state": "complete", "target": entry, "fingerprint": fingerprint(manifest.files, entry)}
        return staging.commit(manifest.model_copy(update=update))
