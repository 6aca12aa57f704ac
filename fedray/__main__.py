"""python -m fedray."""

import os
import sys

# Python looks for modules in the current directory first, which may be anybody's: a numpy.py there would be run by any command.
# A user's own modules are looked for there when they are named.
if not sys.flags.safe_path and sys.path and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from fedray.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
