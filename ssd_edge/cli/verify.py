"""``ssd-edge verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssd_edge.cli.inspect import print_strangers_json, shown, signed_with
from ssd_edge.cli.options import JSON
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, GateRefusedError, require

if TYPE_CHECKING:
    from ssd_edge.bundle.format import Bundle


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--key", "keys", multiple=True, type=click.Path(path_type=Path), help="FILE.pub of who may have signed.")
@JSON
def verify(bundle: Path, keys: tuple[Path, ...], as_json: bool) -> None:
    """Whether BUNDLE is whole, whose signature it bears, and whether its backbone computes what it says."""
    from ssd_edge import bundle as bundles

    opened = bundles.read(bundle)
    signer = _signed_by(opened, keys)
    probe, reason = _probe(opened)
    manifest, stated = opened.manifest, signed_with(opened)
    if as_json:
        print_strangers_json(
            {
                "bundle": str(bundle),
                "sha256": opened.sha256,
                "name": manifest["name"],
                "release": manifest["release"],
                "signature": stated,
                "signed_by": signer,
                "probe": probe,
                "probe_not_run": reason,
            }
        )
        return
    click.echo(f"whole      {shown(manifest['name'])}, release {manifest['release']}, sha256 {opened.sha256}")
    if signer:
        click.echo(f"signature  signed by {signer}")
    elif stated:
        click.echo(f"signature  names the key {stated}, not checked: give that key with --key FILE.pub")
    else:
        click.echo("signature  unsigned: nobody vouches for it")
    if probe:
        click.echo(
            f"probe      {probe['images']} images with {probe['provider']}: cosine {probe['min_cosine']:.6f}, largest "
            f"difference {probe['max_difference']:.1e} standard deviations"
        )
    else:
        click.echo(f"probe      not run: {reason}")


def _signed_by(opened: Bundle, paths: tuple[Path, ...]) -> str | None:
    """The id of the one of these keys that signed it; None when there are none.

    Raises:
        BundleRefusedError: none of them signed it.
    """
    if not paths:
        return None
    from ssd_edge.bundle import signing

    keys = [signing.load_public(path) for path in paths]
    return signing.check(opened, {signing.key_id(key): key for key in keys})


def _probe(opened: Bundle) -> tuple[dict[str, Any] | None, str | None]:
    """What the backbone computes here, or why it could not be run.

    Raises:
        BundleRefusedError: it computes something else than the bundle says.
        EnvironmentUnfitError: ONNX Runtime is there, but cannot run it.
    """
    try:
        require("onnxruntime", "device", "run the probe")
    except EnvironmentUnfitError as error:
        return None, str(error)
    from device_runtime.backbone import selftest
    from device_runtime.backbone.embedder import OnnxRuntimeEmbedder

    described = opened.manifest["backbone"]
    embedder = OnnxRuntimeEmbedder(opened.read("backbone"), described["size"], described["dim"])
    try:
        found = selftest.run(embedder.embed, *opened.tensors("probe"))
    except GateRefusedError as error:  # here nothing is to be installed: it is the bundle that is wrong
        raise BundleRefusedError(str(error)) from error
    return {**found.to_dict(), "provider": embedder.provider}, None
