"""A page for a browser on this machine: served from 127.0.0.1, for the files of the folders given."""
