"""Several processes: meeting, watching and ending together."""
