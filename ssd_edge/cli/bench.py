"""``ssd-edge bench``."""

from __future__ import annotations

from typing import Any

import click

from ssd_edge.cli.options import JSON, print_json


@click.command()
@click.option("--full", is_flag=True, help="10,000 samples, 40 epochs, and larger networks: many minutes.")
@JSON
def bench(full: bool, as_json: bool) -> None:
    """How fast this machine learns: dense autograd, touched rows in PyTorch, and the compiled epoch."""
    from ssd_edge.run.bench import FULL, Size
    from ssd_edge.run.bench import bench as measure

    result = measure(FULL if full else Size(), lambda text: click.echo(text, err=True))
    if as_json:
        print_json(result)
    else:
        for line in lines(result):
            click.echo(line)


def lines(result: dict[str, Any]) -> list[str]:
    """What `bench` prints, of what `ssd_edge.run.bench.bench` returns."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    told = [
        f"measured on {result['machine']} ({', '.join(result['features']) or 'no features known'})",
        f"  {versions}",
        "",
        f"seconds of an epoch: {'median (least to most)':26}{'dense autograd':>24}{'touched rows':>24}{'compiled':>24}",
    ]
    for row in result["rows"]:
        for threads, seconds in ((1, row["seconds"]), (row["threads"], row["seconds_all_threads"])):
            head = f"  {row['neurons']:,} neurons, {row['samples']:,} samples, {threads} thread{'s' * (threads > 1)}"
            cells = (_cell(seconds.get(name)) for name in ("dense", "touched", "compiled"))
            told.append(f"{head:47}" + "".join(f"{cell:>24}" for cell in cells))
    if result["loading_seconds"] is None:
        hint = "the compiled epoch needs Numba: pip install 'ssd-edge[fast]'"
        ratios = (f"{row['neurons']:,} neurons {row['touched_ratio']:.1f}x" for row in result["rows"])
        return [*told, "", f"touched rows against dense autograd: {', '.join(ratios)}; {hint}"]
    told += [f"  (loading the compiled epoch, which is not counted, took {result['loading_seconds']:.1f} s)", ""]
    for row in result["rows"]:
        told += [
            f"{row['neurons']:,} neurons, the whole task of {row['epochs']} epochs against dense autograd: "
            f"{row['ratio']:.1f}x with one thread, {row['ratio_all_threads']:.1f}x with {row['threads']}",
            f"  an epoch of the second half takes {row['scores_ratio']:.2f} of what its scores alone would",
            f"  accuracy {row['accuracy']['dense']:.4f} and {row['accuracy']['compiled']:.4f}, "
            f"{100 * row['equal_predictions']:.2f} % of the answers equal",
        ]
    if result["curve"]:
        told += ["", f"{'neurons':>9}{'first epoch':>14}{'second half':>14}{'scores alone':>14}{'evaluated':>12}"]
        for row in result["curve"]:
            cells = "".join(f"{row[name]:>12.3f} s" for name in ("first_epoch", "second_half", "scores"))
            told.append(f"{row['neurons']:>9,}{cells}{row['evaluated']:>12,}")
    if result["memory_mib"]:
        held = result["memory_mib"]
        told += [
            "",
            f"memory: learning a task of 10,000 embeddings takes {held['on_top']:.1f} MiB on top of the model "
            f"({held['model']:.1f}) and its embeddings; scores of a batch are {held['batch_scores']:.1f}, of the task "
            f"{held['all_scores']:.0f}",
        ]
    return told


def _cell(seconds: dict[str, float] | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds['median']:.4f} ({seconds['least']:.4f}-{seconds['most']:.4f})"
