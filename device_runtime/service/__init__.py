"""The camera service: frames, predictions, drift, systemd."""
