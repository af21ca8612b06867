"""What every test process begins with."""

import os
import signal

from hypothesis import settings

# A shell's background jobs, `nohup` and some CI runners hand an ignored SIGINT down to every process.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests run beside each other: threads of torch's own that wait for work would take a third of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No example is held to the clock: other work may be beside it.
settings.register_profile("anywhere", deadline=None)
settings.load_profile("anywhere")
