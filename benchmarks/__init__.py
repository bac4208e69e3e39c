"""Benchmarks, each file a script of its own and, for asv, a module of this package."""

import sys
from pathlib import Path

# Scripts find each other beside themselves; in the package they have to be told where that is.
_HERE = str(Path(__file__).parent)
if _HERE not in sys.path:
    sys.path.append(_HERE)
