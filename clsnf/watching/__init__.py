"""Pictures that arrive in a folder or from a camera, judged one after the other (``clsnf watch``).

:func:`clsnf.watching.run.watch` is the whole of it. A source (:mod:`clsnf.watching.folder`,
:mod:`clsnf.watching.camera`) gives pictures, :mod:`clsnf.watching.judge` judges them,
:mod:`clsnf.watching.state` keeps every result on the disk until each output has it, and
:mod:`clsnf.watching.outputs` lists the outputs. What can't be judged is not ok.
"""
