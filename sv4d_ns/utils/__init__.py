"""What every room uses: errors users see, whole files, devices, progress bars."""
