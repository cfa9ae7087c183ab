"""What `import hf_layercollapse` adds to `from transformers import AutoConfig, PreTrainedModel`.

    python tests/benchmarks/import_time.py [--pairs 10]

Each import runs in a fresh process, with and without the package in turn; reported is the median of the processor
time that the package adds, with the smallest and the largest of the pairs.
"""

import argparse
import statistics
import subprocess
import sys


BASE = "from transformers import AutoConfig, PreTrainedModel"
MEASURE = """
import time
{base}
start = time.process_time()
{added}
print(time.process_time() - start)
"""


def seconds(added):
    code = MEASURE.format(base=BASE, added=added)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(result.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    args = parser.parse_args()
    added = [seconds("import hf_layercollapse") - seconds("pass") for _ in range(args.pairs)]
    print(
        f"import hf_layercollapse adds {statistics.median(added):.3f} s of processor time "
        f"({min(added):.3f} to {max(added):.3f}, {args.pairs} pairs); the promise is 0.3 s"
    )


if __name__ == "__main__":
    main()
