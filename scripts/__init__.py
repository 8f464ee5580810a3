"""What the Makefile, the demo and the tests call: nothing here is part of the program."""
