"""A training run: its folder, stream, embeddings, training loop, evaluation and metrics."""
