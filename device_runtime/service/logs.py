"""Log records as lines of JSON."""

from __future__ import annotations

import json
import logging
import math
import numbers
import time
from collections.abc import Mapping
from typing import Any

from ssd_edge.system import utc_now

LONGEST = 4000  # characters of one text in a log line: flash is small, and a name may be a stranger's


class JsonLines(logging.Formatter):
    """One JSON object a line, in ASCII without control characters.

    Keys: ``monotonic`` (seconds since this boot; the order within a boot), ``untrusted_time`` (wall clock, UTC; a box
    without a clock battery starts in 1970), ``level``, ``source`` (the logger), ``event`` (the message), ``fields`` (of
    ``log.info("…", extra={"fields": {…}})``), and ``error`` (a traceback) where there is one.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, Any] = {
            "monotonic": round(time.monotonic(), 3),
            "untrusted_time": utc_now(),
            "level": record.levelname.lower(),
            "source": record.name,
            "event": record.getMessage()[:LONGEST],
        }
        fields = getattr(record, "fields", None)
        if fields:
            line["fields"] = _plain(fields)
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)[-LONGEST:]  # its end says what happened
        return json.dumps(line, allow_nan=False)


def _plain(value: Any, depth: int = 4) -> Any:
    """JSON values in place of any others: a log line must come out whatever is put in."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):  # NumPy's too
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, Mapping) and depth:
        return {str(key)[:LONGEST]: _plain(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple) and depth:
        return [_plain(item, depth - 1) for item in value]
    return str(value)[:LONGEST]


def log_json(level: int = logging.INFO) -> logging.Handler:
    """Make standard error `JsonLines` of everything at or above `level`; systemd keeps them in its journal."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=level, force=True)
    return handler
