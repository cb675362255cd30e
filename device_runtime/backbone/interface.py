"""The interface of a device's embedders, and the check of their output."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from ssd_edge.errors import BundleRefusedError, InputError


@dataclasses.dataclass(frozen=True)
class BackboneSpec:
    """The facts of a bundle's backbone that running it depends on.

    Attributes:
        sha256: Digest of the backbone's file, its name in the store.
        size: Side of the input in pixels.
        dim: Dimension D of the embeddings.
        precision: ``fp32``, ``fp16`` or ``int8``.
        target: Name of the target that the bundle was prepared for.
    """

    sha256: str
    size: int
    dim: int
    precision: str
    target: str

    @classmethod
    def from_facts(cls, sha256: str, facts: Mapping[str, Any]) -> BackboneSpec:
        """Select the fields from a mapping that may have others."""
        return cls(sha256, facts["size"], facts["dim"], facts["precision"], facts["target"])


@dataclasses.dataclass(frozen=True)
class EngineRecord:
    """The record of a TensorRT build, as it is stored next to the engine.

    Attributes:
        seconds: Duration of the build.
        bytes: Size of the serialized engine.
        sha256: Digest of the serialized engine.
        layers: Number of layers before and after optimization, and their kinds and types as far as TensorRT reports
            them.
        facts: `EngineFacts` as JSON values.
        cache: Version of the cache format.
        version: Version of TensorRT.
        warnings: Warnings of the builder.
    """

    seconds: float
    bytes: int
    sha256: str
    layers: dict[str, Any]
    facts: dict[str, Any]
    cache: int
    version: str = ""
    warnings: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def from_dict(cls, values: Any) -> EngineRecord:
        """Read a record from JSON values; unknown keys are ignored.

        Raises:
            InputError: The value is not an object, or a key is missing.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        try:
            return cls(**{name: values[name] for name in names if name in values})
        except TypeError as error:
            raise InputError(f"the record of a TensorRT engine is not valid ({error}); delete the engine") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return dataclasses.asdict(self)


class DeviceEmbedder(Protocol):
    """A backbone that runs on this machine.

    Attributes:
        provider: Runtime that executes the backbone.
        size: Side of the input in pixels.
        dim: Dimension D of the embeddings.
        engine: Record of the TensorRT engine; None without one.
    """

    provider: str
    size: int
    dim: int
    engine: EngineRecord | None

    def embed(self, images: np.ndarray) -> np.ndarray:
        """Embed uint8 RGB images ``(N, size, size, 3)`` as float32 ``(N, D)``."""
        ...


def check_embeddings(embeddings: np.ndarray, count: int, dim: int) -> np.ndarray:
    """Return the output of a backbone if it is float32 ``(count, dim)``.

    Its values are checked where the names of the images are known, see `ssd_edge.images.check_embedded`.

    Raises:
        BundleRefusedError: The type or shape is another.
    """
    if embeddings.shape != (count, dim) or embeddings.dtype != np.float32:
        raise BundleRefusedError(
            f"the backbone gives {embeddings.dtype} {embeddings.shape}, but the bundle says float32 "
            f"{(count, dim)}; deploy it again"
        )
    return embeddings
