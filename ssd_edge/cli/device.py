"""``ssd-edge device …``: the verbs of a device."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import click

from ssd_edge.cli.options import (
    JSON,
    MAX_FORGETTING,
    ROOT,
    STRICT,
    listed,
    open_device,
    print_json,
    progress_line,
    raw_stdin,
    tell_cost,
    warn,
)
from ssd_edge.errors import BundleRefusedError, InputError, printable


@click.group()
def device() -> None:
    """Install a bundle, predict, learn new classes, undo."""
    # PyTorch reads it when it is loaded: its threads else spin while they wait for each other, and a learn beside other
    # work takes several times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _root(root: Path | None) -> Path:
    from device_runtime.machine.board import default_root

    return default_root() if root is None else root


@device.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--allow-downgrade", is_flag=True, help="Take a lower release than the highest that was installed.")
@STRICT
@ROOT
@JSON
def install(bundle: Path, allow_downgrade: bool, strict: bool, root: Path | None, as_json: bool) -> None:
    """Verify BUNDLE, test it on this machine, and make it the current generation."""
    from device_runtime.install.bundle import install as put

    root = _root(root)
    generation = put(
        root, bundle, allow_downgrade=allow_downgrade, strict=strict, say=lambda text: click.echo(text, err=True)
    )
    names = generation.registry.names
    if as_json:
        print_json({"generation": generation.number, "classes": names, "root": str(root), **generation.info})
    else:
        click.echo(f"generation {generation.number} in {root}: {listed(names)}")


@device.command()
@click.argument("key", required=False, type=click.Path(path_type=Path), metavar="[FILE.pub]")
@click.option("--remove", metavar="ID", help="No longer trust the key with this id.")
@ROOT
@JSON
def trust(key: Path | None, remove: str | None, root: Path | None, as_json: bool) -> None:
    """From now on install only what a trusted key has signed; without FILE.pub, list the trusted keys."""
    from device_runtime.install import trust as keyring

    root = _root(root)
    if key is not None and remove is not None:
        raise click.UsageError("give a key to trust, or --remove an id, not both")
    if key is not None:
        keyring.trust(root, key)
    if remove is not None:
        keyring.distrust(root, remove)
    known = keyring.trusted(root)
    if as_json:
        print_json({"trusted": known, "root": str(root)})
    elif known:
        click.echo(f"{root} takes only bundles signed by: {', '.join(known)}")
    else:
        click.echo(f"no key is trusted in {root}: any valid bundle is installed, signed or not")


@device.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE...")
@click.option("--always-answer", is_flag=True, help="Name the nearest class of every image, never 'unknown'.")
@STRICT
@ROOT
@JSON
def predict(sources: tuple[Path, ...], always_answer: bool, strict: bool, root: Path | None, as_json: bool) -> None:
    """Name the class of each IMAGE (files, or folders of them), or 'unknown'."""
    from ssd_edge.images import image_files

    paths = image_files(sources)
    opened = open_device(root, strict)
    started = time.monotonic()
    predictions = opened.predict(paths, reject=not always_answer)
    seconds = time.monotonic() - started
    if as_json:
        rows = [dataclasses.asdict(p) for p in predictions]
        print_json({"generation": opened.generation.number, "predictions": rows, "seconds": seconds})
        return
    for p in predictions:
        nearest = "" if p.label == p.nearest else f" (nearest: {p.nearest})"
        click.echo(f"{p.score:6.3f}  {p.label}{nearest}  {printable(p.image)}")


@device.command()
@click.option("--label", help="Name of the class, new or known [default: each folder in a FOLDER is a class].")
@click.argument(
    "sources", nargs=-1, required=True, type=click.Path(path_type=Path, allow_dash=True), metavar="FOLDER..."
)
@click.option("--frames", type=click.IntRange(1), default=20, show_default=True, help="Frames to take of a stream (-).")
@click.option("--every", type=click.FloatRange(0), default=0.2, show_default=True, help="Seconds between two of them.")
@MAX_FORGETTING
@click.option("--budget-seconds", type=float, help="Time for it; learning by gradients then stops early.")
@click.option("--budget-mb", type=float, help="Memory for it (MiB of the whole process); over it, it is refused.")
@STRICT
@ROOT
@JSON
def learn(
    label: str | None,
    sources: tuple[Path, ...],
    frames: int,
    every: float,
    max_forgetting: float,
    budget_seconds: float | None,
    budget_mb: float | None,
    strict: bool,
    root: Path | None,
    as_json: bool,
) -> None:
    """Teach classes from FOLDERs of images (or single files); no old image is needed.

    \b
    ssd-edge device learn --label gear photos/       one class, from all images in photos/
    ssd-edge device learn photos/                    a class a folder: photos/gear/, photos/nut/, …
    ffmpeg -i CAMERA -f mjpeg - | ssd-edge device learn --label gear -    frames of a stream of JPEGs
    """
    from device_runtime.learning.budget import Budget
    from device_runtime.learning.guard import Limits
    from ssd_edge.classes import normalise_name
    from ssd_edge.images import image_files

    budget = Budget(budget_seconds, budget_mb)

    opened = open_device(root, strict)
    images: dict[str, Any]
    if "-" in map(str, sources):
        if label is None or len(sources) > 1:
            raise click.UsageError("a stream (-) shows one class and is the only source; name the class: --label NAME")
        from device_runtime.service.frames import take

        images = {normalise_name(label): take(raw_stdin(), frames, every, opened.facts["size"])}
    elif label is not None:
        images = {normalise_name(label): image_files(sources)}
    else:
        images = {name: image_files(folders) for name, folders in _class_folders(sources).items()}
    with progress_line() as watcher:
        result = opened.learn_all(images, Limits(max_forgetting), budget, watcher)
    warn(result)
    if as_json:
        print_json(result)
        return
    memory = "" if result["peak_mb"] is None else f", {result['peak_mb']} MiB of memory at most"
    took = f"{result['seconds']:.1f} s{memory}"
    click.echo(f"generation {result['generation']}: learned {result['images']} images in {took}")
    for taught in result["taught"]:
        held = taught["held_out"]
        found = "" if held["accuracy"] is None else f"; {held['accuracy']:.3f} of {held['images']} held out recognised"
        kind = "new" if taught["new"] else "known before"
        click.echo(f"  {taught['label']}: {taught['images']} images, {kind}{found}")
    tell_cost(result, "old classes")


def _class_folders(sources: tuple[Path, ...]) -> dict[str, list[Path]]:
    """Class name → folders of that name, below any of the sources."""
    from ssd_edge.classes import normalise_name

    found: dict[str, list[Path]] = {}
    for source in sources:
        folders = sorted(path for path in source.iterdir() if path.is_dir()) if source.is_dir() else []
        if not folders:
            raise InputError(f"{source} has no folders, of which each would be a class; name the class: --label NAME")
        for folder in folders:
            found.setdefault(normalise_name(folder.name), []).append(folder)
    return found


@device.command()
@click.argument("generation", required=False, type=int)
@ROOT
@JSON
def rollback(generation: int | None, root: Path | None, as_json: bool) -> None:
    """Return to the generation before the last learn, or to GENERATION."""
    result = open_device(root).rollback(generation)
    if as_json:
        print_json(result)
    else:
        names = result["classes"]
        was = f"generation {result['generation']} (was {result['from']})"
        click.echo(f"{was}: {listed(names)}")


@device.command()
@ROOT
@JSON
def status(root: Path | None, as_json: bool) -> None:
    """What this device is and knows."""
    result = open_device(root).status()
    if as_json:
        print_json(result)
        return
    result["images"] = [f"{name} ({count})" for name, count in result["images"].items()]
    result |= {"machine": _machine(result["machine"]), "watched": _watched(result["watched"])}
    for key, value in result.items():
        if value not in ("", None, []):
            click.echo(f"{key:13} {', '.join(value) if isinstance(value, list) else value}")


def _machine(vitals: dict[str, Any]) -> list[str]:
    """How the machine is, in a few words; what it does not tell is left out."""
    told = [f"{vitals['available_mb']:,} MiB of memory free"]
    if vitals["disk_free_mb"] is not None:
        told.append(f"{vitals['disk_free_mb']:,} MiB of disk free")
    if vitals["hottest"] is not None:
        told.append(f"{vitals['hottest']:.0f} °C at most")
    return told + [f"power mode {vitals['power_mode']}"] * bool(vitals["power_mode"])


def _watched(seen: dict[str, Any] | None) -> list[str]:
    """What `device watch` last noted, in a few words."""
    if seen is None:
        return ["nothing yet: ssd-edge device watch"]
    index = "" if seen["psi"] is None else f" (PSI {seen['psi']:.3f})"
    rejected = "" if seen["reject_rate"] is None else f", {seen['reject_rate']:.1%} of them unknown"
    age = "before this boot" if seen["age"] is None else f"{seen['age']:.0f} s ago"
    return [f"drift {seen['level']}{index}", f"{seen['images']} images of late{rejected}", f"noted {age}"]


@device.command()
@ROOT
@JSON
def history(root: Path | None, as_json: bool) -> None:
    """Every generation and what made it."""
    result = open_device(root).history()
    if as_json:
        print_json(result)
        return
    for entry in result["generations"]:
        mark = "*" if entry["current"] else " "
        note = "" if entry["intact"] else f"  DAMAGED: {entry['problem']}"
        click.echo(f"{mark} {entry['number']:3}  {entry['created_utc']}  {entry['what']}{note}")


@device.command()
@click.option("--repair", is_flag=True, help="Remove leftovers, complete the journal, point to an intact generation.")
@ROOT
@JSON
def fsck(repair: bool, root: Path | None, as_json: bool) -> None:
    """Look for damage in the device's state; no intact generation is ever deleted. Exit code 5 if some is left."""
    from device_runtime.store.generations import Generations

    root = _root(root)
    found = Generations(root).fsck(repair)
    left = [finding for finding in found if finding.severity == "damage" and not finding.repaired]
    if as_json:
        print_json({"root": str(root), "findings": [{**dataclasses.asdict(f), "path": str(f.path)} for f in found]})
    for finding in [] if as_json else found:
        mark = "repaired" if finding.repaired else finding.severity
        click.echo(f"{mark:9} {finding.path}: {finding.problem}")
    if left:
        raise BundleRefusedError(f"{len(left)} damaged parts in {root}; the device uses the newest intact generation")
    if not as_json:
        click.echo(f"{root} is sound")
