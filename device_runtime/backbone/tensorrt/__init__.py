"""TensorRT: API wrapper, engine cache, engine builder and embedder."""
