"""A page of pictures of a data set: what is suspicious first, then examples of every class, in one file."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from ssd_edge.report.html import document, section, tag

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
    pairs = _pairs_section(check, pictures)
    total = sum(map(len, by_class.values()))
    facts = [
        f"{total:,} images of {len(by_class):,} classes",
        ", ".join(f"{kind} {count:,}" for kind, count in check["formats"].items()),
        check["split"],
    ]
    body = [
        tag("p", "SSD-Edge · data check", class_="eyebrow"),
        tag("h1", escape(check["name"])),
        tag("p", escape(" · ".join(filter(None, facts))), class_="facts"),
        tag("p", escape(f"Training would refuse it: {check['obstacle']}"), class_="note") if check["obstacle"] else "",
        _list("Cannot be used", "Files that training refuses, or leaves out with --skip-bad.", check["problems"]),
        _list("What may mislead", "Found in names, contents and numbers of the images.", check["warnings"]),
        pairs,
        *_classes(check, by_class, pictures),
    ]
    return document(f"{check['name']}: data check", body, _STYLE)


class _Pictures:
    """Pictures of the page, until their bytes are used up."""

    def __init__(self, thumbnail: Thumbnail) -> None:
        self._thumbnail, self.used = thumbnail, 0

    def add(self, name: str, most: int = MOST_BYTES) -> str:
        """Return an image with its name, or an empty text if it would exceed `most` bytes."""
        if self.used >= most:
            return ""
        code = base64.b64encode(self._thumbnail(name)).decode()
        if self.used + len(code) > most:
            return ""
        self.used += len(code)
        return tag("img", src=f"data:image/jpeg;base64,{code}", alt=name, title=name, loading="lazy").replace(
            "</img>", ""
        )


def _list(heading: str, caption: str, lines: Sequence[str]) -> str:
    return section(heading, caption, tag("ul", *(tag("li", escape(line)) for line in lines))) if lines else ""


def _pairs_section(check: Mapping[str, Any], pictures: _Pictures) -> str:
    """Return pairs of similar images, those of a training and a test image first."""
    leaked = [tuple(pair) for pair in check["leaked"]]
    pairs = list(dict.fromkeys([*leaked, *(tuple(pair) for pair in check["similar"])]))
    shown = []
    for first, second in pairs[:MOST_PAIRS]:
        images = [pictures.add(name, int(_SHARE * MOST_BYTES)) for name in (first, second)]
        if not all(images):
            break
        kind = "training and test" if (first, second) in leaked else "both training or both test"
        shown.append(tag("figure", *images, tag("figcaption", escape(f"{kind}: {first} ~ {second}"))))
    if not shown:
        return ""
    rest = f" {len(pairs) - len(shown):,} more are not shown." if len(pairs) > len(shown) else ""
    return section(
        "Nearly identical images",
        f"A test image that is also a training image makes accuracy look better than it is.{rest}",
        tag("div", *shown, class_="pairs"),
    )


def _classes(check: Mapping[str, Any], by_class: Mapping[str, Sequence[str]], pictures: _Pictures) -> list[str]:
    """Return a section for each class, the smallest first; pictures go round until their bytes are used up."""
    counts = {one["name"]: one for one in check["classes"]}
    order = sorted(by_class, key=lambda name: (len(by_class[name]), name))
    shown: dict[str, list[str]] = {name: [] for name in order}
    for turn in range(max(map(len, by_class.values()), default=0)):
        for name in order:
            if turn < len(by_class[name]):
                # spread over the class: neighbours in a folder are often of one scene
                at = turn * 7919 % len(by_class[name])
                if image := pictures.add(by_class[name][at]):
                    shown[name].append(image)
        if pictures.used > 0.99 * MOST_BYTES or (turn and not any(len(images) > turn for images in shown.values())):
            break
    sections = []
    for name in order:
        count = counts.get(name, {"train": 0, "test": 0})
        caption = f"{count['train']:,} training and {count['test']:,} test images"
        if len(shown[name]) < len(by_class[name]):
            caption += f", {len(shown[name]):,} of them shown"
        sections.append(section(name, caption, tag("div", *shown[name], class_="pictures")))
    return sections


_STYLE = """
.pictures, figure { display: flex; flex-wrap: wrap; gap: 6px; margin: 0; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(212px, 1fr)); gap: 16px; }
figcaption { flex-basis: 100%; color: var(--soft); font-size: 12px; overflow-wrap: anywhere; }
img { width: 96px; height: 96px; object-fit: contain; border-radius: 6px; background: var(--track); }
ul { margin: 0; padding-left: 20px; } li { overflow-wrap: anywhere; margin-bottom: 4px; }
h2 { overflow-wrap: anywhere; }
"""
