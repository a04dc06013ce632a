"""Where things are in the checkout that the tests belong to."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"  # scripts that tests start in processes of their own, among others
RECORDS = ROOT / "tests" / "records"  # tables that tests write
