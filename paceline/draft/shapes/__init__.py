"""Tree shapes of draft models: which nodes get children, and how many. One file per shape."""
