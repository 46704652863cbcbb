"""Methods that learn a delta: one file each, found by name through `efface.registry`."""
