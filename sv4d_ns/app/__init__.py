"""`sv4d app`: a page on this machine that turns a dropped video into a 4D asset."""
