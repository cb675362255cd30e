"""``ssd-edge bench``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ssd_edge.cli.options import JSON, echo, log, print_json

if TYPE_CHECKING:
    from ssd_edge.run.bench import Report, Spread


@click.command()
@click.option("--full", is_flag=True, help="10,000 samples, 40 epochs and larger networks; takes many minutes.")
@JSON
def bench(full: bool, as_json: bool) -> None:
    """Measure the learning speed of this machine.

    Compares training of SDMLP with dense autograd, with touched rows in PyTorch, and with compiled epochs.
    """
    from ssd_edge.run.bench import FULL, Size
    from ssd_edge.run.bench import bench as measure

    report = measure(FULL if full else Size(), log)
    if as_json:
        print_json(report.to_dict())
    else:
        for line in lines(report):
            echo(line)


def lines(report: Report) -> list[str]:
    """Return the lines that `bench` prints."""
    machine = report.environment
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    text = [
        f"measured on {machine['machine']} ({', '.join(report.features) or 'no features known'})",
        f"  {versions}",
        "",
        f"seconds per epoch: {'median (least to most)':28}{'dense autograd':>24}{'touched rows':>24}{'compiled':>24}",
    ]
    for row in report.rows:
        for threads, seconds in ((1, row.seconds), (row.threads, row.seconds_all_threads)):
            head = f"  {row.case}, {threads} thread{'s' * (threads > 1)}"
            cells = (_cell(seconds.get(name)) for name in ("dense", "touched", "compiled"))
            text.append(f"{head:47}" + "".join(f"{cell:>24}" for cell in cells))
    if report.loading_seconds is None:
        hint = "the compiled epoch needs Numba: pip install 'ssd-edge[fast]'"
        ratios = (f"{row.case} {row.touched_ratio:.1f}x" for row in report.rows)
        return [*text, "", f"touched rows against dense autograd: {'; '.join(ratios)}; {hint}"]
    text += [f"  (loading the compiled epoch took {report.loading_seconds:.1f} s, which is not counted)", ""]
    for row in report.rows:
        if row.compiled is None:
            continue
        text += [
            f"{row.case}: the whole task of {row.epochs} epochs against dense autograd: "
            f"{row.compiled.ratio:.1f}x with one thread, {row.compiled.ratio_all_threads:.1f}x with {row.threads}",
            f"  an epoch of the second half takes {row.compiled.scores_ratio:.2f} of the time of its scores alone",
            f"  accuracy {row.accuracy['dense']:.4f} and {row.accuracy['compiled']:.4f}, "
            f"{100 * row.compiled.equal_predictions:.2f} % of the predictions equal; "
            f"{row.compiled.active:.1f} neurons active for a sample",
        ]
    if report.curve:
        text += ["", f"{'neurons':>9}{'first epoch':>14}{'second half':>14}{'scores alone':>14}{'evaluated':>12}"]
        for point in report.curve:
            times = (point.first_epoch, point.second_half, point.scores)
            cells = (f"{seconds:>12.3f} s" for seconds in times)
            text.append(f"{point.neurons:>9,}{''.join(cells)}{point.evaluated:>12,}")
    if report.memory:
        held = report.memory
        text += [
            "",
            f"memory: learning a task of 10,000 embeddings takes {held.on_top:.1f} MiB on top of the model "
            f"({held.model:.1f}) and its embeddings; scores of a batch are {held.batch_scores:.1f}, of the task "
            f"{held.all_scores:.0f}",
        ]
    return text


def _cell(seconds: Spread | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds.median:.4f} ({seconds.least:.4f}-{seconds.most:.4f})"
