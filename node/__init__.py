"""One machine of a fleet: daemon, worker and reducer, and what coordinators share with them."""

import os

# Before anything imports the library: it writes to stderr what we say ourselves, and need not be told of the worker
# processes that are started.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
