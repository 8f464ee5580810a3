"""Many versions: each in a child process of its own, so that none can harm the others."""
