"""Facts about the bundle that was installed."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from device_runtime.backbone.interface import BackboneSpec
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.images import Pixels

if TYPE_CHECKING:
    from ssd_edge import bundle as bundles

_NOT_KEPT = ("format", "version", "files", "device")  # keys of a bundle's manifest


@dataclasses.dataclass(frozen=True)
class InstalledBundle:
    """Facts about the bundle that was installed, the content of ``device.json``.

    Attributes:
        name: Name of the bundle.
        release: Its release.
        target: The target it was prepared for.
        size: Side of the backbone's input in pixels.
        dim: Number of features of an embedding.
        precision: Precision of the backbone.
        bundle_sha256: SHA-256 of the bundle.
        signed_by: Id of the key that signed it; None if it is unsigned.
        installation: Random id of this installation.
        merged: Ids of the installations that were merged into this one.
        manifest: Manifest of the bundle, without its list of files.
    """

    name: str
    release: int
    target: str
    size: int
    dim: int
    precision: str
    bundle_sha256: str
    signed_by: str | None
    installation: str
    merged: tuple[str, ...]
    manifest: Mapping[str, Any]

    @property
    def pixels(self) -> Pixels:
        """Preprocessing that makes images the input of the backbone."""
        return Pixels.from_dict(self.manifest["backbone"])

    def backbone_spec(self, sha256: str) -> BackboneSpec:
        """Return the specification of the backbone with this digest."""
        return BackboneSpec(sha256, self.size, self.dim, self.precision, self.target)

    @classmethod
    def of(cls, opened: bundles.Bundle, signed_by: str | None) -> InstalledBundle:
        """Return what a device keeps about a bundle, with a new installation id."""
        manifest = opened.manifest
        backbone = manifest["backbone"]
        return cls(
            name=manifest["name"],
            release=manifest["release"],
            target=manifest["target"],
            size=backbone["size"],
            dim=backbone["dim"],
            precision=backbone["precision"],
            bundle_sha256=opened.sha256,
            signed_by=signed_by,
            installation=secrets.token_hex(8),
            merged=(),
            manifest={key: value for key, value in manifest.items() if key not in _NOT_KEPT},
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> InstalledBundle:
        """Restore from the content of ``device.json``.

        Raises:
            BundleRefusedError: A field is missing, unknown or wrong.
        """
        try:
            bundle = cls(**{**value, "merged": tuple(value["merged"])})
            if bundle.pixels.size != bundle.size:
                raise ValueError(f"size is {bundle.size!r:.20}, but the manifest says {bundle.pixels.size}")
        except (TypeError, KeyError, ValueError, InputError) as error:
            raise BundleRefusedError(f"device.json is damaged ({error}); install the bundle again") from error
        return bundle

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``device.json``."""
        return {**vars(self), "merged": list(self.merged)}
