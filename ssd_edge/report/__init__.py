"""How a run is shown: on the terminal and as an HTML report."""
