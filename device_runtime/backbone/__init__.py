"""The backbone on the device: ONNX Runtime, TensorRT, and the self-test."""
