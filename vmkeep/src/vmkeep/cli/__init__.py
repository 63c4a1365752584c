"""The command line: it parses and prints. The work is done by the modules beside this package."""
