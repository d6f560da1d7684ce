"""What one runs: the command, job configs, and the wiring of adapters and pipeline."""
