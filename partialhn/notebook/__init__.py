"""The front door for a script or a notebook: `Stream`, its displays and its progress bars."""
