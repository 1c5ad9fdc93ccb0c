"""Extensions of Serve's controller for our pools: placement of replicas, and the nodes that have a front.

The only package whose classes replace Serve's own. Serve calls `install` in its controller's process before anything
else (`RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH` names it); Ray's version is pinned exactly.
"""
