"""The tests of fuzzing share modules with the coverage-guided run, which are imported from this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
