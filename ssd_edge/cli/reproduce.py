"""``ssd-edge reproduce``."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from ssd_edge.cli.options import ENGINE, RAY_ADDRESS, check_engine, echo


@click.command()
@click.argument("what", nargs=-1, required=True, metavar="WHAT...")
@click.option(
    "--budget",
    type=click.Choice(["smoke", "reduced", "full"]),
    help="smoke: seconds; reduced: a shortened schedule; full: the published one, ten minutes to an hour per cell "
    "[default: full for the rows of the paper that allow it on a CPU, else reduced].",
)
@click.option(
    "--orders", type=click.IntRange(1, 5), help="Class orders per system [default: smoke 1, reduced 3, full 5]."
)
@click.option("--stream", "only", multiple=True, metavar="NAME", help="Run only this stream; may be repeated.")
@click.option("--system", "systems", multiple=True, metavar="NAME", help="Run only this row; may be repeated.")
@click.option(
    "--workers", type=click.IntRange(1, 256), help="Number of processes [default: one per core, or 1 with a GPU]."
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs"), show_default=True, metavar="DIR")
@click.option(
    "--tiny-backbone", type=click.Path(path_type=Path), metavar="DIR", help="Backbone package for Split Tiny-ImageNet."
)
@ENGINE
@RAY_ADDRESS
@click.option("--page-only", is_flag=True, help="Write the page from stored results without running anything.")
def reproduce(
    what: tuple[str, ...],
    budget: str | None,
    orders: int | None,
    only: tuple[str, ...],
    systems: tuple[str, ...],
    workers: int | None,
    out: Path,
    tiny_backbone: Path | None,
    engine: str,
    ray_address: str | None,
    page_only: bool,
) -> None:
    """Reproduce the experiments of the papers.

    Controls and baselines are run with them.

    \b
    ssd-edge reproduce list                      all experiments and their stored results
    ssd-edge reproduce T2 --budget smoke         a quick check
    ssd-edge reproduce T1 --stream cifar10       the main table on one stream, at the published schedule
    ssd-edge reproduce T2 --budget reduced       a shortened schedule, three class orders
    ssd-edge reproduce all                       everything, in days

    Data sets are searched in $SSD_EDGE_DATA. Each result is stored in DIR/results/reproduce and never computed twice:
    run an interrupted command again to continue it. DIR/results.md shows all results.
    """
    from ssd_edge.errors import InputError
    from ssd_edge.files import is_folder
    from ssd_edge.report.terminal import Console
    from ssd_edge.reproduction import cells, page, runner
    from ssd_edge.reproduction.specs import BUDGETS, chosen, experiments, on_streams, with_systems

    if what == ("list",):
        store = cells.Store(out / runner.RESULTS)
        for experiment in experiments().values():
            stored = [(name, *cells.counts(experiment, name, store)) for name in BUDGETS]
            told = ", ".join(f"{name} {some}/{every}" for name, some, every in stored)
            size = f"{len(experiment.systems)} systems × {len(experiment.streams)} streams"
            echo(f"{experiment.id:12} {experiment.title}: {size}; stored: {told}")
        return
    if "list" in what:
        raise InputError("list cannot be combined with other arguments: ssd-edge reproduce list")
    picked = with_systems(on_streams(chosen(what), only), systems)
    if tiny_backbone is not None and not is_folder(tiny_backbone):
        raise InputError(f"--tiny-backbone {tiny_backbone} is not a folder; create a package with: ssd-edge pretrain")
    check_engine(engine, ray_address)
    console = Console()
    request = runner.Request(picked, budget, orders, workers or 0, out, tiny_backbone)
    error = None
    try:
        if not page_only:
            with contextlib.ExitStack() as ends:
                on_cluster = None
                if engine == "ray":
                    from ssd_edge.run.cluster import cluster

                    on_cluster = ends.enter_context(cluster(ray_address or "", workers or 0))
                error = runner.run(request, console, on_cluster)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("finished results are stored; run the same command again to continue") from None
    page.write(out)
    console.print(f"page: {out / 'results.md'}")
    if error is not None:
        raise error
