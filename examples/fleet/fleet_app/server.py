"""The ServerApp: adds the answers and writes the bundle that ``--run-config`` names."""

from exporters.fleet.flower import server_app

app = server_app()
