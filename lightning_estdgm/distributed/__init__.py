"""How the weights of a model lie over ranks, and what ranks have to agree on."""
