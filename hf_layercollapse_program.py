"""Where the program `layercollapse` starts. It stands beside the package, whose import takes that of torch and
transformers: versions are told without them."""

import platform
import sys
from importlib.metadata import version


def main() -> None:
    """Console entry point; see `hf_layercollapse/cli.py`, whose `--version` says the same of what it has imported."""
    if sys.argv[1:] == ["--version"]:
        told = [f"{name} {version(name)}" for name in ("hf_layercollapse", "transformers", "torch")]
        print(", ".join([*told, f"Python {platform.python_version()}"]))
        return
    from hf_layercollapse.cli import main as program

    program()


if __name__ == "__main__":
    main()
