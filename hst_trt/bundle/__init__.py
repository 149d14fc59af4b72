"""Bundles: what was built, as one folder ``NAME.hstb``, whose format ``engines/README.md`` specifies."""

from .manifest import (
    SCHEMA_VERSION,
    EngineEntry,
    FileEntry,
    GraphEntry,
    Manifest,
    ModelEntry,
    PartEntry,
    ProfileEntry,
    TargetEntry,
    TensorEntry,
    TokenizerEntry,
)
from .reading import MANIFEST, SUFFIX, Bundle, bundles_folder, hash_file, newest_bundle, verify_files
from .staging import Staging, fingerprint, link_or_copy, recover

__all__ = [
    "MANIFEST",
    "SCHEMA_VERSION",
    "SUFFIX",
    "Bundle",
    "EngineEntry",
    "FileEntry",
    "GraphEntry",
    "Manifest",
    "ModelEntry",
    "PartEntry",
    "ProfileEntry",
    "Staging",
    "TargetEntry",
    "TensorEntry",
    "TokenizerEntry",
    "bundles_folder",
    "fingerprint",
    "hash_file",
    "link_or_copy",
    "newest_bundle",
    "recover",
    "verify_files",
]
