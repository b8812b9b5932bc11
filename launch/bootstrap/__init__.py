"""The set-up, with the standard library alone: it runs before anything is installed.

    python3 -m launch.bootstrap

makes .venv with everything in it; only Horovod is compiled, once, into a wheel that is kept in a
cache and shared by all checkouts. Nothing here runs when it is imported.
"""
