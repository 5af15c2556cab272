"""The devices: tables of cards, the mesh, XLA's flags, programs for cards that are not here."""
