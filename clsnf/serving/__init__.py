"""Winners behind HTTP: FastAPI on Ray Serve. All but ``deployment.py`` and ``local.py`` runs
without Ray.
"""
