"""``python -m amp_plugin.train``: what recipes/train.py does, where there is no repository."""

import sys

from amp_plugin.train.job import run

run(sys.argv[1:])
