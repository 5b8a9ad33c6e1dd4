"""Thousands of requests made up from the server's own OpenAPI document (schemathesis): none may end in a 5xx, nor in an
answer that the document does not describe. `--url` names a server that runs; without, a small random one is started.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from conforming import conform
from serving import serving


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    began = time.perf_counter()
    if options.url:
        found, leaked = conform(options.url, options.requests, options.seed), False
    else:
        with serving() as server:
            found = conform(server.url, options.requests, options.seed)
            leaked = not server.settles()
    for (route, status), count in sorted(found.answers.items()):
        print(f"{route:<28} {status} {count:>6}")
    for failure in found.failures[:20]:
        print(f"\n{failure}")
    seconds = time.perf_counter() - began
    worst = max(status for _, status in found.answers)
    print(f"\n{found.requests} requests in {seconds:.0f} s: {len(found.failures)} failures, worst status {worst}")
    if leaked:
        print("blocks were lost")
    if options.json:
        answers = {f"{route} {status}": count for (route, status), count in sorted(found.answers.items())}
        options.json.write_text(json.dumps({"answers": answers, "failures": found.failures, "seconds": seconds}))
    return 1 if found.failures or leaked or worst >= 500 else 0


if __name__ == "__main__":
    sys.exit(main())
