"""Workstation side of a deployment: ONNX export, precision, parity, packing and push."""

from ssd_edge.system import disable_telemetry

disable_telemetry()
