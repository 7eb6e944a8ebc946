"""`python -m lab.report`: see `readme`."""

from lab.report.readme import main

if __name__ == "__main__":
    main()
