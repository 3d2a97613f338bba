"""Saved detectors behind HTTP: FastAPI on Ray Serve.

Three modules import Ray: ``deployment.py``, ``launcher.py`` and ``ray_metrics.py``. The others run
under any ASGI server.
"""
