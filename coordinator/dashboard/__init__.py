"""The page in the browser: runs as their folders tell them, live, for reading only.

A server of its own reads what a run writes (``metrics.jsonl``, ``events.jsonl``, ``config.yaml``) and never talks to
the run, which neither waits for it nor knows of it.
"""
