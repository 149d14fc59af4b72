"""The pair in torch: the reference that every graph is tested against."""
