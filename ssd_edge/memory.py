"""How much memory this process holds and has held, as Linux counts it (proc(5))."""

from __future__ import annotations

from pathlib import Path

PROCESS = Path("/proc/self")


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
