"""What memory there is, and that what was held for a moment goes back to the system."""

import os
import subprocess
import sys

from hogwild import heap

SCRIPT = """
from pathlib import Path
from hogwild import heap

def private_mib():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024

pins = []
for _ in range(2):  # the first round raises the size from which blocks are mapped one by one; the second is on the heap
    blocks = []
    for _ in range(200):
        blocks.append(bytearray(b"x") * 2**20)
        pins.append(bytearray(b"x") * 1000)  # the heap cannot shrink below these
    del blocks
before = private_mib()
heap.trim()
print(before - private_mib())
"""


def test_trim() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    assert float(ran.stdout) > 150, "of 200 MiB"


def test_available(tmp_path, monkeypatch):
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(heap, "_LIMIT", tmp_path / "memory.max")
    assert 2**26 < heap.available() < whole
    (tmp_path / "memory.max").write_text("max\n")
    assert 2**26 < heap.available() < whole
    (tmp_path / "memory.max").write_text("1048576\n")
    assert heap.available() == 2**20, "a container's limit counts where it is less"
