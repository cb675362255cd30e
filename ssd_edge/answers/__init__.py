"""Answering without PyTorch: scores as a graph, probabilities and ``unknown``, in NumPy."""
