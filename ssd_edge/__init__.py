"""SSD-Edge: continual learning for edge devices.

`train`, `resume`, `load_run`, `Run` and `Classifier` are imported from `ssd_edge.api` on first use, so that
``import ssd_edge`` does not import PyTorch.
"""

from typing import TYPE_CHECKING

from ssd_edge.system import VERSION, disable_telemetry

if TYPE_CHECKING:
    from ssd_edge.api import Classifier, Run, load_run, resume, train

disable_telemetry()
__version__ = VERSION
__all__ = ["Classifier", "Run", "load_run", "resume", "train"]


def __getattr__(name: str) -> object:
    """Import a name of the Python API on first use."""
    if name in __all__:
        from ssd_edge import api

        return getattr(api, name)
    raise AttributeError(f"module 'ssd_edge' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
