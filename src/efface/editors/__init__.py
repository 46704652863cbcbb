"""Methods that learn a delta. Each is one file, which `efface.registry` finds by its name."""
