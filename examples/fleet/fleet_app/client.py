"""The ClientApp: answers with the sums of the devices that ``--node-config`` names."""

from exporters.fleet.flower import client_app

app = client_app()
