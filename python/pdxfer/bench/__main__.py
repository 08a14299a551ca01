"""`python -m pdxfer.bench`."""

import sys

from pdxfer.bench import main

sys.exit(main(sys.argv[1:]))
