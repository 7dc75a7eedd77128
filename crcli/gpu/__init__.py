"""GPU memory: the only package that knows CUDA. See `hand` for how its calls are made, and by whom."""
