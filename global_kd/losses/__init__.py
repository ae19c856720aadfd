"""One file a loss: the function first, the module as its shell."""
