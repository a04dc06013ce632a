"""Scripts that make parts of the guides."""
