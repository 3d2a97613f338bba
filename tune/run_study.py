#!/usr/bin/env python
"""Tune, choose and save a detector for each product: the same as ``clsnf study``.

    python tune/run_study.py
    python tune/run_study.py --data DIR --backbone resnet18 --weights FILE --trials 8
    ray job submit --working-dir . -- python tune/run_study.py --data DIR --out DIR

``--help`` lists the options.
"""

import os
import sys
from pathlib import Path

# Run as a script, only tune/ is on the path: clsnf need not be installed, neither here nor for the
# workers that Ray starts from here.
ROOT = str(Path(__file__).resolve().parent.parent)
sys.path.insert(0, ROOT)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))

if __name__ == "__main__":
    from clsnf.cli import study

    study.main(prog_name="run_study.py")
