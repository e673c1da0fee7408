"""List the stages that would run, and print the last summary. A wrong parameter is reported first, and alone.

Reads what DVC and the summary read; writes nothing. Run: `make status`
"""

import subprocess
import sys

from commands import summary
from stages.common.params import read_params


def main() -> None:
    read_params()
    result = subprocess.run([sys.executable, "-m", "dvc", "status"])
    if result.returncode:
        sys.exit(result.returncode)
    summary.main()
