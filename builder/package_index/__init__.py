"""Package indexes: pip's and uv's settings, in and out, and wheels found and downloaded."""
