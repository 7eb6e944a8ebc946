"""`python -m lab.bench`: see `step`."""

from lab.bench.step import main
from lab.run.cli import run_main

if __name__ == "__main__":
    run_main("lab.bench", main, resumes=False)
