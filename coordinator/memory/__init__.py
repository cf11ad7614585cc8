"""How much memory a job will need, from a model's configuration and the headers of its weights. Nothing is loaded."""

from coordinator.memory.advice import Advice, Measure, advise
from coordinator.memory.step import Estimate, EstimateOptions, estimate

__all__ = ["Advice", "Estimate", "EstimateOptions", "Measure", "advise", "estimate"]
