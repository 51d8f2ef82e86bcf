"""What people look at: tables, curves and picture panels made from a search's records."""
