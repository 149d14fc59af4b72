"""Ways into other serving systems; each file knows one of them, and nothing else of the package knows any."""
