"""Workstation side of a deployment: ONNX export, parity, targets and packing."""
