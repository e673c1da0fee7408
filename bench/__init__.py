"""Benchmarks. Run each one as `python -m bench.NAME` in the project's folder."""

import sys
from pathlib import Path

# The chat app runs alone in its own folder, so its package is not beside this one.
sys.path.append(str(Path(__file__).resolve().parent.parent / "space"))
