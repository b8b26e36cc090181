"""The nerfstudio classes of both methods; nothing else in the package subclasses nerfstudio."""
