"""Installation of a bundle as the current generation of a root.

The checks are, in this order: the bundle, its signature, the consistency of its parts, a first run of its backbone in a
process with limits, its release, the free disk space, and the self-test on this machine. Until all of them pass, the
old generation stays current. Other processes can change the device until the first run is over.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from device_runtime.backbone import selftest, trial
from device_runtime.backbone.embedder import open_embedder
from device_runtime.install.answering import Answering
from device_runtime.install.installed import InstalledBundle
from device_runtime.install.trust import check_signature
from device_runtime.store.generations import Generations
from device_runtime.store.record import Generation
from ssd_edge import bundle as bundles
from ssd_edge import files
from ssd_edge.answers.head import NAME as HEAD
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, GateRefusedError, InputError, printable

# The probe images belong to no class, so near-ties may be decided differently. A wrong learner disagrees on most of
# them.
MIN_AGREEMENT = 0.75
_NEEDED = ("answers", "unknown", "record")  # roles that PyTorch derives if a bundle lacks them

Say = Callable[[str], None]


def install(
    root: str | Path,
    bundle: str | Path,
    *,
    allow_downgrade: bool = False,
    allow_control_flow: bool = False,
    strict: bool = False,
    say: Say | None = None,
) -> Generation:
    """Verify a bundle, test it on this machine and make it the current generation of a root.

    Args:
        root: Root of the device's state, created if it does not exist.
        bundle: File of the bundle.
        allow_downgrade: Accept a release that is lower than the highest installed one.
        allow_control_flow: Accept a backbone with loops and branches, which may never end.
        strict: Refuse a runtime that is slower than the one its target expects.
        say: Called with messages for the user (the build of an engine, the runtime, the result of the self-test); None
            if nobody reads them.

    Raises:
        InputError: The bundle does not exist.
        BundleRefusedError: The bundle is damaged, not signed by a trusted key, or an older release; or its backbone
            takes too long or needs too much memory.
        GateRefusedError: The backbone or learner gives other results on this machine than in the bundle.
        SlowerProviderError: The runtime is slower than the target's and `strict` is set.
        EnvironmentUnfitError: The backbone cannot run on this machine, a key is trusted but `cryptography` is not
            installed, or the bundle needs PyTorch, which is not.
    """
    opened = bundles.read(Path(bundle), allow_control_flow)
    store = Generations(root)
    signed_by = check_signature(store.root, opened)
    parts = _parts(opened, signed_by)
    installed = parts.answering.bundle
    trial.check(opened)
    with store.writer():
        if not allow_downgrade:
            _check_release(store, installed.release, bundle)
        backbone = store.add_backbone(opened.read("backbone"))
        arrays, limits = opened.tensors("probe")
        spec = installed.backbone_spec(backbone)
        embedder = open_embedder(store, spec, (arrays, limits), say, strict)
        tested = selftest.run(embedder.embed, arrays, limits)
        agreement = check_answers(parts.score, embedder.embed(arrays["images"]), arrays["rows"])
        if say is not None:
            say(
                f"self-test on {tested.images} images with {embedder.provider}: cosine {tested.min_cosine:.6f}, "
                f"largest difference {tested.max_difference:.1e} σ, {agreement:.0%} of the decisions agree"
            )
        info = {
            "bundle": printable(Path(bundle).name),  # a file name may be any bytes, but the record is UTF-8
            "bundle_sha256": opened.sha256,
            "classes": opened.registry.names,
            "release": installed.release,
            "signed_by": signed_by,
            "provider": embedder.provider,
            "self_test": {**tested.to_dict(), "agreement": agreement},
            **({"engine": embedder.engine.to_dict()} if embedder.engine else {}),
        }
        generation = store.commit(parts.contents, info, parent=None, backbone=backbone)
        store.tidy()
        return generation


def _check_release(store: Generations, release: int, name: str | Path) -> None:
    """Refuse a release below the highest installed one, because signatures of old bundles stay valid."""
    try:
        generations = store.list()
    except InputError:  # no installation yet
        return
    known = [entry.info["release"] for entry in generations if entry.info and "release" in entry.info]
    # including pruned generations
    events = [event.get("info") for event in store.journal() if event.get("event") == "install"]
    known += [info["release"] for info in events if isinstance(info, dict) and type(info.get("release")) is int]
    try:
        current = files.parse_json(store.current().read("device.json"), "device.json")
        known.append(current["release"])
    except BundleRefusedError:  # no intact generation: a new bundle repairs the device
        pass
    if known and release < max(known):
        raise BundleRefusedError(
            f"{name} is release {release}, but release {max(known)} was installed on this device; to go back, use "
            "--allow-downgrade or ssd-edge device rollback"
        )


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Generation that a bundle becomes.

    Attributes:
        contents: File name → bytes of the generation.
        answering: What they answer with.
        score: Returns scores ``(N, C)`` of embeddings ``(N, D)``.
    """

    contents: Mapping[str, bytes]
    answering: Answering
    score: Callable[[np.ndarray], np.ndarray]


