"""Settings of runs, a file for each. The folder is a package, so that a config file may begin with
another, `from config.small import *`, whatever else on Python's path is named config."""
