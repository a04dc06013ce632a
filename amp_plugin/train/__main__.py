"""Run the main job where there is no recipes/train.py: ``python -m amp_plugin.train``."""

import sys

from amp_plugin.train.job import run

run(sys.argv[1:])
