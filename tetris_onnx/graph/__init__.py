"""Reading a model graph: files, shapes, constants, layers, channel regions. Nothing here edits a graph."""
