"""What `import hf_layercollapse` adds to `from transformers import AutoConfig, AutoModel, PreTrainedModel`.

    python tests/benchmarks/import_time.py [--repetitions 5] [--other FOLDER]

Each import runs in a fresh process; reported is the median of the processor time that the package adds, with the
smallest and the largest, and the median of its ratio to that of transformers' own import in the same process. With
`--other`, a checkout of another version, both are measured in turn, and their ratio is reported too.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path


HERE = Path(__file__).resolve().parents[2]
MEASURE = """
import sys, time
start = time.process_time()
from transformers import AutoConfig, AutoModel, PreTrainedModel
between = time.process_time()
import hf_layercollapse
print(between - start, time.process_time() - between)
assert hf_layercollapse.__file__.startswith(sys.argv[1]), hf_layercollapse.__file__
"""


def seconds(checkout):
    """Processor time of `(transformers, the package)`, in seconds."""
    path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", MEASURE, str(checkout)]
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=checkout)
    return tuple(map(float, result.stdout.splitlines()[-1].split()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--other", type=Path)
    args = parser.parse_args()
    checkouts = [HERE, *([args.other.resolve()] if args.other else [])]
    found = {checkout: [] for checkout in checkouts}
    for _ in range(args.repetitions):
        for checkout in checkouts:
            found[checkout].append(seconds(checkout))
    for checkout, times in found.items():
        added = [package for _, package in times]
        share = statistics.median(package / transformers for transformers, package in times)
        print(
            f"{checkout}: import hf_layercollapse adds {statistics.median(added):.3f} s of processor time "
            f"({min(added):.3f} to {max(added):.3f}, {len(times)} processes), {share:.3f} of what transformers takes; "
            "the promise is 0.3 s"
        )
    if args.other:
        ratios = [here / there for (_, here), (_, there) in zip(*found.values(), strict=True)]
        print(f"in turn, here / other: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
