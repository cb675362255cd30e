"""The report of a run: one HTML page that needs no network and no script."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ssd_edge.report.compare import ROLES, compared, lead_note, ranked
from ssd_edge.report.figures import curves, heat_map
from ssd_edge.report.wording import describe_stream, percent, points, step_name
from ssd_edge.system import duration, size

MOST_CLASSES = 40  # a longer list of bars is scrolled past, not read


def render(metrics: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """The page.

    Args:
        metrics: Content of metrics.json; `baselines` and `panel` may be empty.
        run: Content of run.json.

    Returns:
        A complete HTML document.
    """
    name, data, steps = compared(metrics)[0].display, str(metrics["data"]), len(metrics["accuracy_matrix"])
    heading, step = f"{name} on {data}", step_name(len(metrics["tasks"]), steps)
    facts = [
        describe_stream(metrics),
        f"{metrics['train_images']:,} training and {metrics['test_images']:,} test images ({metrics['split']})",
        f"seed {run.get('seed')}",
    ]
    note = lead_note(metrics)
    body = [
        tag("p", "SSD-Edge · training report", class_="eyebrow"),
        tag("h1", escape(heading)),
        tag("p", escape(" · ".join(facts)), class_="facts"),
        tag("p", escape(_choice(metrics["choice"])), class_="facts") if "choice" in metrics else "",
        tag("p", escape(note), class_="note") if note else "",
        _cards(metrics),
        _curves_section(metrics) if steps > 1 else "",
        section(
            "What is remembered",
            f"Test accuracy in percent: each row is the state after one more {step}, each column one task’s images. "
            "A column begins where its classes, named beside it, are learned; downwards it shows what becomes of them.",
            tag("div", heat_map(metrics), class_="scroll"),
        ),
        _comparison_section(metrics),
        section("Class by class", "Final test accuracy, the worst first.", _class_bars(metrics)),
        _files_section(run.get("accounts") or {}),
        _setup(run),
    ]
    return document(heading, body)


def document(heading: str, body: Sequence[str], style: str = "") -> str:
    """Return a complete HTML document that needs no other file.

    Args:
        heading: Text of its title.
        body: Markup; empty parts are left out.
        style: Further rules.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(heading)} · SSD-Edge</title><style>{_STYLE}{style}</style></head>\n"
        f"<body><main>\n{chr(10).join(filter(None, body))}\n</main></body></html>\n"
    )


def _choice(choice: Mapping[str, Any]) -> str:
    """Describe the choice of ``learner.name=auto`` and its candidates."""

    def one(row: Mapping[str, Any]) -> str:
        accuracy = "" if row["accuracy"] is None else f" {row['accuracy']:.3f}"
        return f"{row['name']}{accuracy} ({size(row['state_bytes'])})"

    return f"Chosen by learner.name=auto: {choice['sentence']}. Candidates: {', '.join(map(one, choice['rows']))}."


