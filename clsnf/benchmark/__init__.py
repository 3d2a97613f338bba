"""The benchmark: the method's five systems side by side, over categories and seeds.

``systems`` says what each system is made of, and what its candidates are. ``request`` holds what a
user asks for, and the cells of it: one category and one seed each. ``cell`` trains the systems of
one cell, ``selection`` chooses a candidate of each on validation defects, and ``comparison``
computes metrics on the test images. ``run`` runs the cells and goes on where a run stopped;
``protocol`` and ``tables`` write what people read.
"""
