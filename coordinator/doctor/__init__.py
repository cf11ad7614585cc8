"""What is wrong with a fleet: each machine's own diagnosis, and what only several machines together can tell."""
