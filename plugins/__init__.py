"""One technique a file: the equations, and the plugin that wires them in."""
