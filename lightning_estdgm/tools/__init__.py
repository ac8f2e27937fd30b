"""What stands on top of the package: the commands of ``estdgm``."""
