"""Makes the tools beside the tests importable, and switches the interpreter on before any kernel is imported."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "tools"))

import gpu_device  # noqa: F401
