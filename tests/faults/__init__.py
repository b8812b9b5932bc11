"""Faults on real runs, with the helpers of the tests that start ranks."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "parallel"))
