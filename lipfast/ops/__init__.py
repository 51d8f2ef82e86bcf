"""The seam: every kernel of lipfast is called through the functions named here."""
