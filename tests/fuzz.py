"""``make fuzz``: the property tests with new examples, again and again, for FUZZ_SECONDS (an hour by default).

Ends at the first failure, with the example made small, what reproduces it, and the seed of the round. Arguments go to
pytest: ``python tests/fuzz.py -k emulated``.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path


def main(arguments, seconds):
    tests = sorted(str(path) for path in Path(__file__).parent.glob("test_properties*.py"))
    start, rounds = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        seed = random.SystemRandom().randrange(2**32)
        command = [sys.executable, "-m", "pytest", "-q", "-x", f"--hypothesis-seed={seed}", *tests, *arguments]
        status = subprocess.run(command, env=os.environ | {"NORMOPS_FUZZ": "1"}).returncode
        if status:
            print(f"Failed in round {rounds + 1}, --hypothesis-seed={seed}")
            return status
        rounds += 1
    print(f"{rounds} rounds in {time.monotonic() - start:.0f} s, nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], float(os.environ.get("FUZZ_SECONDS", 3600))))
