"""The demo: a small model is made, taught, tested, fused, exported and asked, on this machine and without a network."""
