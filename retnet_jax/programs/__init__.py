"""The programs: flags, help, and messages a person can act on."""

import atexit
import gc

# Libraries make millions of objects at import that live until the end. Looking through them for
# garbage takes a tenth of the time in which a program starts, and half a second when it ends.
gc.set_threshold(50_000)
atexit.register(gc.freeze)
