"""The pipeline's stages, one file each. `python -m stages NAME` runs one from the project's root, `dvc repro` all."""

import sys
from pathlib import Path

# The chat app runs alone in its own folder, so its package is not beside this one. An exported model is measured in the
# app's own decoder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "space"))
