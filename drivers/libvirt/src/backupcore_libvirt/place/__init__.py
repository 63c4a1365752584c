"""Where the socket of a backup job lies, and who has to answer there."""
