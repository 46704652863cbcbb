"""Methods that change weights: `fit` learns a `Delta`, which is an eraser. One file each, found by its name."""