def _parts(opened: bundles.Bundle, signed_by: str | None) -> _Parts:
    """Return what a bundle becomes; raises as `install`.

    With PyTorch everything follows from its learner, which is checked. Without, its head answers, and its learner is
    checked when it is first taught.
    """
    if importlib.util.find_spec("torch") is not None:
        from device_runtime.learning.state import DeviceState

        state = DeviceState.of_bundle(opened, signed_by)
        contents = state.contents()
        return _Parts(contents, Answering.read(contents.__getitem__), state.scores)
    missing = [path for role, path in bundles.ROLES.items() if role in _NEEDED and role not in opened.roles]
    if missing:
        raise EnvironmentUnfitError(
            f"the package 'torch' is needed to install a bundle without {' and '.join(missing)}; deploy it again, or "
            "install PyTorch: pip install 'ssd-edge[device]', on a Jetson use that of JetPack"
        )
    contents = {path: opened.read(role) for role, path in bundles.ROLES.items() if role in opened.roles}
    for left in ("backbone", "head"):
        contents.pop(bundles.ROLES[left], None)
    contents["device.json"] = files.json_bytes(InstalledBundle.of(opened, signed_by).to_json())
    answering = Answering.read(contents.__getitem__)
    if answering.head.without:
        raise EnvironmentUnfitError(
            f"the package 'torch' is needed to answer with this bundle ({answering.head.without}); install it with: "
            "pip install 'ssd-edge[device]', on a Jetson use that of JetPack"
        )
    if answering.head.learner != opened.manifest["learner"]["name"]:
        raise BundleRefusedError(
            f"the bundle's head is of the learner '{printable(answering.head.learner)[:40]}', but its manifest says "
            f"'{printable(opened.manifest['learner']['name'])[:40]}'; deploy it again"
        )
    if answering.head.classes:
        trial.check_head(contents[HEAD], opened.tensors("probe")[0]["embeddings"])
    return _Parts(contents, answering, answering.head.score)


def check_answers(score: Callable[[np.ndarray], np.ndarray], embeddings: np.ndarray, rows: np.ndarray) -> float:
    """Return the share of the probe images for which the learner's decision agrees with the bundle.

    Args:
        score: Returns scores ``(N, C)`` of embeddings ``(N, D)``; C is 0 for a bundle without classes.
        embeddings: Embeddings of the probe images, ``(P, D)``.
        rows: What the bundle says that it decides, ``(P,)``.

    Raises:
        GateRefusedError: They agree on too few, or a score is not finite.
    """
    scores = score(embeddings)
    if not scores.shape[1]:  # deployed without classes, so there are no decisions
        return 1.0
    agreement = float((scores.argmax(1) == rows).mean())
    if not np.isfinite(scores).all() or agreement < MIN_AGREEMENT:
        raise GateRefusedError(
            f"the learner's decisions agree with the bundle on {agreement:.0%} of the probe images, but at least "
            f"{MIN_AGREEMENT:.0%} are required; nothing was changed. Deploy the run again"
        )
    return round(agreement, 4)
