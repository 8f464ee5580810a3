"""BUILD_METHOD=wheels: an environment resolved to a lock, wheels to layers, layers to an image; no code is run."""
