"""Workstation side of a deployment: ONNX export, precision, parity, packing and push."""
