"""``estdgm bench train``: steps of real training, EST-DGM against dense, phase by phase and over a whole schedule."""
