"""Faults at a named rank and step: every run ends with the curve of an undisturbed one."""
