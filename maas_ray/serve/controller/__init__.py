"""What Serve's controller does differently for our pools: which node gets a replica, and which nodes have a front.

The only package whose classes take the place of Serve's own. Serve calls `install` in its controller's process before anything
else (`RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH` names it); Ray's version is pinned exactly.
"""
