"""Run-time methods, which act during drawing and do not change the weights. Each is one file, found by its name."""
