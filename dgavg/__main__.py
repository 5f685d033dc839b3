"""`python -m dgavg` is `dgavg`."""

import sys

from dgavg.cli import main

sys.exit(main())
