"""The ``align`` command and the command line of ``align/run.py``.

Only these modules parse arguments.
"""
