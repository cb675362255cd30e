"""Bundles: the files that `ssd-edge deploy` writes and devices install. Format: docs/bundle.md."""

from ssd_edge.bundle.format import (
    MANIFEST,
    MAX_JSON_BYTES,
    MAX_TITLE_LENGTH,
    OPTIONAL_ROLES,
    ROLES,
    Bundle,
    Signature,
    pack,
    parse,
    read,
    write,
)

__all__ = [
    "MANIFEST",
    "MAX_JSON_BYTES",
    "MAX_TITLE_LENGTH",
    "OPTIONAL_ROLES",
    "ROLES",
    "Bundle",
    "Signature",
    "pack",
    "parse",
    "read",
    "write",
]
