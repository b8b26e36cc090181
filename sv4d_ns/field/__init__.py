"""What is fitted and how it is rendered, in plain torch and numba."""
