"""The programs: flags, help, and messages a person can act on."""

import atexit
import gc

# What libraries make at import lives until the end. Looking through it for garbage takes a tenth of
# a program's start, and a quarter as long again when it ends.
gc.set_threshold(50_000)
atexit.register(gc.freeze)