def tag(name: str, *content: str, **attributes: object) -> str:
    """Return an element.

    Args:
        name: of the element.
        content: markup; text in it must be escaped already.
        attributes: escaped here. ``class_`` is written ``class`` and ``text_anchor`` ``text-anchor``; an attribute
            that is None is left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{round(value, 1) if isinstance(value, float) else escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{written}>{''.join(content)}</{name}>"


def _bar(share: float, title: str, limit: float | None = None) -> str:
    """Return a bar over the full width, 0 to 100 %, with a mark at `limit`; it grows with the page."""
    mark = "" if limit is None else tag("line", x1=f"{100 * limit:.1f}%", x2=f"{100 * limit:.1f}%", y1=0, y2=26)
    track = tag("rect", y=6, width="100%", height=14, rx=3, class_="track")
    fill = tag("rect", y=6, width=f"{100 * share:.1f}%", height=14, rx=3, class_="fill")
    return tag("svg", tag("title", escape(title)), track, fill, mark, width="100%", height=26, role="img")


def section(heading: str, caption: str, *content: str) -> str:
    """Return a section of the page; heading and caption are escaped here."""
    return tag("section", tag("h2", escape(heading)), tag("p", escape(caption), class_="caption"), *content)


def _cards(metrics: Mapping[str, Any]) -> str:
    cards = [
        ("Average accuracy", percent(metrics["average_accuracy"]), "over all tasks, at the end"),
        ("Average incremental accuracy", percent(metrics["average_incremental_accuracy"]), "over the whole stream"),
        ("Backward transfer", points(metrics["backward_transfer"], signed=True), "points; below zero is forgetting"),
        ("Forgetting", points(metrics["forgetting"]), "points below the best before"),
        ("Time", duration(metrics.get("seconds")), f"{metrics['train_images']:,} training images"),
        ("State", size(metrics.get("state_bytes")), "all that is learned, without the backbone"),
    ]
    return tag(
        "div",
        *(
            tag("div", tag("h3", label), tag("p", escape(value), class_="value"), tag("p", escape(hint)), class_="card")
            for label, value, hint in cards
        ),
        class_="cards",
    )


def _curves_section(metrics: Mapping[str, Any]) -> str:
    return section(
        "Accuracy while classes arrive",
        "Mean accuracy on all tasks learned so far. It falls as the choice grows and as tasks are forgotten.",
        tag("div", curves(metrics, wide=True), class_="wide"),
        tag("div", curves(metrics, wide=False), class_="narrow"),
    )


def _comparison_section(metrics: Mapping[str, Any]) -> str:
    heading = "Against everything else"
    if len(compared(metrics)) == 1:
        return section(heading, "Neither baselines nor the panel were run: nothing says how good these numbers are.")
    return section(
        heading,
        "Final average accuracy on the same embeddings and the same stream. "
        "Joint training sees all classes at once: the usual upper bound.",
        _bars(metrics),
        tag("div", _table(metrics), class_="scroll"),
    )


def _bars(metrics: Mapping[str, Any]) -> str:
    """Return bars of the final average accuracy, best first; joint training is a vertical line."""
    methods = ranked(metrics)
    limit = next((method.values["average_accuracy"] for method in methods if method.role == "joint"), None)
    rows = []
    if limit is not None:
        said, at = f"joint training {percent(limit)}", {"x": f"{100 * limit:.1f}%", "y": 15}
        if limit > 0.5:
            label = tag("text", f"{said} ▾", **at, dx=4, text_anchor="end")
        else:
            label = tag("text", f"▾ {said}", **at, dx=-4)
        rows.append(tag("span") + tag("svg", label, width="100%", height=20, class_="limit") + tag("span"))
    for method in methods:
        if method.role != "joint":
            accuracy = method.values["average_accuracy"]
            drawn = _bar(accuracy, f"{method.display}: {percent(accuracy)}", limit)
            rows.append(_bar_row(method.display, drawn, percent(accuracy), method.role))
    return tag("div", *rows, class_="bars")


def _bar_row(name: str, drawn: str, number: str, role: str = "") -> str:
    return (
        tag("span", escape(name), class_=f"label {role}", title=name)
        + tag("span", drawn, class_=f"bar {role}")
        + tag("span", number, class_=f"amount {role}")
    )


def _table(metrics: Mapping[str, Any]) -> str:
    """Return the table below the bars."""
    heads = ("Average accuracy", "Average incremental", "Backward transfer", "Forgetting", "Time", "State")
    rows = [tag("tr", *(tag("th", head, scope="col") for head in ("Method", "", *heads)))]
    for method in ranked(metrics):
        values = method.values
        cells = [
            ROLES[method.role],
            percent(values["average_accuracy"]),
            percent(values.get("average_incremental_accuracy")),
            points(values.get("backward_transfer"), signed=True),
            points(values.get("forgetting")),
            duration(values.get("seconds")),
            size(values.get("state_bytes")),
        ]
        name = tag("th", escape(method.display), scope="row")
        rows.append(tag("tr", name, *(tag("td", cell) for cell in cells), class_=method.role))
    return tag("table", *rows)


def _class_bars(metrics: Mapping[str, Any]) -> str:
    ordered = sorted(metrics["class_accuracy"].items(), key=lambda item: item[1])
    shown, rest = ordered[:MOST_CLASSES], ordered[MOST_CLASSES:]
    rows = [_bar_row(name, _bar(value, f"{name}: {percent(value)}"), percent(value)) for name, value in shown]
    bars = tag("div", *(tag("div", row) for row in rows), class_="classes")
    if not rest:
        return bars
    span = f"from {percent(rest[0][1])} to {percent(rest[-1][1])}"
    return bars + tag("p", f"and {len(rest)} more, {span}", class_="caption")


def _files_section(accounts: Mapping[str, Any]) -> str:
    """Return what the data set holds besides the images that were used, see `ssd_edge.data.accounts`."""
    lines = [*accounts.get("warnings", ()), *(f"not looked at: {text}" for text in [accounts.get("ignored")] if text)]
    if not lines:
        return ""
    listed = tag("ul", *(tag("li", escape(line)) for line in lines))
    every = [tag("li", escape(problem)) for problem in accounts.get("skipped", ())]
    more = tag("details", tag("summary", f"All {len(every):,} left out"), tag("ul", *every)) if len(every) > 1 else ""
    return section("Files", "What was found besides the images that were used.", listed, more)


def _setup(run: Mapping[str, Any]) -> str:
    """Return the command, versions and configuration of the run."""
    keys = ("machine", "threads", "seed", "git_sha", "started", "finished")
    parts = {
        "Run": {key.replace("_", " "): run.get(key) for key in keys},
        "Versions": run.get("versions"),
        "Backbone": run.get("backbone"),
        "Configuration": run.get("config"),
    }
    blocks = [tag("div", tag("h3", heading), _tree(value)) for heading, value in parts.items() if value]
    command = tag("pre", escape(shlex.join(map(str, run.get("argv", ())))))
    return tag("details", tag("summary", "Setup"), command, tag("div", *blocks, class_="setup"))


def _tree(value: Any) -> str:
    """Return nested values as nested lists."""
    if isinstance(value, Mapping):
        rows = (tag("dt", escape(str(key))) + tag("dd", _tree(inner)) for key, inner in value.items())
        return tag("dl", *rows)
    if isinstance(value, Iterable) and not isinstance(value, str):
        return escape(", ".join(map(str, value))) or "–"
    return "–" if value is None or value == "" else escape(str(value))


# The colours of lines and cells are in `figures`. Dark is for screens only: paper stays white.
_STYLE = """
:root { color-scheme: light dark;
  --page: #f5f6f8; --card: #fff; --edge: #dde2e8; --ink: #17202b; --soft: #56616f; --accent: #0a56c4; --tint: #e8f0fc;
  --warn: #8a5300; --warn-tint: #fdf3e0; --track: #eceff3; --bar: #8291a4; }
@media screen and (prefers-color-scheme: dark) { :root {
  --page: #0d1117; --card: #161b22; --edge: #2b333e; --ink: #e6ebf1; --soft: #9aa7b5; --accent: #6cb2ff;
  --tint: #14263d; --warn: #f0bb62; --warn-tint: #2b2314; --track: #222a34; --bar: #67788b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1080px; margin: 0 auto; padding: 48px 24px 64px; }
h1, h2, h3, p { margin: 0; }
h1 { font-size: clamp(28px, 5vw, 40px); line-height: 1.15; letter-spacing: -.02em; overflow-wrap: anywhere; }
h2 { font-size: 20px; letter-spacing: -.01em; }
h3 { font-size: 13px; font-weight: 600; color: var(--soft); }
.eyebrow { color: var(--accent); font-size: 13px; font-weight: 600; margin-bottom: 8px; }
.facts { color: var(--soft); margin-top: 10px; overflow-wrap: anywhere; }
.note { margin-top: 20px; padding: 10px 16px; border-left: 4px solid var(--warn); border-radius: 4px;
  background: var(--warn-tint); color: var(--warn); font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(6, 1fr); gap: 12px; margin: 24px 0; }
.card, section, details { background: var(--card); border: 1px solid var(--edge); border-radius: 12px; }
.card { padding: 14px 16px; display: grid; grid-row: span 3; grid-template-rows: subgrid; row-gap: 0; }
.card h3 { line-height: 1.3; }
.card p { color: var(--soft); font-size: 12.5px; line-height: 1.35; }
.card .value { color: var(--ink); font-size: 25px; font-weight: 650; letter-spacing: -.02em; line-height: 1.3;
  margin: 2px 0 6px; white-space: nowrap; }
.card:first-child { background: var(--tint); border-color: var(--accent); }
.card:first-child .value { color: var(--accent); }
section, details { padding: 24px; margin-top: 16px; }
.caption { color: var(--soft); max-width: 96ch; margin: 4px 0 18px; }
svg { display: block; color: var(--soft); font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
  sans-serif; font-variant-numeric: tabular-nums; }
svg text { fill: currentColor; }
svg .learner, svg .number { color: var(--ink); }
.scroll { overflow-x: auto; }
.narrow { display: none; }
.cells use:hover { stroke: var(--ink); stroke-width: 1.5; }
.bars, .classes > div { display: grid; grid-template-columns: 128px 1fr 64px; column-gap: 12px;
  align-items: center; }
.label { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.amount { text-align: right; font-variant-numeric: tabular-nums; }
.bars .baseline, .bars .panel { color: var(--soft); }
.label.learner, .amount.learner { color: var(--accent); font-weight: 700; }
.track { fill: var(--track); }
.fill { fill: var(--bar); }
.learner .fill, .classes .fill { fill: var(--accent); }
.limit { overflow: visible; }
.bar line { stroke: var(--ink); stroke-dasharray: 4 3; }
.classes { columns: 2; column-gap: 40px; }
.classes > div { break-inside: avoid; }
.classes + .caption { margin: 12px 0 0; }
table { border-collapse: collapse; width: 100%; margin-top: 24px; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; text-align: right; white-space: nowrap; border-top: 1px solid var(--edge);
  font-weight: 400; }
tr:first-child th { color: var(--soft); border-top: 0; white-space: normal; vertical-align: bottom; line-height: 1.25; }
th:first-child, td:nth-child(2) { text-align: left; }
td:nth-child(2) { color: var(--soft); }
tr.learner > * { background: var(--tint); font-weight: 650; }
summary { font-size: 20px; font-weight: 700; letter-spacing: -.01em; cursor: pointer; }
pre { background: var(--track); border-radius: 8px; padding: 12px 16px; font-size: 13px; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.setup { columns: 2; column-gap: 40px; font-size: 14px; }
.setup > div { margin-bottom: 20px; }
.setup > div:last-child { break-before: column; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 2px 16px; margin: 6px 0 0; }
dl dl { margin: 0 0 6px; grid-column: 1 / -1; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
@media (max-width: 960px) { .cards { grid-template-columns: repeat(3, 1fr); } }
@media (max-width: 640px) {
  main { padding: 28px 12px 40px; }
  section, details { padding: 18px 14px; }
  .cards { grid-template-columns: repeat(2, 1fr); }
  .classes, .setup { columns: 1; }
  .bars, .classes > div { grid-template-columns: 96px 1fr 60px; column-gap: 8px; }
  th:nth-child(2), td:nth-child(2) { display: none; }
  .wide { display: none; } .narrow { display: block; }
}
@media print {
  body { background: #fff; font-size: 12px; }
  main { padding: 0; max-width: none; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  h2, summary { font-size: 16px; }
  section, details { padding: 14px 16px; }
  section, .card, tr { break-inside: avoid; }
  .cards { grid-template-columns: repeat(6, 1fr); gap: 8px; }
  .card { padding: 10px; } .card h3, .card p { font-size: 10px; } .card .value { font-size: 16px; }
  .scroll { overflow: visible; }
  table, .setup, pre { font-size: 10.5px; }
  th, td { padding: 3px 6px; }
  details::details-content { content-visibility: visible; height: auto; }
}
"""
