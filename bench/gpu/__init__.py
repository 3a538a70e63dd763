"""GPU kernels: a model of their time, launches of a whole step, and what is timed where there is a GPU."""
