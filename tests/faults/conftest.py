"""Where these tests find what they share with others: proxies and servers, the checker of histories, the tools."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
# Behind everything else: tools has a module with the name of one in tests.
sys.path += [str(TESTS), str(TESTS / "processes"), str(TESTS.parent / "tools")]
