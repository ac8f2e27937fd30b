"""``estdgm bench``: speed on this machine, as ratios against dense in the same run."""
