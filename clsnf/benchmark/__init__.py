"""The benchmark: the five systems of the method side by side, over categories and seeds, with what
a figure can be trusted for.

``systems`` says what each system is made of and what there is to choose from; ``cell`` trains and
judges all of them for one category and one seed; ``tables`` sums cells up; ``benchmark`` runs and
resumes.
"""
