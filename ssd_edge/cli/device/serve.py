"""``ssd-edge device serve``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ssd_edge.cli.options import ROOT, STRICT, echo, log, root_or_default
from ssd_edge.errors import require


@click.command()
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; any but this one needs the token."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port; 0 for a free one.")
@click.option("--token-file", type=click.Path(path_type=Path), help="File of the token [default: token in the root].")
@click.option(
    "--allow-host", "allow_hosts", multiple=True, metavar="NAME", help="Another name that this device is called by."
)
@click.option("--tls-cert", type=click.Path(path_type=Path), help="Certificate chain (PEM), for HTTPS.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Private key (PEM) of the certificate.")
@click.option(
    "--camera",
    "cameras",
    multiple=True,
    metavar="[NAME=]SOURCE",
    help="Camera, URL, gst:PIPELINE, video or folder whose frames are answered; may be repeated.",
)
@click.option(
    "--every",
    type=click.FloatRange(min=0),
    default=0.1,
    show_default=True,
    metavar="SECONDS",
    help="Least time between two answers of a camera.",
)
@click.option("--mqtt", metavar="URL", help="MQTT broker: mqtt[s]://USER@HOST:PORT/PREFIX.")
@click.option(
    "--mqtt-password-file",
    type=click.Path(path_type=Path),
    help="File of its password [default: $SSD_EDGE_MQTT_PASSWORD].",
)
@click.option("--mqtt-ca", type=click.Path(path_type=Path), help="Certificate (PEM) of the broker's authority.")
@click.option("--mqtt-commands", is_flag=True, help="Let others on the broker teach and roll back.")
@STRICT
@ROOT
def serve(
    host: str,
    port: int,
    token_file: Path | None,
    allow_hosts: tuple[str, ...],
    tls_cert: Path | None,
    tls_key: Path | None,
    cameras: tuple[str, ...],
    every: float,
    mqtt: str | None,
    mqtt_password_file: Path | None,
    mqtt_ca: Path | None,
    mqtt_commands: bool,
    strict: bool,
    root: Path | None,
) -> None:
    """Serve the console, HTTP and the device's answers, with the device held warm.

    Prints its address once it answers. Only this machine can connect unless --host names another address, such as
    0.0.0.0; then everyone needs the token, which is created at the first start and shown once.

    \b
    ssd-edge device serve
    ssd-edge device serve --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem
    ssd-edge device serve --camera door=/dev/video0 --mqtt mqtt://user@broker

    Messages go to standard error, one JSON object per line. Ends with exit code 0 on SIGTERM and on Ctrl-C.
    """
    for package in ("starlette", "uvicorn", "python_multipart", "prometheus_client"):
        require(package, "serve", "serve a device")
    from device_runtime.serve.mqtt import Broker
    from device_runtime.serve.server import Options
    from device_runtime.serve.server import serve as run
    from device_runtime.service import logs

    broker = None
    if mqtt is not None:
        broker = Broker.parse(mqtt, mqtt_password_file, os.environ, mqtt_ca)
    elif mqtt_commands or mqtt_password_file or mqtt_ca:
        raise click.UsageError("--mqtt-password-file, --mqtt-ca and --mqtt-commands need --mqtt; name the broker")
    logs.log_json()
    options = Options(
        host, port, token_file, allow_hosts, tls_cert, tls_key, strict, cameras, every, broker, mqtt_commands
    )
    run(root_or_default(root), options, log, echo)
