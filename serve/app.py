"""The application for Ray Serve.

    serve run serve.app:app models=runs/NAME/winners

docs/serving.md lists the arguments.
"""

from clsnf.serving.deployment import app

__all__ = ["app"]
