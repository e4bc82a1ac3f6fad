"""Plugins meet a running pipeline: a graft, its plan, its runs and their stages."""
