"""Access to files.

paths.py    reading files by path or URL
atomic.py   writing files and directories that appear complete or not at all
lock.py     locking a directory for one process
digests.py  XXH3 to detect damage, SHA-256 to name contents
"""
