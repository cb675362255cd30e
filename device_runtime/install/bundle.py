"""A bundle becomes the current generation of a root, when everything that can be checked before has been.

In this order: the bundle itself, the signature, the release, that its parts fit together, the free disk, and at last
the self-test on what will really run here (`selftest`). Until then the old generation stays current.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from device_runtime.backbone import selftest
from device_runtime.backbone.embedder import open_embedder
from device_runtime.install.trust import check_signature
from device_runtime.learning.state import DeviceState, InstalledBundle, restore_statistics
from device_runtime.learning.unknown import Rejector
from device_runtime.store.generations import Generations
from device_runtime.store.record import Generation
from ssd_edge import bundle as bundles
from ssd_edge import files, learners
from ssd_edge.errors import BundleRefusedError, GateRefusedError, InputError

# Decisions on the probe's images, whose patches are of no class: near-ties may fall otherwise, a wrong learner differs
# in most.
MIN_AGREEMENT = 0.75

Say = Callable[[str], None]


def install(
    root: str | Path,
    bundle: str | Path,
    *,
    allow_downgrade: bool = False,
    strict: bool = False,
    say: Say = lambda text: None,
) -> Generation:
    """Verify a bundle, test it on this machine, and make it the current generation of a root (created if need be).

    Args:
        root: the device's state.
        bundle: the file.
        strict: refuse it where something slower would run it than its target is prepared for.
        allow_downgrade: take a lower release than the highest that was installed here.
        say: told what happens: an engine is built, what runs the backbone, and how near it comes to the bundle's
            embeddings.

    Raises:
        InputError: no such bundle.
        BundleRefusedError: the bundle is damaged, not signed by a trusted key, or older than what was installed.
        GateRefusedError: its backbone or learner computes something else here than where it was packed.
        SlowerProviderError: under `strict`.
        EnvironmentUnfitError: a key is trusted, but `cryptography` is not installed; or the backbone cannot run here.
    """
    opened = bundles.read(Path(bundle))
    store = Generations(root)
    signed_by = check_signature(store.root, opened)
    installed = _installed_bundle(opened, signed_by)
    state = _initial_state(opened, installed)
    with store.writer():
        if not allow_downgrade:
            _check_release(store, installed.release, bundle)
        backbone = store.add_backbone(opened.read("backbone"))
        arrays, limits = opened.tensors("probe")
        spec = installed.backbone_spec(backbone)
        embedder = open_embedder(store, spec, (arrays, limits), say, strict)
        tested = selftest.run(embedder.embed, arrays, limits)
        agreement = _check_learner(state.learner, embedder.embed(arrays["images"]), arrays["rows"])
        say(
            f"self-test on {tested.images} images with {embedder.provider}: cosine {tested.min_cosine:.6f}, "
            f"largest difference {tested.max_difference:.1e} σ, {agreement:.0%} of the decisions agree"
        )
        info = {
            "bundle": Path(bundle).name,
            "bundle_sha256": opened.sha256,
            "classes": opened.registry.names,
            "release": installed.release,
            "signed_by": signed_by,
            "provider": embedder.provider,
            "self_test": {**tested.to_dict(), "agreement": agreement},
            **({"engine": embedder.engine.to_dict()} if embedder.engine else {}),
        }
        generation = store.commit(state.contents(), info, parent=None, backbone=backbone)
        store.tidy()
        return generation


def _installed_bundle(opened: bundles.Bundle, signed_by: str | None) -> InstalledBundle:
    """Return what the device keeps about a bundle, with a new installation id."""
    manifest = opened.manifest
    backbone = manifest["backbone"]
    return InstalledBundle(
        name=manifest["name"],
        release=manifest["release"],
        target=manifest["target"],
        size=backbone["size"],
        dim=backbone["dim"],
        precision=backbone["precision"],
        bundle_sha256=opened.sha256,
        signed_by=signed_by,
        installation=secrets.token_hex(8),
        merged=(),
        manifest={key: value for key, value in manifest.items() if key not in ("format", "version", "files", "device")},
    )


def _initial_state(opened: bundles.Bundle, installed: InstalledBundle) -> DeviceState:
    """What a bundle knows, with thresholds for what is none of its classes."""
    statistics = restore_statistics(opened.tensors("statistics")[0])
    state = DeviceState(
        opened.registry,
        learners.restore(*opened.tensors("learner")),
        statistics,
        Rejector.fit(statistics),
        installed,
        opened.read("probe"),
        opened.read("card"),
    )
    state.check()
    return state


def _check_release(store: Generations, release: int, name: str | Path) -> None:
    """Refuse a release below the highest that was installed: an old bundle's signature is as good as a new one's."""
    try:
        generations = store.list()
    except InputError:  # nothing is installed yet
        return
    known = [entry.info["release"] for entry in generations if entry.info and "release" in entry.info]
    # also those that were pruned
    events = [event.get("info") for event in store.journal() if event.get("event") == "install"]
    known += [info["release"] for info in events if isinstance(info, dict) and type(info.get("release")) is int]
    try:
        current = files.parse_json(store.current().read("device.json"), "device.json")
        known.append(current["release"])
    except BundleRefusedError:  # nothing intact to compare with: a new bundle is the way out
        pass
    if known and release < max(known):
        raise BundleRefusedError(
            f"{name} is release {release}, but release {max(known)} was installed here; to go back: "
            "--allow-downgrade, or ssd-edge device rollback"
        )


def _check_learner(learner: learners.Learner, embeddings: np.ndarray, rows: np.ndarray) -> float:
    """Share of the probe's images that the learner decides as it did where the bundle was packed."""
    if not len(learner.seen):  # deployed without classes: there is nothing to decide yet
        return 1.0
    scores = learner.scores(torch.from_numpy(embeddings))
    agreement = float((scores.argmax(1).numpy() == rows).mean())
    if not bool(torch.isfinite(scores).all()) or agreement < MIN_AGREEMENT:
        raise GateRefusedError(
            f"the learner decides {agreement:.0%} of the probe's images as it did where it was packed, but at least "
            f"{MIN_AGREEMENT:.0%} are needed; nothing was changed. Deploy the run again"
        )
    return round(agreement, 4)
