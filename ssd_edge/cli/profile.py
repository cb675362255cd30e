"""``ssd-edge profile``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ssd_edge.cli.options import ALLOW_CONTROL_FLOW, JSON, ROOT, echo, log, print_json
from ssd_edge.system import MIB


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--images", default=50, show_default=True, help="Number of timed calls.")
@click.option("--warm-up", default=10, show_default=True, help="Number of calls before timing starts.")
@click.option("--batch", default=1, show_default=True, help="Images per call.")
@ALLOW_CONTROL_FLOW
@ROOT
@JSON
def profile(
    bundle: Path,
    images: int,
    warm_up: int,
    batch: int,
    allow_control_flow: bool,
    root: Path | None,
    as_json: bool,
) -> None:
    """Measure speed, memory and sizes of BUNDLE.

    Measures latency, learning time and memory on this machine, without installing the bundle.
    """
    from device_runtime.machine.profile import profile as measure

    result = measure(
        bundle,
        images_timed=images,
        warm_up=warm_up,
        batch=batch,
        root=root,
        allow_control_flow=allow_control_flow,
        say=log,
    ).to_dict()
    if as_json:
        print_json(result)
    else:
        for line in lines(result):
            echo(line)


def lines(result: dict[str, Any]) -> list[str]:
    """Format the result of `device_runtime.machine.profile.profile` for people."""
    about, machine, sizes, memory = (result[key] for key in ("bundle", "machine", "bytes", "memory_mb"))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    threads = result["threads"]
    plural = "s" if result["batch"] > 1 else ""
    told = [
        f"{about['name']}: {about['learner']}, {about['classes']} classes, {about['precision']} for "
        f"{about['target']}; {about['size']} × {about['size']} pixels to {about['dim']} features",
        f"measured on {machine['title']}, with {result['provider']}",
        f"  {versions}; threads: backbone {threads['backbone']}, learner {threads['learner']}",
        *([_engine(result["engine"])] if result["engine"] else []),
        "",
        f"{'milliseconds':44}{'p50':>9}{'p90':>9}{'p99':>9}",
    ]
    named = {
        "decode": f"decode a 640 × 480 JPEG, resize to {about['size']}",
        "backbone": f"backbone, {result['batch']} image{plural} per call",
        "head": "learner's scores, 1 embedding",
    }
    for key, name in named.items():
        taken = result["latency_ms"][key]
        told.append(f"  {name:42}" + "".join(f"{taken[p]:9.3f}" for p in ("p50", "p90", "p99")))
    learn = result["learn"]
    told += [
        f"  ({result['calls']} calls after {result['warm_up']} to warm up; nearest rank)",
        "",
        f"learning a class of {learn['images']} embeddings: {_seconds(learn['median'])} "
        f"(median of {len(learn['seconds'])}, on copies; a device does it twice, once to measure)",
        f"sizes: bundle {_mib(sizes['bundle'])}, backbone {_mib(sizes['backbone'])}, "
        f"learner {_mib(sizes['learner'])} in the file, {_mib(sizes['learner_state'])} in use",
        f"memory: at most {memory['peak']:.0f} MiB resident in a process of its own: {memory['imports']:.0f} with "
        f"libraries loaded, {memory['loaded']:.0f} with the bundle,",
        f"  {memory['predicted']:.0f} after predicting, {memory['learned']:.0f} after learning a class of "
        f"{learn['images']} images (estimated without running: {result['estimate_mb']['total']:.0f})",
        "",
        f"{'target':20}{'limit MiB':>10}",
    ]
    for row in result["fits"]:
        verdict = ("fits" if row["fits"] else "does not fit") + (" *" if row["note"] else "")
        told.append(f"  {row['target']:18}{row['limit_mb']:>10,}  {verdict}")
    told += [f"  * {note}" for note in dict.fromkeys(row["note"] for row in result["fits"] if row["note"])]
    if not machine["jetson"]:
        told += ["", "This machine is not a Jetson: for the latency and memory of a board, run this command there."]
    return told


def _engine(record: dict[str, Any]) -> str:
    layers = ", ".join(f"{key} {value}" for key, value in record["layers"].items())
    return f"  engine: {_mib(record['bytes'])}, built in {_seconds(record['seconds'])}; layers: {layers}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def _mib(size: int) -> str:
    return f"{size / MIB:.2f} MiB"
