"""Log records as lines of JSON."""

from __future__ import annotations

import json
import logging
import math
import numbers
import time
import warnings
from collections.abc import Mapping
from typing import Any

from ssd_edge.system import utc_now

LONGEST = 4000  # characters per text in a log line; names are untrusted, and flash is small


class JsonLines(logging.Formatter):
    """Formatter of log records as one JSON object per line, in ASCII without control characters.

    Keys: ``monotonic`` (seconds since boot), ``untrusted_time`` (UTC; a device without a clock battery starts in 1970),
    ``level``, ``source`` (name of the logger), ``code`` (a word that stays the same when the message is rewritten, of
    ``extra={"code": …}``), ``event`` (message), ``fields`` (of
    ``extra={"fields": {…}}``) and ``error`` (traceback); code, fields and error only if present.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without a newline."""
        line: dict[str, Any] = {
            "monotonic": round(time.monotonic(), 3),
            "untrusted_time": utc_now(),
            "level": record.levelname.lower(),
            "source": record.name,
            **({"code": record.code} if hasattr(record, "code") else {}),
            "event": record.getMessage()[:LONGEST],
        }
        fields = getattr(record, "fields", None)
        if fields:
            line["fields"] = _plain(fields)
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)[-LONGEST:]  # the end of a traceback has the error
        return json.dumps(line, allow_nan=False)


def _plain(value: Any, depth: int = 4) -> Any:
    """Convert any value to JSON values, so that logging never fails."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):  # also NumPy's
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, Mapping) and depth:
        return {str(key)[:LONGEST]: _plain(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple) and depth:
        return [_plain(item, depth - 1) for item in value]
    return str(value)[:LONGEST]


def log_json(level: int = logging.INFO) -> logging.Handler:
    """Log everything at or above `level` to standard error as `JsonLines`, which systemd stores in its journal.

    Warnings of Python are logged, too: decoders have one for many a damaged image.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=level, force=True)
    warnings.showwarning = lambda message, category, *_: logging.getLogger("warnings").warning(
        "%s: %s", category.__name__, message, extra={"code": "python_warning"}
    )
    return handler
