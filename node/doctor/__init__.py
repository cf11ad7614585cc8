"""What is wrong with this machine: readings of its system, what its network answers, and verdicts on both."""
