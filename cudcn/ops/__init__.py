"""One module per operator: the public pair of functions, its checks, and `OP`."""
