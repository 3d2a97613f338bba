#!/usr/bin/env python
"""Write a study's report, or compare studies: the same as ``clsnf report``.

    python reports/build.py runs/NAME
    python reports/build.py --compare runs/LAST runs/NAME

``--help`` lists the options. A report of the demo lies in ``reports/sample``.
"""

import sys
from pathlib import Path

# Run as a script, only reports/ is on the path: clsnf need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from clsnf.cli import report

    report.main(prog_name="build.py")
