"""The paper's experiments, run and written up: `ssd-edge reproduce`.

``experiments`` reads what is to be run (YAML under ssd_edge/experiments), ``cells`` names and stores each result,
``sources`` makes embeddings and keys, ``work`` and ``traces`` run one cell, ``runner`` runs many, ``page`` and
``drawings`` write results.md and its figures from what is stored.
"""
