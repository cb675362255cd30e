"""Terminal output and HTML report of a run."""
