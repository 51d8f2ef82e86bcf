"""Executing whole networks: training steps behind one seam."""
