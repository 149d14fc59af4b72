"""The command line: thin pages over the library, one file a command."""
