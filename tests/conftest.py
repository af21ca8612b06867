"""What every test process begins with."""

import signal

# A shell's background jobs, `nohup` and some CI runners hand an ignored SIGINT down to every process.
signal.signal(signal.SIGINT, signal.default_int_handler)
