"""The process that owns a generation's group: adds up the ranks' numbers, and can be killed when the group hangs."""

LOG_NAME = "reducer.log"
"""In a job's folder: what a reducer writes is none of the worker's last words."""
