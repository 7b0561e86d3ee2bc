"""`python -m fope_export` is the program."""

import sys

from fope_export.cli import main

if __name__ == "__main__":
    sys.exit(main())
