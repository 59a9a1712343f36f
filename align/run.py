"""Run a recipe: ``accelerate launch align/run.py RECIPE [STAGE.KEY=VALUE ...]``.

Python puts the folder of a script first on the module search path. That is ``align/`` here, where
``import align`` would fail and subpackages could shadow installed packages. The checkout takes its
place before anything else is imported.
"""

import os
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of Ctrl-C while modules are loaded
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from align.cli.run import main

    main()
elif __name__ == "align.run":  # the module would hide the function `align.run`
    raise ImportError("align/run.py is a script; in Python, call the function `align.run`")
