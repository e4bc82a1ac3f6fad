"""One file a technique: its equations as pure functions, and a plugin for the wiring."""
