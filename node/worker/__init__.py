"""The worker: one process that holds the model and runs the steps. The only place where MLX is imported."""
