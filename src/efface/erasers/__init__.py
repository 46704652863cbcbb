"""Methods that act while a picture is made and leave the weights alone: one file each, found by its name."""
