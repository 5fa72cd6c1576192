"""Reading a model graph: layers, channel regions, files. Nothing here edits a graph."""
