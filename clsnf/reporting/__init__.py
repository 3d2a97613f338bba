"""Reports of studies: one HTML page to decide with, and its tables as files.

A report reads the files of a study (:mod:`clsnf.results`). It needs neither the images nor torch.
"""
