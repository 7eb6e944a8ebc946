"""`python -m lab.bench`: see `step`; with --all: see `everything`."""

import sys

from lab.bench import everything, step
from lab.run.cli import run_main


def main() -> None:
    (everything if "--all" in sys.argv[1:] else step).main()


if __name__ == "__main__":
    run_main("lab.bench", main, resumes=False)
