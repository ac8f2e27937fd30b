"""Which layers of a model are masked, and how a layer is made to compute on active blocks only."""
