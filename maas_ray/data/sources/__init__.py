"""Reading the files, arrays, images and tables that a data URI names, within limits."""
