"""What is claimed about speed, measured beside its rival in one run: `make bench`."""
