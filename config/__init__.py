"""Settings of runs, one file each. The folder is a package, so that a config file may build on
another, `from config.small import *`, even if something else on Python's path is named config."""
