"""Parts of the benchmarks: what is run, how often, what is checked first, and what is written down."""

from __future__ import annotations

import sys
from pathlib import Path

PEERS = Path(__file__).resolve().parent.parent / "peers"
RESULTS = PEERS.parent / "results"

# The peers' modules are scripts that import each other by bare name, in environments where nothing of ours is installed.
if str(PEERS) not in sys.path:
    sys.path.insert(0, str(PEERS))
