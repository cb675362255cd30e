"""Pages from the templates of this folder: complete HTML documents that need no network and no other file.

`base.html` has what all pages share. Whatever is filled in is text; markup is only in the templates.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssd_edge.errors import require
from ssd_edge.report.wording import percent, points
from ssd_edge.system import duration, size


def fill(name: str, content: Mapping[str, Any]) -> str:
    """Return a page.

    Args:
        name: File of its template.
        content: Variables of the template.

    Raises:
        EnvironmentUnfitError: Jinja2 is not installed; PyTorch brings it.
    """
    jinja2 = require("jinja2", "train", "write a report", "jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": percent, "points": points, "duration": duration, "size": size}
    page: str = environment.get_template(name).render(content)
    return page
