"""Devices and processes: the mesh, shardings, and the coordination of processes."""
