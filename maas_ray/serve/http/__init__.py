"""The HTTP server of a replica: protocol class, ASGI app, and the handler behind both."""
