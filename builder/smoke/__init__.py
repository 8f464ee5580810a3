"""The smoke test: an image is run and asked before its tag moves."""
