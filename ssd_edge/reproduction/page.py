"""results.md and its figures, written from the stored results and the YAML files alone.

Nothing depends on the time or the machine: the same results give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ssd_edge import files
from ssd_edge.learners.registry import CLOSED_FORM
from ssd_edge.report.wording import points
from ssd_edge.reproduction import cells
from ssd_edge.reproduction.claims import claims, line
from ssd_edge.reproduction.drawings import figures
from ssd_edge.reproduction.rows import Row, compare, mean, overall, per_task, rows, spread
from ssd_edge.reproduction.specs import BUDGETS, Experiment, budgets, experiments, streams

PAGE, RESULTS, FIGURES = "results.md", Path("results") / "reproduce", Path("results") / "figures"
BEST_FIRST = ("full", "reduced", "smoke")
NONE = "–"
GRADIENT_SSD = "ssd"


def write(out: Path) -> None:
    """Write the page and its figures from the results stored under `out`.

    Raises:
        BundleRefusedError: A stored result is damaged.
    """
    text, drawn = render(cells.Store(out / RESULTS))
    if drawn:
        files.make_directory(out / FIGURES)
        for name, svg in sorted(drawn.items()):
            files.write_text(out / FIGURES / name, svg)
    files.make_directory(out)
    files.write_text(out / PAGE, text)


def render(store: cells.Store) -> tuple[str, dict[str, str]]:
    """Return the page as Markdown and its figures by file name."""
    drawn: dict[str, str] = {}
    tables = {experiment.id: _stored(experiment, store) for experiment in experiments().values()}
    parts = [TITLE, *_claims(tables), *_lead(tables), READING, *_budgets()]
    for experiment in experiments().values():
        parts += _experiment(experiment, tables[experiment.id], drawn)
    parts += [*_unfinished(store), *_machines(store)]
    return "\n\n".join(parts) + "\n", drawn


TITLE = "# The SSD paper, repeated"

READING = """## How to read this page

