"""The command line: thin. It parses, calls the library and prints; one file per group of commands."""
