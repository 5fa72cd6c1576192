"""Graph passes. Each file is one pass, a pure function from graph to graph."""
