"""The part of a generation that answers; reading it needs no PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from device_runtime.install.installed import InstalledBundle
from ssd_edge import files
from ssd_edge.answers.head import NAME, Head, Limits
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import BundleRefusedError


@dataclasses.dataclass(frozen=True)
class Answering:
    """Parts that turn embeddings into answers. All parts refer to the same classes, in the same rows.

    Attributes:
        registry: The classes.
        bundle: The installed bundle.
        probe: Bytes of the bundle's probe, see `selftest`.
        head: What gives the scores.
        unknown: Thresholds for ``unknown``.
    """

    registry: ClassRegistry
    bundle: InstalledBundle
    probe: bytes
    head: Head
    unknown: Limits

    @classmethod
    def read(cls, read: Callable[[str], bytes], head: Head | None = None) -> Answering:
        """Restore it from the files of a generation.

        Args:
            read: File name → bytes, such as `Generation.read`.
            head: The head, if it is none of these files.

        Raises:
            BundleRefusedError: A file is damaged, or the files do not belong together.
        """
        registry = ClassRegistry.from_json(files.parse_json(read("classes.json"), "classes.json"))
        bundle = InstalledBundle.from_json(files.parse_json(read("device.json"), "device.json"))
        probe = read("probe.safetensors")
        head = Head.parse(read(NAME)) if head is None else head
        unknown = Limits.from_state(files.parse_tensors(read("unknown.safetensors"), "unknown.safetensors")[0])
        rows, limited = len(registry), len(unknown.thresholds)
        dims = (bundle.dim, head.dim, unknown.axes.shape[1])
        if (head.classes, limited) != (rows, rows) or dims != (bundle.dim,) * 3:
            raise BundleRefusedError(
                f"the registry has {rows} classes, but the head {head.classes} and the thresholds for 'unknown' "
                f"{limited}, and they have {dims[1]} and {dims[2]} features, but the backbone gives {dims[0]}; install "
                "the bundle again"
            )
        return cls(registry, bundle, probe, head, unknown)
