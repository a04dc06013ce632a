"""Run the main job, `amp_plugin.train`, whose documentation ``--help`` shows."""

from __future__ import annotations

import os
import sys

# Waiting threads shall sleep, or on a busy machine they slow each other down sevenfold. torch reads this at its start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    from amp_plugin.train.job import run
except KeyboardInterrupt:  # the imports take seconds
    print("\ninterrupted", file=sys.stderr)
    sys.exit(130)

if __name__ == "__main__":
    run(sys.argv[1:])
