"""Files other programs read: one animated mesh from a fitted field, as glTF and as mesh sequences."""
