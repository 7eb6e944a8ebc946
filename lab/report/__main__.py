"""`python -m lab.report`: see `readme`."""

from lab.report.readme import main
from lab.run.cli import run_main

if __name__ == "__main__":
    run_main("lab.report", main, resumes=False)
