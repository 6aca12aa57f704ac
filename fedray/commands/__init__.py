"""Sub-commands of the command line; each module's `main(arguments)` returns an exit code."""
