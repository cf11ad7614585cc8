"""One Mac's part: the worker process, its supervisor, and what both sides of the wire share."""
