"""One thin file per command: open files, show progress, pick exit codes."""
