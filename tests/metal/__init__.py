import sys
from pathlib import Path

# The tests read shaders as the build does.
sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
