"""Runs as things of their own: which there are, which are at work, and how to reach them from another terminal."""
