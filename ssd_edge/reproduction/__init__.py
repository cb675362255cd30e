"""Reproduction of the papers' experiments: `ssd-edge reproduce`.

``specs`` reads the experiments from YAML, ``cells`` names and stores results, ``sources`` prepares embeddings and
keys, ``work`` and ``traces`` run one cell, ``runner`` runs many, and ``rows``, ``page`` and ``drawings`` write
results.md and its figures from the stored results.
"""
