"""A page of pictures of a data set: what is suspicious first, then examples of every class, in one file."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ssd_edge.report.template import fill

MOST_BYTES = 4_500_000  # of all pictures on the page
MOST_PAIRS = 200
_SHARE = 0.4  # of the bytes, at most, for suspicious pictures

Thumbnail = Callable[[str], bytes]


def render(check: Mapping[str, Any], by_class: Mapping[str, Sequence[str]], thumbnail: Thumbnail) -> str:
    """Render the result of ``ssd-edge data check``.

    Args:
        check: `DataCheck.to_dict`.
        by_class: Names of the images by class.
        thumbnail: Returns a small JPEG of an image by its name.

    Returns:
        A complete HTML document of at most about five megabytes.
    """
    pictures = _Pictures(thumbnail)
    leaked = [tuple(pair) for pair in check["leaked"]]
    pairs = list(dict.fromkeys([*leaked, *(tuple(pair) for pair in check["similar"])]))
    twins = []
    for first, second in pairs[:MOST_PAIRS]:
        if not all(pictures.add(name, int(_SHARE * MOST_BYTES)) for name in (first, second)):
            break
        twins.append(
            (first, second, "training and test" if (first, second) in leaked else "both training or both test")
        )
    facts = [
        f"{sum(map(len, by_class.values())):,} images of {len(by_class):,} classes",
        ", ".join(f"{kind} {count:,}" for kind, count in check["formats"].items()),
        check["split"],
    ]
    return fill(
        "pictures.html",
        {
            "title": f"{check['name']}: data check",
            "check": check,
            "facts": list(filter(None, facts)),
            "pairs": twins,
            "more_pairs": len(pairs) - len(twins),
            "classes": _classes(check, by_class, pictures),
            "codes": pictures.codes,
        },
    )


class _Pictures:
    """Pictures of the page, until their bytes are used up.

    Attributes:
        codes: Pictures in base64 by name.
        used: Their bytes, each time that they are on the page.
    """

    def __init__(self, thumbnail: Thumbnail) -> None:
        self._thumbnail = thumbnail
        self.codes: dict[str, str] = {}
        self.used = 0

    def add(self, name: str, most: int = MOST_BYTES) -> bool:
        """Add a picture unless it would exceed `most` bytes; return True if it was added."""
        if self.used >= most:
            return False
        code = self.codes.get(name) or base64.b64encode(self._thumbnail(name)).decode()
        if self.used + len(code) > most:
            return False
        self.codes[name] = code
        self.used += len(code)
        return True


def _classes(
    check: Mapping[str, Any], by_class: Mapping[str, Sequence[str]], pictures: _Pictures
) -> list[dict[str, Any]]:
    """Return what is shown of each class, the smallest first; pictures go round until their bytes are used up."""
    counts = {one["name"]: one for one in check["classes"]}
    order = sorted(by_class, key=lambda name: (len(by_class[name]), name))
    shown: dict[str, list[str]] = {name: [] for name in order}
    for turn in range(max(map(len, by_class.values()), default=0)):
        for name in order:
            if turn < len(by_class[name]):
                # spread over the class: neighbours in a folder are often of one scene
                image = by_class[name][turn * 7919 % len(by_class[name])]
                if pictures.add(image):
                    shown[name].append(image)
        if pictures.used > 0.99 * MOST_BYTES or (turn and not any(len(images) > turn for images in shown.values())):
            break
    found = []
    for name in order:
        count = counts.get(name, {"train": 0, "test": 0})
        caption = f"{count['train']:,} training and {count['test']:,} test images"
        if len(shown[name]) < len(by_class[name]):
            caption += f", {len(shown[name]):,} of them shown"
        found.append({"name": name, "caption": caption, "shown": shown[name]})
    return found
