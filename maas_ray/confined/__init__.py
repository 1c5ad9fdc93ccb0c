"""Runs one function in a child process with limits on time, CPU and memory, for code that a hostile file can crash.

    result = confined.call("maas_ray.bundle.trial:load", {"rows": 8}, [graph], Limits(wall_s=60), what="the graph")

The function is given by its import path, takes a dictionary of plain values and a list of bytes, and returns the same.
Nothing is pickled, and nothing that the child returns is executed. An exception of the child is raised as the same
class; a child that dies, or that must be killed, raises one of the `Confined…` errors. Independent of file formats.
"""

from maas_ray.confined.child import Child, Limits, Result, call, start

__all__ = ["Child", "Limits", "Result", "call", "start"]
