"""Access to files: one mechanism for each need.

paths.py    files by path or URL
atomic.py   files and directories that appear complete or not at all
lock.py     a directory that one process works in
digests.py  XXH3 against damage, SHA-256 as a name
"""
