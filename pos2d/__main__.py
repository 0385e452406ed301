"""``python -m pos2d`` is the command line."""

import os
import sys

# Python puts the current directory first for -m: a file of the user's that has the name of a module is not to be run.
if not sys.flags.safe_path and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from pos2d.commands.main import main

if __name__ == "__main__":
    main()
