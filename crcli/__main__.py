"""`python -m crcli` is `crcli`."""

import sys

from crcli.main import main

if __name__ == "__main__":
    sys.exit(main())
