"""The folder of a run: its layout, how it is opened, and what runs leave on the disk."""
