"""``ssd-edge verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssd_edge import ort
from ssd_edge.cli.inspect import shown, signed_with
from ssd_edge.cli.options import ALLOW_CONTROL_FLOW, JSON, echo, print_json
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, GateRefusedError, require

if TYPE_CHECKING:
    from ssd_edge.bundle.format import Bundle


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--key",
    "keys",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Public key (FILE.pub) of an accepted signer; may be repeated.",
)
@ALLOW_CONTROL_FLOW
@JSON
def verify(bundle: Path, keys: tuple[Path, ...], allow_control_flow: bool, as_json: bool) -> None:
    """Check the format, signature, backbone and learner of BUNDLE.

    The backbone is run on the probe images in the bundle, in a process with limits on time and memory, and the learner
    on their embeddings.
    """
    from ssd_edge import bundle as bundles

    opened = bundles.read(bundle, allow_control_flow)
    signer = _signed_by(opened, keys)
    probe, reason = _probe(opened)
    learner, not_loaded = _learner(opened)
    manifest, named_key = opened.manifest, signed_with(opened)
    if as_json:
        print_json(
            {
                "bundle": str(bundle),
                "sha256": opened.sha256,
                "name": manifest["name"],
                "release": manifest["release"],
                "signature": named_key,
                "signed_by": signer,
                "probe": probe,
                "probe_not_run": reason,
                "learner": learner,
                "learner_not_loaded": not_loaded,
            }
        )
        return
    echo(f"intact     {shown(manifest['name'])}, release {manifest['release']}, sha256 {opened.sha256}")
    if signer:
        echo(f"signature  signed by {signer}")
    elif named_key:
        echo(f"signature  names the key {named_key}, not checked; pass that key with --key FILE.pub")
    else:
        echo("signature  unsigned")
    if probe:
        echo(
            f"probe      {probe['images']} images with {probe['provider']}: cosine {probe['min_cosine']:.6f}, largest "
            f"difference {probe['max_difference']:.1e} standard deviations"
        )
    else:
        echo(f"probe      not run: {reason}")
    if learner:
        answers = f", {learner['agreement']:.0%} of the probe answered as stated" if learner["classes"] else ""
        echo(f"learner    {learner['name']} with {learner['classes']} classes{answers}")
    else:
        echo(f"learner    not loaded: {not_loaded}")


def _signed_by(opened: Bundle, paths: tuple[Path, ...]) -> str | None:
    """Return the id of the key that signed a bundle, or None if no keys are given.

    Raises:
        BundleRefusedError: None of the keys signed the bundle.
    """
    if not paths:
        return None
    from ssd_edge.bundle import signing

    keys = [signing.load_public(path) for path in paths]
    return signing.check(opened, {signing.key_id(key): key for key in keys})


def _learner(opened: Bundle) -> tuple[dict[str, Any] | None, str | None]:
    """Load everything that installing a bundle loads; return facts about its learner, or why it was not loaded.

    Raises:
        BundleRefusedError: The state in the bundle is damaged, or the learner answers otherwise than the bundle says.
    """
    try:
        require("torch", "device", "load the learner")
    except EnvironmentUnfitError as error:
        return None, str(error)
    from device_runtime.install.bundle import check_answers
    from device_runtime.learning.state import DeviceState

    state, (probe, _) = DeviceState.of_bundle(opened), opened.tensors("probe")
    try:
        agreement = check_answers(state.scores, probe["embeddings"], probe["rows"])
    except GateRefusedError as error:
        raise BundleRefusedError(str(error)) from error
    return {"name": state.learner.name, "classes": len(opened.registry), "agreement": agreement}, None


def _probe(opened: Bundle) -> tuple[dict[str, Any] | None, str | None]:
    """Return the result of the self-test of a bundle's backbone, or the reason why it was not run.

    Raises:
        BundleRefusedError: The embeddings differ from those in the bundle, or the backbone takes too long or needs too
            much memory.
        EnvironmentUnfitError: ONNX Runtime is installed, but cannot run the backbone.
    """
    try:
        ort.load(purpose="run the probe")
    except EnvironmentUnfitError as error:
        return None, str(error)
    from device_runtime.backbone import selftest, trial
    from device_runtime.backbone.embedder import CPU

    try:
        result = selftest.run(trial.run(opened), *opened.tensors("probe"))
    except GateRefusedError as error:  # no installation here, so report the bundle as refused
        raise BundleRefusedError(str(error)) from error
    return {**result.to_dict(), "provider": CPU}, None
