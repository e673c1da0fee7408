"""The pipeline's stages, one file each, run as `python -m stages.NAME` from the project's root.

Importing any of them first turns off what phones home or only makes noise: these variables are read when the
libraries are imported, so they are set here, before any of them is.
"""

import logging
import os

for name, value in {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "BITSANDBYTES_NOWELCOME": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "DO_NOT_TRACK": "1",
}.items():
    os.environ.setdefault(name, value)

# It works without the faster kernels that it looks for at each load of a 4-bit model, and would say so each time.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
