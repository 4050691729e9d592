"""DMS checkpoints of other projects: a module for each project's format, read by `dms import` and written by `dms export --format`."""
