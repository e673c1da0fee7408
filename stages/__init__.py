"""The pipeline's stages, one file each. `python -m stages NAME` runs one from the project's root, `dvc repro` all."""
