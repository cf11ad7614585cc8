"""What can be exported and where to: known without MLX, so that mistakes are found before training."""
