"""Devices and processes: the mesh, what lies where on it, and how processes agree."""
