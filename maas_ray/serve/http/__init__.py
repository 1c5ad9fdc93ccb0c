"""HTTP server of a replica: protocol class, ASGI app, and the request handler of both."""
