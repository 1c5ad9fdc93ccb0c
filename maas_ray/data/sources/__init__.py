"""Reading what a data URI names: files, arrays, images and tables, within limits."""
