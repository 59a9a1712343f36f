"""Run a recipe: ``accelerate launch align/run.py RECIPE [STAGE.KEY=VALUE ...]``.

When this file is started as a script, Python puts its folder first on the module search path, where the
package ``align`` is not found and its subpackages could shadow installed packages. The checkout is put
there instead, before anything else is imported.
"""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from align.cli.run import main

    main()
