"""What ONNX Runtime adds to a bundle of graphs: nothing but its version, since it runs the graphs as they are.

Graphs optimised ahead of time are not written: ONNX Runtime would fold the float16 weights to float32 and store them again,
which doubles the bundle and ties it to one instruction set, for a few tenths of a second of loading.
"""

from __future__ import annotations

import importlib.metadata

from ..bundle import Manifest, fingerprint

__all__ = ["completed"]


def completed(manifest: Manifest) -> Manifest:
    """The manifest of the finished bundle."""
    target = manifest.target.model_copy(update={"backend_version": importlib.metadata.version("onnxruntime")})
    update = {"state": "complete", "target": target, "fingerprint": fingerprint(manifest.files, target)}
    return manifest.model_copy(update=update)
