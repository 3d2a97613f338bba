"""Reports of studies: one page that a person decides with, and its tables as files. Knows a study
through what it left in its folder.
"""
