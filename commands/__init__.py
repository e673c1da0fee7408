"""What stands behind make targets and is no stage: `python -m commands NAME`."""
