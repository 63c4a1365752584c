"""Our work beside what a user would run instead, on the same live VM, in turn: `make bench`."""
