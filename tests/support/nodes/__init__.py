"""Other machines for tests: virtual ones, with kernels of their own."""