`ssd-edge reproduce` writes this page from the files in `results/reproduce`; with `--page-only` it runs nothing and only
writes the page. Accuracy is measured on all test images after the last task, in percent: mean ± standard deviation over
class orders, with their number in brackets. No setting was chosen on test images. The paper uses embeddings of a
ConvMixer trained on ImageNet32; here they come from the shipped ResNet-9, trained on Tiny-ImageNet. Compare rows with
each other and with joint training (a ReLU MLP of 1,000 neurons, trained on all data at once) rather than with the
paper's numbers. "SSD" is the paper's algorithm, trained by gradient descent (`ssd`); the default learner of SSD-Edge is
listed under its own name."""

HOLDS = """\
Claims of the paper as differences in points, in the paper and here, with a paired t-test over class orders. *Holds*
means p < 0.05 and at least half of the paper's difference; *in direction*, p < 0.05 and less. The reduced budget has
1,000 neurons and a fifth of the training."""

INSTEAD = """\
Use instead: `slda`, the default learner, or another closed-form head ([learners](learners.md)). It sees each image
once, does not depend on the order of the tasks, and takes seconds. SSD, trained by gradient descent, against the best
of them here:"""


Tables = dict[str, dict[str, list[Row]]]  # rows by stream and budget, longest budget first


def _stored(experiment: Experiment, store: cells.Store) -> Tables:
    """Return the rows of all budgets with stored results; smoke results count only if there are no others."""
    tables: Tables = {}
    for stream in experiment.streams:
        filled: dict[str, list[Row]] = {}
        for budget in BEST_FIRST:
            if budget == "smoke" and filled:
                continue
            table = rows(experiment, stream, budget, store)
            if any(row.results and (budget != "full" or not row.shared) for row in table):
                filled[budget] = table
        tables[stream] = filled or {"reduced": rows(experiment, stream, "reduced", store)}
    return tables


def _shown(experiment: Experiment, tables: Tables) -> list[Row]:
    """Return the printed rows: every system with every budget it was run with, or once with dashes."""
    shown: list[Row] = []
    for by_budget in tables.values():
        for number in range(len(experiment.systems)):
            stored = [table[number] for table in by_budget.values() if table[number].results]
            distinct = {row.length: row for row in stored}
            shown += list(distinct.values()) or [next(iter(by_budget.values()))[number]]
    return shown


# ── introduction ──────────────────────────────────────────────────────────────────────────────────────────
def _claims(tables: Mapping[str, Tables]) -> list[str]:
    """Compare the claims of the paper with the stored results."""
    body = [line(claim, tables[claim.experiment][claim.stream]) for claim in claims() if claim.experiment in tables]
    head = ["claim", "paper", "here", "orders, budget", "p", ""]
    return [HOLDS, _table(head, body)] if body else []


def _lead(tables: Mapping[str, Tables]) -> list[str]:
    """Compare the best closed-form head with the best row of SSD on each stream."""
    best: dict[str, dict[bool, tuple[float, str]]] = {}
    for experiment in experiments().values():
        for row in _shown(experiment, tables[experiment.id]):
            name, accuracy = row.system.learner["name"], mean(row.values("accuracy"))
            if accuracy is None or row.budget == "smoke" or name not in (*CLOSED_FORM, GRADIENT_SSD):
                continue
            closed = name != GRADIENT_SSD
            name = row.system.name if closed else f"{row.system.name} in {experiment.id}"
            kinds = best.setdefault(row.stream, {})
            kinds[closed] = max(kinds.get(closed, (-1.0, "")), (accuracy, name))
    lines = []
    for stream, kinds in best.items():
        if len(kinds) < 2:
            continue
        (ours, system), (theirs, head) = kinds[False], kinds[True]
        lead = theirs - ours
        verb = "leads by" if lead > 0 else "trails by"
        lines.append(
            f"- {streams()[stream].title}: {head} {_percent(theirs)}, best SSD ({system}) {_percent(ours)}; "
            f"the closed-form head {verb} {points(abs(lead))} points"
        )
    if not lines:
        return []
    return [INSTEAD, "\n".join(lines)]


def _budgets() -> list[str]:
    lines = [f"- **{name}**: {' '.join(budgets()[name].why.split())}" for name in reversed(BUDGETS)]
    return ["Budgets:\n\n" + "\n".join(lines)]


# ── experiments ───────────────────────────────────────────────────────────────────────────────────────
def _experiment(experiment: Experiment, tables: Tables, drawn: dict[str, str]) -> list[str]:
    place = f" ({experiment.place})" if experiment.place else ""
    parts = [f"## {experiment.id}: {experiment.title}{place}"]
    if experiment.text:
        parts.append(" ".join(experiment.text.split()))
    shown = _shown(experiment, tables)
    notes: dict[str, int] = {}
    for note in (note for row in shown if row.results for note in row.notes):
        notes.setdefault(note, len(notes) + 1)
    makers = {"entropy": _entropy_table, "trace": _trace_table, "backward_transfer": _transfer_table}
    if experiment.layout == "grid":
        parts.append(_grid(experiment, shown))
    else:
        parts.append(makers.get(experiment.metric, _accuracy_table)(experiment, shown, notes))
    parts += _footnotes(notes) if experiment.layout == "rows" else []
    parts += _absent(experiment, shown)
    parts += _less_forgetting(experiment, tables) if experiment.metric == "backward_transfer" else []
    parts += _paired(experiment, tables)
    for stream, by_budget in tables.items():
        new = figures(experiment, stream, next(iter(by_budget.values())))
        drawn.update(new)
        parts += [f"![{experiment.title}, {streams()[stream].title}]({(FIGURES / name).as_posix()})" for name in new]
    return parts


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [" | ".join(head), "|".join("---" for _ in head), *(" | ".join(cells) for cells in body)]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def _percent(value: float | None) -> str:
    return NONE if value is None else points(value)


def _with_spread(values: Sequence[float], signed: bool = False) -> str:
    """Format mean, standard deviation and number of values: ``62.1 ± 0.8 (3)``."""
    if not values:
        return NONE
    deviation = spread(values)
    beside = "" if deviation is None else f" ± {points(deviation)}"
    return f"{points(mean(values), signed)}{beside} ({len(values)})"


def _named(row: Row, notes: dict[str, int]) -> str:
    """Return the name of the system with the numbers of its notes."""
    numbers = [str(notes[note]) for note in row.notes if note in notes] if row.results else []
    return f"{row.system.name} [{', '.join(numbers)}]" if numbers else row.system.name


def _where(experiment: Experiment, row: Row) -> list[str]:
    return [streams()[row.stream].title] if len(experiment.streams) > 1 else []


def _first(experiment: Experiment) -> list[str]:
    return ["stream"] if len(experiment.streams) > 1 else []


def _accuracy_table(experiment: Experiment, shown: Sequence[Row], notes: dict[str, int]) -> str:
    given = ["task given"] if experiment.task_given else []
    head = ["ours", "joint", "ours ÷ joint", "BWT", "just learned", "last task", *given, "budget"]
    printed = ["paper"] if any(row.system.reported for row in shown) else []
    body = []
    for row in shown:
        share = row.share
        transfer, learned = mean(row.values("backward_transfer")), mean(row.values("learning_accuracy"))
        paper = [_percent(row.system.reported.get(row.stream)) for _ in printed]
        body.append([
            *_where(experiment, row), _named(row, notes), *paper,
            _with_spread(row.values("accuracy")), _percent(mean(row.upper_bound)),
            NONE if share is None else f"{share:.2f}",
            points(transfer, signed=True), _percent(learned), _percent(mean(row.values("last_task_share"))),
            *(_percent(mean(row.values("accuracy_task_given"))) for _ in given), row.length,
        ])  # fmt: skip
    return _table([*_first(experiment), "system", *printed, *head], body)


def _transfer_table(experiment: Experiment, shown: Sequence[Row], notes: dict[str, int]) -> str:
    head = ["system", "paper's BWT", "our BWT", "just learned", "ours", "budget"]
    body = [
        [
            *_where(experiment, row), _named(row, notes), points(row.system.reported.get(row.stream), signed=True),
            _with_spread(row.values("backward_transfer"), signed=True), _percent(mean(row.values("learning_accuracy"))),
            _with_spread(row.values("accuracy")), row.length,
        ]
        for row in shown
    ]  # fmt: skip
    return _table([*_first(experiment), *head], body)


BY_TASK = {
    "activation_entropy": "Eq. 1, all neurons",
    "activation_entropy_alive": "Eq. 1, those ever active",
    "activation_entropy_bound": "bound H(k/r)",
}
OVERALL = {"class_entropy": "class entropy", "class_entropy_weighted": "weighted by activity"}


def _entropy_table(experiment: Experiment, shown: Sequence[Row], notes: dict[str, int]) -> str:
    """Write entropies in nats: Eq. 1 on the data of each task, class entropy on all data."""
    body = []
    for row in shown:
        results = [result for _, result in sorted(row.results.items())]
        entropies = [mean(per_task(results, name)) for name in BY_TASK]
        entropies += [mean(overall(results, name)) for name in OVERALL]
        reported = row.system.reported.get(row.stream)
        body.append([
            *_where(experiment, row), _named(row, notes), NONE if reported is None else f"{reported:g}",
            *(NONE if value is None else f"{value:.4f}" for value in entropies), row.length,
        ])  # fmt: skip
    return _table([*_first(experiment), "system", "paper", *BY_TASK.values(), *OVERALL.values(), "budget"], body)


def _trace_table(experiment: Experiment, shown: Sequence[Row], notes: dict[str, int]) -> str:
    """Write statistics of traces from the second task on, and training accuracy at the end of the last task."""
    head = ["system", "paper", "ours", "lowest cosine", "mean Jaccard", "highest KL", "training accuracy", "budget"]
    body = []
    for row in shown:
        stored = [result["trace"] for _, result in sorted(row.results.items()) if result.get("trace")]
        trace = stored[0] if stored else []
        later = [point for point in trace if point["task"]]
        cosines = [point["subnetwork_cosine"] for point in later if point["subnetwork_cosine"] is not None]
        jaccards = [point["jaccard"] for point in later if point["jaccard"] is not None]
        divergences = [point["teacher_divergence"] for point in later if point["teacher_divergence"] is not None]
        statistics = (min(cosines, default=None), mean(jaccards), max(divergences, default=None))
        body.append([
            *_where(experiment, row), _named(row, notes), _percent(row.system.reported.get(row.stream)),
            _with_spread(row.values("accuracy")), *(NONE if value is None else f"{value:.3f}" for value in statistics),
            _percent(trace[-1]["train_accuracy"] if trace else None), row.length,
        ])  # fmt: skip
    return _table([*_first(experiment), *head], body)


def _grid(experiment: Experiment, shown: Sequence[Row]) -> str:
    """Write accuracy of systems by streams, each with the longest stored budget."""
    best: dict[tuple[str, str], Row] = {}
    for row in shown:
        best.setdefault((row.system.name, row.stream), row)
    columns = [[best[system.name, stream] for system in experiment.systems] for stream in experiment.streams]
    body = [
        [system.name, *(_with_spread(column[number].values("accuracy")) for column in columns)]
        for number, system in enumerate(experiment.systems)
    ]
    stored = [[row for row in column if row.results] for column in columns]
    body.append(["budget", *(", ".join(dict.fromkeys(row.length for row in column)) or NONE for column in stored)])
    stand_ins = [any(result["stand_in"] for row in column for result in row.results.values()) for column in stored]
    if any(stand_ins):
        body.append(["data", *("digits, as a stand-in" if stand_in else "its own" for stand_in in stand_ins)])
    return _table(["system", *(streams()[stream].title for stream in experiment.streams)], body)


def _footnotes(notes: dict[str, int]) -> list[str]:
    return ["\n".join(f"- [{number}] {note}" for note, number in notes.items())] if notes else []


def _absent(experiment: Experiment, shown: Sequence[Row]) -> list[str]:
    """Explain missing streams that need more than data."""
    names = {row.stream for row in shown} - {row.stream for row in shown if row.results}
    return [
        f"{streams()[name].title} was not run, because it needs a backbone that has not seen its classes "
        f"(`ssd-edge pretrain DIR --classes 0:100 data.path={streams()[name].data}`, then `--tiny-backbone DIR`)."
        for name in experiment.streams
        if name in names and streams()[name].backbone != "shipped"
    ]


def _less_forgetting(experiment: Experiment, tables: Tables) -> list[str]:
    """Write 1 − |BWT of the first| / |BWT of the second| for each pair, the paper's measure."""
    lines = []
    for stream, by_budget in tables.items():
        for budget, table in by_budget.items():
            transfer = {row.system.name: mean(row.values("backward_transfer")) for row in table}
            for first, second in experiment.paired:
                ours, theirs = transfer[first], transfer[second]
                if ours is None or not theirs:
                    continue
                share = 1 - abs(ours) / abs(theirs)
                comparative = "less" if share >= 0 else "more"
                text = f"{first} forgets {points(abs(share))} % {comparative} than {second} ({budget} budget)"
                lines.append(f"{streams()[stream].title}: {text}.")
    return lines


