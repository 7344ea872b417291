"""The command line: one module per verb, each only parses and prints."""
