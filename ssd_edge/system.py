"""How much memory this process holds and has held, as Linux counts it (proc(5))."""

from __future__ import annotations

from pathlib import Path

VERSION = "0.1.0"
PROCESS = Path("/proc/self")
# On x86-64 without VNNI, ONNX Runtime multiplies int8 with instructions that add two products in 16 bits and saturate:
# an int8 backbone then computes something else than on every other machine. This entry selects kernels that do not.
EXACT_INT8 = ("session.x64quantprecision", "1")


def resident(field: str, process: Path = PROCESS) -> int:
    """Bytes of a field of ``status``: ``VmRSS`` now, ``VmHWM`` at most; 0 when the system does not say."""
    try:
        for line in (process / "status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def reset_peak(process: Path = PROCESS) -> bool:
    """Let the count of peak memory begin anew; whether it does."""
    try:
        (process / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def duration(seconds: float | None) -> str:
    """``4 ms``, ``0.42 s``, ``12.3 s``, ``3 min 04 s``, ``2 h 05 min``, or a dash."""
    if seconds is None:
        return "–"
    if seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float | None) -> str:
    """Bytes as ``812 B``, ``4.1 kB``, ``12.3 MB`` (powers of 1,000), or a dash."""
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