def _paired(experiment: Experiment, tables: Tables) -> list[str]:
    """Write the differences of accuracy by class order, with a paired t-test."""
    body = []
    for stream, by_budget in tables.items():
        for budget, table in by_budget.items():
            by_name = {row.system.name: row for row in table}
            for first, second in experiment.paired:
                test = compare(by_name[first], by_name[second])
                if not test.differences:
                    continue
                body.append([
                    streams()[stream].title, f"{first} − {second}",
                    ", ".join(points(value, signed=True) for value in test.differences),
                    points(mean(test.differences), signed=True),
                    NONE if test.t is None else f"{test.t:.2f}".replace("-", "−"),
                    NONE if test.p is None else f"{test.p:.3f}", budget,
                ])  # fmt: skip
    if not body:
        return []
    head = ["stream", "difference in points", "by class order", "mean", "t", "p, two-sided", "budget"]
    return ["Paired t-test of accuracy over class orders:", _table(head, body)]


# ── appendix ──────────────────────────────────────────────────────────────────────────────────────────────
def _unfinished(store: cells.Store) -> list[str]:
    """List the experiments whose published schedule has not been run, with the command for it."""
    body = []
    for experiment in experiments().values():
        stored, count = cells.counts(experiment, "full", store)
        if stored < count:
            body.append([experiment.id, f"{stored} of {count}", f"`ssd-edge reproduce {experiment.id} --budget full`"])
    if not body:
        return []
    return ["## Not run with the published schedule", _table(["experiment", "cells stored", "command"], body)]


def _machines(store: cells.Store) -> list[str]:
    """List the versions and machines that produced the numbers."""
    machines: dict[tuple[str, ...], int] = {}
    for result in store:
        environment = result["environment"]
        versions = ", ".join(f"{name} {version}" for name, version in sorted(environment["versions"].items()))
        revision, _, changed = (environment["git_sha"] or "a wheel").partition("-")
        revision = f"{revision[:12]}, changed" if changed else revision[:12]
        key = (versions, environment["machine"], environment["device"], str(environment["threads"]), revision)
        machines[key] = machines.get(key, 0) + 1
    if not machines:
        return []
    body = [[*key, str(count)] for key, count in sorted(machines.items())]
    head = ["versions", "machine", "device", "threads", "commit", "cells"]
    return ["## Where these numbers come from", _table(head, body)]
