"""The app's door for Ray Serve.

    serve run serve.app:app models=runs/NAME/winners

Arguments are listed by ``clsnf serve --help`` and in docs/serving.md.
"""

from clsnf.serving.deployment import app

__all__ = ["app"]
