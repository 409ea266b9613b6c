"""A model as a tree of layers: what its code does with them, which are chosen, exchanged and counted."""
